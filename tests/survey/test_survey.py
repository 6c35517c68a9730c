"""Whole surveys of a tiny model: results, resumption after a kill, several processes, failures, the page."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tersor import api
from tersor.cli import app
from tersor.errors import BadInput
from tersor.survey import Outcome, Survey

SETTINGS: dict[str, Any] = {"sequences": 4, "length": 32, "eval_sequences": 3}
RECIPES = ("rtn", "gptq", "quantease")


class Killed(BaseException):
    """Stands for a kill: nothing in the survey may catch it."""


@pytest.fixture
def run(small: Path, words: Path, tmp_path: Path) -> Callable[..., Survey]:
    def start(**settings: Any) -> Survey:
        given = {"bits": (2, 3), "recipes": RECIPES, "text": words, "cache_dir": tmp_path / "cache", **SETTINGS}
        return api.survey(small, tmp_path / "out", **{**given, **settings})

    return start


def test_three_recipes_at_two_bit_widths(run: Callable[..., Survey]):
    found = run()
    by = {(one.recipe, one.bits): one for one in found.outcomes}
    assert set(by) == {(recipe, bits) for recipe in RECIPES for bits in (2.0, 3.0)}
    for one in by.values():
        assert one.status == "measured", one.error
        assert one.rate <= one.bits + 0.25
        assert one.kl > 0
        assert one.seconds > 0
        assert one.memory > 0
        assert len(one.sequences) == SETTINGS["eval_sequences"]
        assert sum(one.sequences) / 3 == pytest.approx(one.kl)
    assert by["gptq", 2].output_error < by["rtn", 2].output_error
    assert by["gptq", 3].output_error < by["gptq", 2].output_error
    assert by["quantease", 3].output_error < 0.5 * by["rtn", 3].output_error
    assert {one.word for one in found.verdicts if one.recipe == "quantease" and one.bits == 3} <= {
        "holds",
        "fails",
        "undecided",
    }
    assert found.new == 6


def test_a_killed_survey_continues_and_repeats_nothing(run: Callable[..., Survey]):
    told: list[Outcome] = []

    def stop(outcome: Outcome) -> None:
        told.append(outcome)
        if len(told) == 2:
            raise Killed

    with pytest.raises(Killed):
        run(told=stop)
    later: list[Outcome] = []
    stages: list[str] = []
    found = run(told=later.append, progress=lambda stage, *_: stages.append(stage))
    assert len(later) == 4
    assert found.new == 4
    assert "statistics" not in stages
    assert {(one.recipe, one.bits) for one in told}.isdisjoint({(one.recipe, one.bits) for one in later})
    assert len(found.outcomes) == 6
    assert run().new == 0
    assert run(recipes=("rtn", "clipping")).new == 2  # and it can be added to
    assert run(eval_sequences=2).new == 6  # other text, other results


def test_results_do_not_depend_on_the_process(run: Callable[..., Survey], tmp_path: Path):
    alone = run(recipes=("gptq",))
    side_by_side = run(recipes=("gptq", "rtn"), processes=2, bits=(2, 3), dtype="float32", seed=0)
    assert side_by_side.new == 2
    for database in tmp_path.glob("out/*.sqlite"):
        database.unlink()
    again = run(recipes=("gptq",), processes=2)
    assert [(one.bits, one.kl, one.nbytes) for one in sorted(again.outcomes, key=lambda one: one.bits)] == [
        (one.bits, one.kl, one.nbytes) for one in sorted(alone.outcomes, key=lambda one: one.bits)
    ]


RESULTS = "SELECT recipe, bits, created || kl FROM results WHERE status = 'measured'"
SLOW = """
import os, time
from pathlib import Path
from tersor.recipes import Paper, recipe
from tersor.solvers import Nearest

def wait(weight, codec):
    Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
    while not Path(__file__).with_suffix(".go").exists():
        time.sleep(0.1)
    return codec

recipe(name="slow", paper=Paper("x"), summary="x", codec=lambda bits, shape: "int2:row", solver=Nearest, refine=wait,
       differs="x")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_survey_that_is_killed_leaves_no_process_and_goes_on(small: Path, words: Path, tmp_path: Path):
    file, told = tmp_path / "slow.py", tmp_path / "slow.pid"
    file.write_text(SLOW)
    command = [sys.executable, "-m", "tersor", "survey", small, "-o", tmp_path / "out", "--recipes", f"rtn,{file}"]
    command += ["--text", words, "--workers", 2, "--bits", "2,3", "--sequences", 4, "--length", 32]
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def running(process: int) -> bool:
        stat = Path(f"/proc/{process}/stat")
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    def soon(done: Callable[[], bool]) -> bool:
        until = time.monotonic() + 60
        while not done() and time.monotonic() < until:
            time.sleep(0.1)
        return done()

    def measured() -> dict[tuple[str, float], str]:
        with closing(sqlite3.connect(tmp_path / "out" / "survey.sqlite")) as database:
            return {(recipe, bits): at for recipe, bits, at in database.execute(RESULTS)}

    with subprocess.Popen([*map(str, command)], env={**os.environ, **settings}) as survey:
        try:
            assert soon(lambda: told.exists() and bool(told.read_text()))
            assert soon(lambda: ("rtn", 2.0) in measured())
        finally:
            survey.kill()
    assert soon(lambda: not running(int(told.read_text())))
    before = measured()
    assert ("slow", 2.0) not in before
    file.with_suffix(".go").touch()
    subprocess.run([*map(str, command)], env={**os.environ, **settings}, check=True, capture_output=True)
    after = measured()
    assert set(after) == {(recipe, bits) for recipe in ("rtn", "slow") for bits in (2.0, 3.0)}
    assert before.items() <= after.items()


