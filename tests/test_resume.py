"""Runs that are killed: continued by the same command, they end with the same bytes and repeat no finished block.

A process that has imported everything once forks a child per run, so that a run costs a second and not an import. The
child is killed with SIGKILL: no handler, no clean-up.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny_runs
from tersor import api
from tersor.artifact import open_artifact, partial_path
from tersor.errors import BadInput, CannotResume, TersorError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and kills processes")

TRIALS = 10
COMPARED = ("model.safetensors", "config.json", "plan.json", "calibration.safetensors")
SETTINGS = {**tiny_runs.SETTINGS, "size": "40%", "sequences": 36, "samples": 1, "seed": 11}
"""No text is given, so that runs are killed while they sample it too; 36 sequences are two chunks, of which one is held
out."""


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.with_tokenizer(tiny("llama"), tmp_path_factory.mktemp("resume"))


def run(model: Path, folder: Path, **settings: Any) -> api.Result:
    """The command under test, with a cache of its own."""
    return api.compress(model, folder / "out", cache_dir=folder / "cache", **{**SETTINGS, **settings})


def in_child(work: Callable[[], Any]) -> int:
    """Fork, do ``work`` in the child, and return what became of it: 0, 1 for an error, or minus the signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except TersorError as error:
            sys.stderr.write(f"{error}\n")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(seconds: float, work: Callable[[], Any]) -> int:
    """Like :func:`in_child`, with a kill after some time, if the child still runs then."""

    def timed() -> None:
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
        work()

    return in_child(timed)


def at_every_step(step: Callable[[int], None], work: Callable[[], Any]) -> None:
    """Do ``work``, calling ``step(n)`` just before its n-th change to the disk that is meant to last."""
    count = 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            step(count)
            return function(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, before(getattr(os, name)))
    work()


def killed_at_step(number: int, work: Callable[[], Any]) -> int:
    """Like :func:`in_child`, killed just before a change to the disk."""

    def step(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return in_child(lambda: at_every_step(step, work))


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / "out" / name).read_bytes()).hexdigest() for name in COMPARED}


def keep_events(folder: Path) -> Path:
    """Another name for the log of events: it outlives the state folder, and goes on growing while the run does."""
    log = partial_path(folder / "out") / ".state" / "work" / "events.jsonl"
    kept = folder / "events.jsonl"
    if log.exists() and not kept.exists():
        os.link(log, kept)
    return kept


