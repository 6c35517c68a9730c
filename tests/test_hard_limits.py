"""Full disks and interrupted runs, as a user meets them on the command line."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import command_line
import tersor.pipeline
import tiny_runs
from command_line import Outcome


@pytest.fixture
def compress(small: Path, words: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Compress into ``out``; later options win over those that come first."""

    def run(*arguments: object, source: Path = small) -> Outcome:
        return command_line.run(
            "compress", source, "-o", tmp_path / "out", "--size", "25%", "--text", words, *tiny_runs.OPTIONS,
            *arguments, cache=tmp_path.parent / "cache",
        )  # fmt: skip

    return run


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def interrupted(compress: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The partial folder of a run stopped by Ctrl-C between statistics and encoding."""

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tersor.pipeline, "encode_model", stop)
        outcome = compress()
    assert outcome == Outcome(
        130, "", "tersor: stopped; the same command continues compress, plan and survey where they were.\n"
    )
    return tmp_path / "out.partial"


def test_a_disk_without_room_is_said_before_any_work(
    compress: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 5000, 5000))
    sentence = compress().sentence
    assert sentence.startswith("The run needs about ")
    assert "free some space" in sentence
    assert f"bytes in {tmp_path}, and its disk has 5,000 free" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_stops_the_run_which_then_continues(
    compress: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        sentence = compress().sentence
    assert "the weights need" in sentence
    assert "free some space" in sentence
    # Nothing of the artifact is there, only what the continued run need not do again.
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    assert not list((tmp_path / "out.partial").glob("*.safetensors"))
    assert compress().code == 0
    first = digest(tmp_path / "out")
    assert compress("--overwrite").code == 0
    assert digest(tmp_path / "out") == first


def test_a_file_that_may_not_grow(small: Path, words: Path, tmp_path: Path) -> None:
    """A real limit of the system, met while hidden states are written."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
        "from tersor import cli; cli.main()"
    )
    arguments = ["compress", small, "-o", tmp_path / "out", "--size", "25%", "--text", words, *tiny_runs.OPTIONS]
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(command_line.SOURCES), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    sentence = Outcome(done.returncode, done.stdout, done.stderr).sentence
    assert "out.partial/.state/work/" in sentence
    assert "run the same command again, it continues where it stopped" in sentence
    assert not (tmp_path / "out").exists()


def test_the_same_command_continues(
    compress: Callable[..., Outcome], interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*arguments: object, **options: object) -> None:
        raise AssertionError("statistics were measured already")

    with monkeypatch.context() as patch:
        patch.setattr("tersor.stages.curves._block_statistics", no_more)
        patch.setattr("tersor.stages.sensitivity.backward_block", no_more)
        assert "(resumed)" in compress().text
    assert not interrupted.exists()
    first = digest(tmp_path / "out")
    assert "(resumed)" not in compress("--overwrite").text
    assert digest(tmp_path / "out") == first


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--size", "30%"), "differs in budget (budget was '25% of the source', is '30% of the source')"),
        (("--solver", "nearest"), "differs in --solver (--solver was 'coordinate', is 'nearest')"),
        (("--seed", "5", "--dtype", "float32"), "differs in --dtype, --seed ("),
        (("--candidates", "int4:row"), "differs in --candidates ("),
        (("--text", "other.txt"), "differs in --text ("),
    ],
)
def test_other_options_do_not_continue(
    compress: Callable[..., Outcome], interrupted: Path, options: tuple[str, ...], named: str
) -> None:
    before = sorted(interrupted.rglob("*"))
    sentence = compress(*options).sentence
    assert named in sentence
    assert sentence.endswith("repeat the first command to continue it, or add --restart to throw it away.")
    assert sorted(interrupted.rglob("*")) == before


def test_workers_and_memory_may_change(compress: Callable[..., Outcome], interrupted: Path) -> None:
    assert "(resumed)" in compress("--workers", 2, "--max-memory", "4GB").text


def test_another_model_or_text_does_not_continue(
    compress: Callable[..., Outcome], interrupted: Path, small: Path, words: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(small, tmp_path / "model"))
    data = bytearray((model / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert "differs in model, weight files (" in compress(source=model).sentence
    before = words.read_text()
    try:
        words.write_text("other words " * 500)
        sentence = compress().sentence
    finally:
        words.write_text(before)
    assert "The text in words.txt has changed since the interrupted run began" in sentence
    assert "--restart" in sentence


def test_restart_throws_the_work_away(compress: Callable[..., Outcome], interrupted: Path, tmp_path: Path) -> None:
    assert "(resumed)" not in compress("--solver", "nearest", "--restart").text
    assert not interrupted.exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_failed_run_does_not_touch_what_it_was_to_replace(compress: Callable[..., Outcome], tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "tersor.json").write_text("{}")  # as an artifact has it: other folders are never replaced
    (old / "mine").write_text("precious")
    assert "below the least possible" in compress("--size", "1kB", "--overwrite").sentence
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (old / "mine").read_text() == "precious"