DYING = """
import os
from tersor.recipes import Paper, recipe
from tersor.solvers import Nearest

recipe(name="ends-itself", paper=Paper("x"), summary="x", codec=lambda bits, shape: "int2:row", solver=Nearest,
       refine=lambda weight, codec: os._exit(3), differs="x")
"""


def test_a_process_that_dies_takes_no_recipe_but_its_own(run: Callable[..., Survey], tmp_path: Path):
    file = tmp_path / "dying.py"
    file.write_text(DYING)
    found = run(recipes=(str(file), "rtn", "gptq"), processes=2)
    by = {(one.recipe, one.bits): one for one in found.outcomes}
    assert found.new == len(by) == 6
    for (recipe, _), one in by.items():
        assert (one.status == "measured") == (recipe != "ends-itself"), one.error
    assert "ended with code 3" in by["ends-itself", 3].error


FAILING = """
from tersor.recipes import Paper, recipe
from tersor.solvers import Nearest

def broken(weight, codec):
    raise RuntimeError("no such weight")

recipe(name="broken", paper=Paper("x"), summary="x", codec=lambda bits, shape: "int2:row", solver=Nearest,
       refine=broken, differs="x")
recipe(name="too-large", paper=Paper("x"), summary="x", codec=lambda bits, shape: "int8:row", solver=Nearest,
       differs="x")
"""


def test_a_recipe_that_fails_is_recorded_and_the_survey_goes_on(run: Callable[..., Survey], tmp_path: Path):
    file = tmp_path / "failing.py"
    file.write_text(FAILING)
    found = run(recipes=(str(file), "rtn"), bits=(3,))
    by = {one.recipe: one for one in found.outcomes}
    assert by["broken"].status == "failed"
    assert "RuntimeError: no such weight" in by["broken"].error
    assert by["too-large"].status == "skipped"
    assert by["rtn"].status == "measured"
    assert run(recipes=(str(file),), bits=(3,)).new == 0
    assert run(recipes=(str(file),), bits=(3,), retry=True).new == 1
    row = sqlite3.connect(found.database).execute("SELECT error FROM results WHERE recipe = 'broken'").fetchone()
    assert "no such weight" in row[0]


def test_the_page_has_everything_and_loads_nothing(run: Callable[..., Survey]):
    found = run()
    page = found.page.read_text()
    shown = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)", shown)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", shown)
    assert "default-src 'none'" in shown
    for word in ("quantease", "No worse than GPTQ on the same grid.", "2309.01885", "Differs:", "int3:"):
        assert word in shown
    payload = json.loads(re.search(r'id="survey">(.*?)</script>', shown, flags=re.DOTALL)[1])
    assert len(payload["points"]) == 6
    assert {"bytes", "kl", "error", "seconds", "memory"} <= set(payload["points"][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipes": ("gptk",)}, "Did you mean gptq"),
        ({"recipes": ("missing.py",)}, "does not exist"),
        ({"bits": (0.1,)}, "0.5 to 8"),
        ({"bits": (3, 3)}, "twice"),
        ({"processes": 0}, "--workers 0"),
    ],
)
def test_bad_input_is_refused_before_any_work(run: Callable[..., Survey], settings: dict[str, Any], message: str):
    with pytest.raises(BadInput, match=message):
        run(**settings)


STEEP = """
from tersor.recipes import Paper, recipe
from tersor.solvers import Nearest

for by in ("gradient", "magnitude"):
    recipe(
        name=by, paper=Paper("none"), summary="Test.", codec=lambda bits, shape, by=by: f"sum(sparse4:{by},int2:row)",
        solver=Nearest, gradients=by == "gradient", differs="Test.",
    )
"""


def test_recipes_get_the_gradients_they_ask_for(run: Callable[..., Survey], tmp_path: Path):
    (tmp_path / "steep.py").write_text(STEEP)
    found = run(bits=(6,), recipes=(str(tmp_path / "steep.py"),), processes=2)
    first, second = found.outcomes
    assert (first.status, second.status) == ("measured", "measured"), (first.error, second.error)
    assert first.nbytes == second.nbytes
    assert first.kl != second.kl


GUIDED = """
from tersor.recipes import Paper, recipe
from tersor.solvers import ErrorFeedback

for name in ("alike", "guided"):
    recipe(
        name=name, paper=Paper("none"), summary="Test.", codec=lambda bits, shape: "int3:row", solver=ErrorFeedback,
        guided=name == "guided", differs="Test.",
    )
"""