def check_events(log: Path, kills: int) -> list[dict[str, Any]]:
    """No block that was done is begun again in the same stage, and none is begun more often than runs were killed."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    done: set[tuple[Any, ...]] = set()
    begun: dict[tuple[Any, ...], int] = {}
    for event in events:
        key = (event["stage"], event.get("way"), event.get("block"))
        if event["event"] == "block begun":
            assert key not in done, f"{key} was done and began again"
            begun[key] = begun.get(key, 0) + 1
        elif event["event"] == "block done":
            done.add(key)
    assert sum(count - 1 for count in begun.values()) <= kills
    return events


@dataclass(frozen=True)
class Untouched:
    """An uninterrupted run: digests of its files, its seconds, its changes to the disk."""

    digests: dict[str, str]
    seconds: float
    steps: int


@pytest.fixture(scope="module")
def untouched(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    folder = tmp_path_factory.mktemp("untouched")
    steps = folder / "steps"
    began = time.perf_counter()
    assert in_child(lambda: at_every_step(lambda count: write(steps, count), lambda: run(model, folder))) == 0
    seconds = time.perf_counter() - began
    open_artifact(folder / "out").verify_hashes()
    return Untouched(digests(folder), seconds, int(steps.read_text()))


def write(path: Path, number: int) -> None:
    path.write_text(str(number))


def moments() -> Iterator[float]:
    """Ten random moments spread over a run, as shares of its time."""
    draw = random.Random(2026)
    yield from ((trial + draw.random()) / TRIALS for trial in range(TRIALS))


def finish_and_compare(model: Path, folder: Path, untouched: Untouched, kills: int) -> None:
    """Repeat the command until it is done: the same bytes, no block done twice, nothing left lying about."""
    log = keep_events(folder)
    if not (folder / "out").exists() or (folder / "out" / ".state").exists():
        assert in_child(lambda: run(model, folder)) == 0
    assert digests(folder) == untouched.digests
    assert not (folder / "out" / ".state").exists()
    assert {path.name for path in folder.iterdir()} <= {"out", "cache", "events.jsonl"}
    open_artifact(folder / "out").verify_hashes()
    if log.exists():
        check_events(log, kills)


@pytest.mark.parametrize("moment", list(moments()), ids=lambda share: f"{share:.2f}")
def test_killed_once_and_continued(moment: float, model: Path, untouched: Untouched, tmp_path: Path) -> None:
    status = killed_after(moment * untouched.seconds, lambda: run(model, tmp_path))
    assert status in (0, -signal.SIGKILL)
    finish_and_compare(model, tmp_path, untouched, int(status != 0))


@pytest.mark.parametrize("back", sorted(random.Random(5).sample(range(45), 5)))
def test_killed_while_it_is_put_in_place(back: int, model: Path, untouched: Untouched, tmp_path: Path) -> None:
    """The last changes to the disk are the renaming of the folder and the removal of the state, file by file."""
    assert killed_at_step(untouched.steps - back, lambda: run(model, tmp_path)) == -signal.SIGKILL
    finish_and_compare(model, tmp_path, untouched, 1)


def test_killed_again_and_again(model: Path, untouched: Untouched, tmp_path: Path) -> None:
    draw = random.Random(8)
    kills = 0
    # Steps, not seconds: each run gets some way, however slow the machine.
    while kills < 10 and killed_at_step(draw.randint(8, 24), lambda: run(model, tmp_path)) != 0:
        kills += 1
        keep_events(tmp_path)
    assert kills == 10
    finish_and_compare(model, tmp_path, untouched, kills)
    events = check_events(tmp_path / "events.jsonl", kills)
    assert len({event["process"] for event in events}) > 3
    done = {(event["stage"], event.get("way"), event["block"]) for event in events if event["event"] == "block done"}
    passes = [("sensitivity", "forward"), ("sensitivity", "backward"), ("curves", None), ("encode", None)]
    every = {(stage, way, block) for stage, way in passes for block in range(3)}
    assert done <= every
    assert len(every - done) < kills  # killed between the work and the word of it


@pytest.mark.parametrize("settings", [{"propagate": False}, {"sensitivity": "flat", "solver": "feedback"}])
def test_killed_with_other_options(settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert in_child(lambda: run(model, whole, **settings)) == 0
    kills = 0
    # Later and later, since putting a folder in place takes many steps in one go.
    while killed_at_step(25 + 10 * kills, lambda: run(model, broken, **settings)) != 0:
        kills += 1
        keep_events(broken)
    assert kills > 2
    assert digests(broken) == digests(whole)
    check_events(broken / "events.jsonl", kills)


def test_what_has_changed_since_is_named_and_restart_begins_anew(model: Path, tmp_path: Path) -> None:
    text = tiny_runs.text(tmp_path / "words.txt")
    settings = {"text": str(text), "samples": 0}
    assert killed_at_step(25, lambda: run(model, tmp_path, **settings)) == -signal.SIGKILL
    with pytest.raises(CannotResume, match="seed"):
        run(model, tmp_path, **settings, **{"seed": 12})
    tiny_runs.text(text, seed=1)
    with pytest.raises(CannotResume, match=r"words.txt has changed"):
        run(model, tmp_path, **settings)
    result = run(model, tmp_path, **settings, restart=True)
    assert not result.resumed
    assert not partial_path(tmp_path / "out").exists()


def test_an_output_that_another_run_left_half_in_place_is_not_taken_for_ours(
    model: Path, untouched: Untouched, tmp_path: Path
) -> None:
    settings = {"text": str(tiny_runs.text(tmp_path / "words.txt")), "samples": 0}
    run(model, tmp_path, **settings)
    (tmp_path / "out" / ".state").mkdir()
    with pytest.raises(BadInput, match="exists already"):
        run(model, tmp_path, **settings, **{"seed": 12})
    before = digests(tmp_path)
    again = run(model, tmp_path, **settings)
    assert again.resumed
    assert not (tmp_path / "out" / ".state").exists()
    assert digests(tmp_path) == before


def test_a_run_that_tunes_its_blocks_continues_too(model: Path, tmp_path: Path) -> None:
    """Tuning moves all layers of a block at once, and carries states of the original model from block to block."""
    settings = {"tune": True, "candidates": ("int2:g16", "int3:g16", "rot(int2:row)", "bf16"), "size": "55%"}

    def work(folder: Path, **other: Any) -> api.Result:
        return run(model, folder, **{**settings, **other})

    # Whole runs are no children: the engines that other tests have loaded start threads, which do not survive a fork.
    for name in ("whole", "threads", "plain", "killed"):
        (tmp_path / name).mkdir()
    work(tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    work(tmp_path / "threads", workers=2)
    assert digests(tmp_path / "threads") == expected
    work(tmp_path / "plain", tune=False)
    assert digests(tmp_path / "plain")["model.safetensors"] != expected["model.safetensors"]
    draw = random.Random(3)
    kills = 0
    while kills < 8 and killed_at_step(draw.randint(10, 26), lambda: work(tmp_path / "killed")) != 0:
        kills += 1
    assert kills >= 3
    if not (tmp_path / "killed" / "out").exists():
        work(tmp_path / "killed")
    assert digests(tmp_path / "killed") == expected
