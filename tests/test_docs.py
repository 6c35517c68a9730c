"""The pages say what is true of the code: links lead somewhere, options exist, codec texts are read, examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import typer

import tersor
from tersor import cli
from tersor.codecs import parse
from tersor.contracts import LeafCodec

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MANUAL = [page for page in PAGES if page.name != "LOG.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_option_that_is_named_exists() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    known = {
        name
        for command in commands.values()
        for option in command.params
        for name in option.opts + option.secondary_opts
    }
    known |= {"--strict", "--no-deps", "--help"}  # of other programs, and of every program
    for page in MANUAL:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text(encoding="utf-8")))
        assert named <= known, page.name


def test_every_command_that_is_named_exists() -> None:
    known = set(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
    for page in MANUAL:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"\$ tersor +([a-z]+)", text)) | set(re.findall(r"`tersor ([a-z]+)", text))
        assert named <= known, page.name


def test_every_codec_that_is_named_is_read() -> None:
    count = 0
    for page in MANUAL:
        for text in re.findall(
            r"`((?:int|fp|lut)\d[a-z0-9:]*:[a-z0-9:]+|rows\(\d[^`]*\))`", page.read_text(encoding="utf-8")
        ):
            assert str(parse(text)) == text
            count += 1
    assert count >= 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_use_names_that_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        for name in re.findall(r"\btersor\.([a-z_]+)\(", block):
            assert name in tersor.__all__


def test_the_example_of_a_solver_works() -> None:
    (example,) = blocks(ROOT / "docs" / "contributing.md", "python")
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(example, "contributing.md", "exec", dont_inherit=True), names)
    solver = names["Plain"]()  # type: ignore[operator]
    codec = parse("int4:g32")
    assert isinstance(codec, LeafCodec)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    error = weight - codec.values(solver.solve(weight, codec, None), 64)
    assert error.square().mean() < 0.02 * weight.square().mean()


def test_the_makefile_keeps_what_the_readme_promises() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in MANUAL:
        assert set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)) <= targets
