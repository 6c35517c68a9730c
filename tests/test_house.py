"""Habits of the house that a machine can check, so that they stay true."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "tersor").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), filename=str(path)) for path in SOURCES}

LONGEST_FILE = 450
LONGEST_FUNCTION = 70
FRONT = {"cli.py", "show.py", "decoder_numpy.py"}
"""Files that talk to a person on standard output."""

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "pandas.read_pickle"}
GLOBAL_SEEDS = {"torch.manual_seed", "torch.seed", "np.random.seed", "numpy.random.seed", "random.seed"}
BASE_ERRORS = {"Exception", "BaseException"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def place(path: Path, node: ast.AST | None = None) -> str:
    where = str(path.relative_to(ROOT))
    return where if node is None else f"{where}:{getattr(node, 'lineno', 1)}"


def nodes(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[Path, ast.AST]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield path, node


def find_calls(names: set[str]) -> list[tuple[Path, ast.Call]]:
    found = [(path, node) for path, node in nodes(ast.Call) if isinstance(node, ast.Call)]
    return [(path, node) for path, node in found if ast.unparse(node.func) in names]


def calls(names: set[str]) -> list[str]:
    return [f"{place(path, node)} calls {ast.unparse(node.func)}" for path, node in find_calls(names)]


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 20


def test_files_import_only_from_floors_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename="pyproject.toml", no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_no_file_is_called_utils() -> None:
    named = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert [place(path) for path in SOURCES if {part.removesuffix(".py") for part in path.parts} & named] == []


def test_files_are_about_one_thing() -> None:
    lengths = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_are_short() -> None:
    long = {}
    for path, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef)):
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        length = (node.end_lineno or node.lineno) - _body_start(path, node) + 1
        if length > LONGEST_FUNCTION:
            long[f"{place(path, node)} {node.name}"] = length
    assert long == {}


def _body_start(path: Path, node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """First line that counts. The commands' lists of options are their documentation, and do not."""
    return node.body[0].lineno if path.name == "cli.py" else node.lineno


def test_modules_have_a_docstring() -> None:
    assert [place(path) for path, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_the_public_api_and_the_contracts_have_docstrings() -> None:
    spoken = {ROOT / "src" / "tersor" / name for name in ("contracts.py", "errors.py", "api.py")}
    bare = []
    for path in spoken & set(SOURCES):
        for node in _public(TREES[path]):
            # A method that fills in one its base class documents, or a property whose name says it all, may be bare.
            if not ast.get_docstring(node):
                bare.append(f"{place(path, node)} {node.name}")
    assert bare == []


def _public(tree: ast.Module) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (
                    child
                    for child in node.body
                    if isinstance(child, ast.FunctionDef) and any(_is_abstract(mark) for mark in child.decorator_list)
                )


def _is_abstract(mark: ast.expr) -> bool:
    return "abstract" in ast.unparse(mark)


def test_nothing_is_pickled() -> None:
    imports = []
    for path, node in nodes((ast.Import, ast.ImportFrom)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        imports += [f"{place(path, node)} imports {name}" for name in names if name.split(".")[0] in PICKLES]
    allowed = [
        place(path, node)
        for path, node in nodes(ast.keyword)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    assert imports + allowed + calls(UNSAFE_CALLS) == []


def test_randomness_is_passed_in() -> None:
    """A global seed is set only where the state before is put back."""
    forked = {
        id(inner)
        for _, node in nodes(ast.With)
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item) for item in node.items)
        for inner in ast.walk(node)
    }
    assert [place(path, node) for path, node in find_calls(GLOBAL_SEEDS) if id(node) not in forked] == []


def test_the_library_does_not_print() -> None:
    assert [found for found in calls({"print"}) if Path(found.split(":")[0]).name not in FRONT] == []


def test_errors_are_caught_by_name() -> None:
    """A handler for everything is allowed only where it raises again."""
    broad = []
    for path, node in nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        caught = (
            {ast.unparse(part) for part in getattr(node.type, "elts", [node.type])} if node.type else {"everything"}
        )
        again = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        if caught & (BASE_ERRORS | {"everything"}) and not again:
            broad.append(place(path, node))
    assert broad == []


def test_users_get_errors_not_assertions() -> None:
    """``assert`` only tells the type checker what is known anyway."""
    judging = []
    for path, node in nodes(ast.Assert):
        assert isinstance(node, ast.Assert)
        words = ast.unparse(node.test)
        if not (words.endswith(" is not None") or words.startswith("isinstance(")) or node.msg is not None:
            judging.append(place(path, node))
    assert judging == []


def test_nothing_is_left_for_later() -> None:
    marks = ("TODO", "FIXME", "XXX", "HACK")
    left = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            left += [f"{place(path)}:{number} {mark}" for mark in marks if mark in line]
    for path, node in nodes(ast.Raise):
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
            left.append(f"{place(path, node)} NotImplementedError")
    assert left == []