def test_guided_recipes_get_weighted_matrices_and_are_judged_with_plain_ones(
    run: Callable[..., Survey], tmp_path: Path
):
    """Codes differ; errors are told of the same inputs, and hardly differ on a model whose tokens are all alike."""
    (tmp_path / "guided.py").write_text(GUIDED)
    found = run(bits=(6,), recipes=(str(tmp_path / "guided.py"),), processes=2)
    outcomes = {one.recipe: one for one in found.outcomes}
    assert {one.status for one in outcomes.values()} == {"measured"}
    assert outcomes["alike"].kl != outcomes["guided"].kl
    assert outcomes["guided"].output_error == pytest.approx(outcomes["alike"].output_error, rel=0.05)
    assert outcomes["guided"].output_error != outcomes["alike"].output_error


def test_a_page_of_documentation_for_each_recipe(run: Callable[..., Survey], tmp_path: Path):
    run(docs=tmp_path / "docs")
    page = (tmp_path / "docs" / "quantease.md").read_text()
    assert re.search(r"\| 3 \| 3\.\d+ \| \d+\.\d{4} ± ", page)
    assert re.search(r"\| No worse than GPTQ on the same grid\. \| 3 \| gptq \|.*(holds|fails|undecided) \|", page)
    assert "a row in the paper" in page
    assert (tmp_path / "docs" / "awq.md").exists()
    index = (tmp_path / "docs" / "index.md").read_text()
    assert "| [quantease](quantease.md) | Coordinate descent" in index
    assert index.count("](") == len(list((tmp_path / "docs").iterdir())) - 1


def test_the_command(small: Path, words: Path, tmp_path: Path):
    arguments = ["survey", str(small), "--bits", "2", "--recipes", "rtn,gptq", "--text", str(words), "--json"]
    arguments += ["--sequences", "4", "--length", "32", "--eval-sequences", "2", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {one["recipe"] for one in found["results"]} == {"rtn", "gptq"}
    assert Path(found["page"]).exists()
    told = CliRunner().invoke(app, [argument for argument in arguments if argument != "--json"])
    assert told.exit_code == 0, told.output
    assert "gptq" in told.stdout
    assert "holds" in told.stdout + told.stderr or "undecided" in told.stdout or "fails" in told.stdout
    assert CliRunner().invoke(app, [*arguments, "--bits", "two"]).exception is not None


TUNED = """
from tersor.recipes import Paper, recipe
from tersor.recipes.baselines import gptq
from tersor.recovery import BlockTuning
from tersor.solvers import Nearest

def planned(bits, shapes, loss):
    assert all(loss(name, "int2:row") > loss(name, "int4:row") > 0 for name in shapes)
    return {name: "int4:row" if "mlp" in name else "int2:row" for name in shapes}

recipe(name="tuned", paper=Paper("x"), summary="x", codec=lambda bits, shape: "int2:row", solver=Nearest, differs="x",
       tune=BlockTuning(steps=12, batch=64, rate=0.02))
recipe(name="plain", paper=Paper("x"), summary="x", codec=lambda bits, shape: "int2:row", solver=Nearest, differs="x")
recipe(name="planned", paper=Paper("x"), summary="x", codec=lambda bits, shape: "int2:row", solver=gptq, differs="x",
       plan=planned)

def by_weight(bits, shapes, loss):
    assert all(loss(name, "int2:row") == 2.0 for name in shapes)
    return {name: "int2:row" for name in shapes}

recipe(name="by-weight", paper=Paper("x"), summary="x", codec=lambda bits, shape: "int2:row", solver=Nearest,
       differs="x", plan=by_weight, plan_loss=lambda weight, codec: float(codec.bits_per_code * (weight.ndim == 2)))
"""


def test_recipes_that_tune_blocks_and_plan_over_layers(run: Callable[..., Survey], tmp_path: Path):
    file = tmp_path / "tuned.py"
    file.write_text(TUNED)
    found = run(recipes=(str(file),), bits=(2, 3.5), dtype="float32")
    by = {(one.recipe, one.bits): one for one in found.outcomes}
    tuned, plain = by["tuned", 2], by["plain", 2]
    assert tuned.status == plain.status == "measured", (tuned.error, plain.error)
    assert tuned.nbytes == plain.nbytes
    assert tuned.kl != plain.kl
    assert "BlockTuning(steps=12" in tuned.recipe_settings
    assert by["planned", 2].status == "failed"
    assert "more than the" in by["planned", 2].error
    assert by["planned", 3.5].status == "measured", by["planned", 3.5].error
    assert plain.nbytes < by["planned", 3.5].nbytes
    assert by["planned", 3.5].output_error < by["plain", 3.5].output_error
    assert by["by-weight", 2].kl == plain.kl
    for database in tmp_path.glob("out/*.sqlite"):
        database.unlink()
    again = run(recipes=(str(file),), bits=(2,), dtype="float32", workers=2)
    assert {one.recipe: one.kl for one in again.outcomes}["tuned"] == tuned.kl
