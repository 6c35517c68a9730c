"""A survey on a Ray cluster: the same results as in one process, and a clear sentence where there is none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tersor import api
from tersor.errors import BadInput
from tersor.survey import Survey

SETTINGS: dict[str, Any] = {"sequences": 4, "length": 32, "eval_sequences": 2, "bits": (2,), "recipes": ("rtn", "gptq")}


@pytest.fixture
def run(small: Path, words: Path, tmp_path: Path) -> Callable[..., Survey]:
    def start(name: str, **settings: Any) -> Survey:
        return api.survey(small, tmp_path / name, text=words, cache_dir=tmp_path / "cache", **{**SETTINGS, **settings})

    return start


def figures(found: Survey) -> set[tuple[str, float | None, int | None]]:
    return {(one.recipe, one.kl, one.nbytes) for one in found.outcomes}


BROKEN = """
import os
from tersor.recipes import Paper, recipe
from tersor.solvers import Nearest

def dies(weight, codec):
    os._exit(3)

recipe(name="dies", paper=Paper("x"), summary="x", codec=lambda bits, shape: "int2:row", solver=Nearest,
       refine=dies, differs="x")
"""


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_gives_the_same_and_loses_one_recipe_at_most(run: Callable[..., Survey], tmp_path: Path):
    pytest.importorskip("ray")
    alone = run("alone")
    file = tmp_path / "dies.py"
    file.write_text(BROKEN)
    shared = run("shared", ray="local", recipes=("rtn", str(file), "gptq"))
    assert shared.new == 3
    by = {one.recipe: one for one in shared.outcomes}
    assert by["dies"].status == "failed"
    assert "ended" in by["dies"].error
    assert figures(alone) <= figures(shared)
    assert run("shared", ray="local", recipes=("rtn", "gptq")).new == 0


def test_no_cluster_there(run: Callable[..., Survey]):
    pytest.importorskip("ray")
    with pytest.raises(BadInput, match="No Ray cluster answers at --ray auto"):
        run("out", ray="auto")


def test_ray_is_not_installed(run: Callable[..., Survey], monkeypatch: pytest.MonkeyPatch):
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(BadInput, match=r"pip install 'tersor\[ray\]'"):
        run("out", ray="local")


def test_workers_and_a_cluster_exclude_each_other(run: Callable[..., Survey]):
    with pytest.raises(BadInput, match="exclude each other"):
        run("out", ray="local", processes=2)
