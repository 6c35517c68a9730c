"""Runs for other engines that are killed after the model was encoded: the same command does what is left, and no more.

Runs are killed with SIGKILL in a child, so that no handler cleans up behind them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_runs
from tersor import api, delivery
from tersor.delivery import ENGINES
from tersor.errors import BadInput, TersorError

pytest.importorskip("compressed_tensors")
pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and kills processes")

SETTINGS: dict[str, Any] = {**tiny_runs.SETTINGS, "effort": "fast", "size": "60%"}


@pytest.fixture(autouse=True)
def _unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no engine is installed: what is tested here is what comes before and after the proof."""
    for name, engine in list(ENGINES.items()):
        monkeypatch.setitem(ENGINES, name, replace(engine, installed=lambda: False))  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., delivery.Delivered]:
    model = tiny_runs.wide_model(tmp_path)
    text = tiny_runs.text(tmp_path / "text.txt")

    def compress(engine: str, output: Path, **more: Any) -> delivery.Delivered:
        given = {"text": text, "cache_dir": tmp_path / "cache", **SETTINGS, **more}
        return api.compress_for(engine, model, output, **given)

    return compress


def killed(work: Callable[[], Any], module: Any, name: str, when: Callable[..., bool] = lambda *_, **__: True) -> None:
    """Do ``work`` in a child that is killed where it would call ``module.name`` (for the first time ``when`` so)."""
    child, plain = os.fork(), getattr(module, name)

    def kill(*given: Any, **named: Any) -> Any:
        if when(*given, **named):
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*given, **named)

    if child == 0:
        status = 1
        try:
            setattr(module, name, kill)
            work()
        except TersorError as error:
            sys.stderr.write(f"{error}\n")
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def content(output: Path) -> dict[str, bytes]:
    files = sorted(output.rglob("*")) if output.is_dir() else [output]
    return {str(path.relative_to(output)): path.read_bytes() for path in files if path.is_file()}


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("this was done already")


@pytest.mark.parametrize(("engine", "name"), [("llama.cpp", "x.gguf"), ("compressed-tensors", "x")])
def test_only_what_is_left_is_done(
    engine: str,
    name: str,
    run: Callable[..., delivery.Delivered],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, record = tmp_path / name, tmp_path / f"{name}.json"

    def ended() -> None:
        assert {path.name for path in tmp_path.glob("*x*")} - {"text.txt"} == {
            name,
            f"{name}.json",
            f"{name}.report.html",
        }
        assert json.loads(record.read_text())["note"].startswith("not proven here")

    killed(lambda: run(engine, output), delivery, "write_file")
    assert not output.exists()
    monkeypatch.setattr(delivery.pipeline, "compress", never)
    for step in ("_proof", "atomic_write"):
        killed(lambda: run(engine, output), delivery, step)
        assert output.exists()
        assert not record.exists()
        monkeypatch.setattr(delivery, "write_file", never)
    before = content(output)
    done = run(engine, output)
    ended()
    assert content(output) == before
    assert done.result.resumed
    assert done.result.plan.file_bytes == json.loads(record.read_text())["file_bytes"]
    with pytest.raises(BadInput, match="exists already"):
        run(engine, output)
    ended()


def test_a_kill_while_cleaning_up_leaves_a_finished_file(
    run: Callable[..., delivery.Delivered], tmp_path: Path
) -> None:
    output = tmp_path / "x.gguf"
    last = tmp_path / "x.gguf.artifact.finished"
    killed(lambda: run("llama.cpp", output), shutil, "rmtree", lambda path, **_: path == last and last.exists())
    assert (tmp_path / "x.gguf.json").exists()
    with pytest.raises(BadInput, match="exists already"):
        run("llama.cpp", output)
    assert {path.name for path in tmp_path.glob("x.gguf*")} == {"x.gguf", "x.gguf.json", "x.gguf.report.html"}


def test_another_file_is_not_taken_for_the_run_s_own(run: Callable[..., delivery.Delivered], tmp_path: Path) -> None:
    output, record = tmp_path / "x.gguf", tmp_path / "x.gguf.json"
    killed(lambda: run("llama.cpp", output), delivery, "_proof")
    whole = output.read_bytes()
    output.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    changed = output.read_bytes()
    for more in ({}, {"restart": True}, {"size": "62%"}):
        with pytest.raises(BadInput, match="exists already"):
            run("llama.cpp", output, **more)
        assert output.read_bytes() == changed
    record.write_text(json.dumps({"engine": "llama.cpp", "proof": {"noise": 0.0}}))
    killed(lambda: run("llama.cpp", output, overwrite=True), delivery, "_proof")
    assert output.read_bytes() == whole
    assert not record.exists()  # it was of the file that was replaced
    run("llama.cpp", output, overwrite=True)
    assert output.read_bytes() == whole
    assert json.loads(record.read_text())["proof"] is None
