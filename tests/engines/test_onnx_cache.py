"""Where ONNX graphs are kept: in the folder that was named, and nothing half-written after a failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tiny_runs
from tersor import api
from tersor.anatomy import open_source
from tersor.engines.onnx import graph
from tersor.engines.onnx.engine import ONNX

pytest.importorskip("onnx")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, in which nothing must appear."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(graph, "_export", lambda _model: b"a graph")
    return tmp_path / "home"


def test_a_graph_goes_where_it_is_told(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path | None] = []

    def stop(source: object, cache_dir: Path | None = None) -> bytes:
        asked.append(cache_dir)
        raise InterruptedError

    monkeypatch.setattr("tersor.engines.onnx.engine.open_graph", stop)
    with pytest.raises(InterruptedError):
        api.plan(tiny_runs.wide_model(tmp_path), size="50%", engine=ONNX.name, cache_dir=tmp_path / "cache")
    assert asked == [tmp_path / "cache"]
    source = open_source(tmp_path / "model-llama")
    assert graph.open_graph(source, tmp_path / "cache") == b"a graph"
    (kept,) = (tmp_path / "cache" / "onnx").iterdir()
    assert kept.read_bytes() == b"a graph"
    assert not home.exists()


def test_nothing_is_left_of_a_graph_that_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(tiny_runs.wide_model(tmp_path))

    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        graph.open_graph(source, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "onnx").iterdir())
