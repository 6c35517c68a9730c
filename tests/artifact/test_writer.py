"""The writer: what it refuses, and that a run killed anywhere ends with the same bytes as one that was not."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tersor.artifact.writer as writer_module
from tersor.artifact import ArtifactWriter, Layout, atomic_write, compute_layout, hash_files, publish
from tersor.errors import BadInput, CannotResume, ShapeMismatch, TersorError

FINGERPRINT = {"model": "m1", "plan": "p1", "text": "t1", "version": "1"}
Units = dict[str, dict[str, Tensor]]


def make_units(count: int = 4) -> Units:
    """Units of three tensors with odd sizes, one of them empty."""
    return {
        f"layer.{i}": {
            f"layer.{i}.codes": ((torch.arange(7 * (i + 3)) * 31 + i) % 256).to(torch.uint8).reshape(7, -1),
            f"layer.{i}.scale": (torch.arange(7) / 8 + i).to(torch.float16).reshape(7, 1),
            f"layer.{i}.none": torch.zeros(0, 3, dtype=torch.bfloat16),
        }
        for i in range(count)
    }


def layout_of(units: Units, **options: int) -> Layout:
    flat = {key: (tensor.dtype, tuple(tensor.shape)) for unit in units.values() for key, tensor in unit.items()}
    return compute_layout(flat, **options)


def run(folder: Path, units: Units, layout: Layout, *, pause: float = 0.0) -> list[str]:
    """What a caller does: write what is not done, finish. Returns the units that were written now."""
    written = []
    with ArtifactWriter(folder, layout, FINGERPRINT) as writer:
        for name, unit in units.items():
            if not writer.done(name):
                writer.write(name, unit, record={"error": len(name) / 8})
                written.append(name)
                time.sleep(pause)
            assert writer.record(name) == {"error": len(name) / 8}
        writer.finish()
    return written


class Crash(BaseException):
    """Stands for the end of the process."""


class Tape:
    """Lets the first ``limit`` changes to the disk through, the next one half, and none after."""

    def __init__(self, patch: pytest.MonkeyPatch, limit: int) -> None:
        self.limit = limit
        self.log: list[str] = []
        for name in ("pwrite", "write", "ftruncate", "posix_fallocate", "replace", "rename", "mkdir", "unlink"):
            patch.setattr(os, name, self._through(name, getattr(os, name)))
        patch.setattr(os, "fsync", lambda _: self.log.append("fsync"))

    def _through(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.log.append(name)
            changes = sum(entry != "fsync" for entry in self.log)
            if changes > self.limit:
                if name in ("pwrite", "write") and changes == self.limit + 1:
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
                raise Crash
            return real(*arguments, **options)

        return call


def test_crash_at_every_single_step_is_harmless(tmp_path: Path) -> None:
    units = make_units(3)
    layout = layout_of(units, max_shard_size=60)
    assert len(layout.shards) > 1
    run(tmp_path / "whole", units, layout)
    expected = hash_files(tmp_path / "whole")
    for limit in range(1000):
        folder = tmp_path / str(limit)
        with pytest.MonkeyPatch.context() as patch:
            tape = Tape(patch, limit)
            try:
                run(folder, units, layout)
                crashed = False
            except Crash:
                crashed = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)
            run(folder, units, layout)
        assert hash_files(folder) == expected, f"after {limit} steps: {tape.log}"
        shutil.rmtree(folder)
        if not crashed:
            break
    assert 20 < limit < 1000


def test_bytes_are_flushed_before_the_journal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = make_units(2)
    layout = layout_of(units)
    tape = Tape(monkeypatch, 10**9)
    with ArtifactWriter(tmp_path / "out", layout, FINGERPRINT) as writer:
        tape.log.clear()
        writer.write("layer.0", units["layer.0"])
    assert tape.log == ["pwrite", "pwrite", "fsync", "write", "fsync"]  # the empty tensor needs no write


@pytest.mark.usefixtures("no_sync")
def test_journal_cut_at_every_byte(tmp_path: Path) -> None:
    units = {name: {name: torch.tensor([i, 7], dtype=torch.uint8)} for i, name in enumerate("ab")}
    layout = layout_of(units)
    run(tmp_path / "whole", units, layout)
    expected = hash_files(tmp_path / "whole")
    journal = (tmp_path / "whole" / ".state" / "journal.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(journal) if byte == ord("\n")]
    assert len(ends) == 2
    for cut in range(len(journal) + 1):
        folder = tmp_path / "cut"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / ".state" / "journal.jsonl").write_bytes(journal[:cut])
        written = run(folder, units, layout)
        assert written == [name for name, end in zip("ab", ends, strict=True) if cut < end]
        assert hash_files(folder) == expected
        assert (folder / ".state" / "journal.jsonl").read_bytes() == journal
        shutil.rmtree(folder)


def test_kill_at_random_moments(tmp_path: Path) -> None:
    units = make_units(12)
    layout = layout_of(units, max_shard_size=300)
    run(tmp_path / "whole", units, layout)
    expected = hash_files(tmp_path / "whole")
    fork = multiprocessing.get_context("fork")
    moments = random.Random(0)
    kills = 0
    for trial in range(3):
        folder = tmp_path / f"killed{trial}"
        for attempt in range(50):
            child = fork.Process(target=run, args=(folder, units, layout), kwargs={"pause": 0.005})
            child.start()
            child.join(moments.uniform(0.0, 0.02 + 0.01 * attempt))
            if child.exitcode is None:
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
            child.join()
            if child.exitcode == 0:
                break
            assert child.exitcode == -signal.SIGKILL
            kills += 1
        assert hash_files(folder) == expected
    assert kills >= 3  # the first moment of each trial is always before the last unit


def test_damaged_units_are_written_again(tmp_path: Path) -> None:
    units = make_units(3)
    layout = layout_of(units)
    folder = tmp_path / "out"
    run(folder, units, layout)
    expected = hash_files(folder)
    entry = layout.entries["layer.1.codes"]
    with (folder / entry.file).open("r+b") as file:
        file.seek(entry.offset + 2)
        file.write(b"\xee")
    with ArtifactWriter(folder, layout, FINGERPRINT) as writer:
        assert [writer.done(name) for name in units] == [True, False, True]
        assert writer.missing() == tuple(name for name in layout.entries if name.startswith("layer.1."))
    assert run(folder, units, layout) == ["layer.1"]
    assert hash_files(folder) == expected
    os.truncate(folder / entry.file, 100)
    run(folder, units, layout)
    assert hash_files(folder) == expected


def test_units_may_be_written_from_several_threads(tmp_path: Path) -> None:
    units = make_units(24)
    layout = layout_of(units, max_shard_size=500)
    run(tmp_path / "one", units, layout)
    with ArtifactWriter(tmp_path / "many", layout, FINGERPRINT) as writer:
        names = list(units)

        def work(part: list[str]) -> None:
            for name in part:
                writer.write(name, units[name])

        threads = [threading.Thread(target=work, args=(names[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish()
    assert hash_files(tmp_path / "many") == hash_files(tmp_path / "one")


def test_another_fingerprint_is_refused_by_field(tmp_path: Path) -> None:
    units = make_units(2)
    layout = layout_of(units)
    ArtifactWriter(tmp_path / "out", layout, FINGERPRINT).close()
    with pytest.raises(CannotResume, match=r"different model and text \(model was m1, is m2; text was t1, is t2\)"):
        ArtifactWriter(tmp_path / "out", layout, {**FINGERPRINT, "model": "m2", "text": "t2"})
    with pytest.raises(CannotResume, match="different layout"):
        ArtifactWriter(tmp_path / "out", layout_of(make_units(3)), FINGERPRINT)
    with pytest.raises(CannotResume, match="different plan "):
        ArtifactWriter(tmp_path / "out", layout_of(make_units(3)), {**FINGERPRINT, "plan": "p2"})
    with pytest.raises(CannotResume, match="different seed "):
        ArtifactWriter(tmp_path / "out", layout, {**FINGERPRINT, "seed": "1"})
    ArtifactWriter(tmp_path / "out", layout, FINGERPRINT).close()


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    layout = layout_of(make_units(1))
    first = ArtifactWriter(tmp_path / "out", layout, FINGERPRINT)
    with pytest.raises(BadInput, match="another run is writing"):
        ArtifactWriter(tmp_path / "out", layout, FINGERPRINT)
    first.close()
    ArtifactWriter(tmp_path / "out", layout, FINGERPRINT).close()


def test_files_of_unknown_origin_are_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(BadInput, match=r"model\.safetensors exists and no record"):
        ArtifactWriter(folder, layout_of(make_units(1)), FINGERPRINT)
    assert (folder / "model.safetensors").read_bytes() == b"precious"


def test_too_large_for_the_disk_leaves_nothing(tmp_path: Path) -> None:
    layout = compute_layout({"a": (torch.uint8, (2**60,))})
    with pytest.raises(BadInput, match=rf"need {layout.total_bytes} bytes and the disk has \d+ free"):
        ArtifactWriter(tmp_path / "out", layout, FINGERPRINT)
    assert not any(tmp_path.iterdir())


def test_reservation_failing_midway_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(make_units(6), max_shard_size=100)
    calls = []

    def full(handle: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(BadInput, match="free some space"):
        ArtifactWriter(tmp_path / "out", layout, FINGERPRINT)
    assert not any(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    calls.clear()
    with pytest.raises(BadInput):
        ArtifactWriter(tmp_path / "kept", layout, FINGERPRINT)
    assert [path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()] == ["notes.txt"]


def test_disk_full_while_writing_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = make_units(3)
    layout = layout_of(units)
    run(tmp_path / "whole", units, layout)
    real = os.write

    def full(handle: int, data: bytes) -> int:
        real(handle, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with ArtifactWriter(tmp_path / "out", layout, FINGERPRINT) as writer:
        writer.write("layer.0", units["layer.0"], record={"error": 0.875})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(TersorError, match="free some space and run the same"):
                writer.write("layer.1", units["layer.1"])
        assert not writer.done("layer.1")
        writer.write("layer.2", units["layer.2"], record={"error": 0.875})  # not glued to the torn line
    assert run(tmp_path / "out", units, layout) == ["layer.1"]
    assert hash_files(tmp_path / "out") == hash_files(tmp_path / "whole")


def test_wrong_tensors_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    units = make_units(1)
    layout = layout_of(units)
    good = units["layer.0"]
    with ArtifactWriter(tmp_path / "out", layout, FINGERPRINT) as writer:
        before = hash_files(tmp_path / "out")
        with pytest.raises(ShapeMismatch, match=r"'layer.0.scale': expected torch.float16 \[7, 1\].*float32 \[7, 1\]"):
            writer.write("layer.0", {**good, "layer.0.scale": good["layer.0.scale"].float()})
        with pytest.raises(ShapeMismatch, match=r"'layer.0.codes'.*found torch.uint8 \[3, 7\]"):
            writer.write("layer.0", {**good, "layer.0.codes": good["layer.0.codes"].T})
        with pytest.raises(ShapeMismatch, match="'other' has no place"):
            writer.write("layer.0", {**good, "other": torch.zeros(1)})
        assert hash_files(tmp_path / "out") == before
        writer.write("layer.0", {key: good[key] for key in list(good)[:2]})
        with pytest.raises(ShapeMismatch, match=r"1 of 3 tensors were never written, the first is 'layer\.0\.none'"):
            writer.finish()


def test_tensors_that_do_not_lie_in_row_order_are_written_right(tmp_path: Path) -> None:
    tensor = torch.arange(12, dtype=torch.int32).reshape(3, 4).T
    layout = compute_layout({"a": (torch.int32, (4, 3))})
    with ArtifactWriter(tmp_path / "out", layout, {}) as writer:
        writer.write("a", {"a": tensor})
        writer.finish()
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()[layout.entries["a"].offset :]
    assert torch.frombuffer(bytearray(raw), dtype=torch.int32).reshape(4, 3).equal(tensor)


def test_what_was_written_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = make_units(3)
    units["scalar"] = {"scalar": torch.tensor(2.5, dtype=torch.float64)}
    layout = layout_of(units, max_shard_size=60)
    run(tmp_path / "out", units, layout)
    monkeypatch.setattr(writer_module, "_CHUNK", 5)
    with ArtifactWriter(tmp_path / "out", layout, FINGERPRINT) as writer:
        for unit in units.values():
            found = writer.read(unit)
            assert list(found) == list(unit)
            for name, tensor in unit.items():
                assert found[name].dtype == tensor.dtype
                assert found[name].equal(tensor)
        with pytest.raises(ShapeMismatch, match="'nothing' has no place"):
            writer.read(["nothing"])


def test_atomic_write_replaces_or_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    atomic_write(path, b"old")

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(TersorError, match="needs 3 bytes"):
            atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


def test_publish_drops_the_state_and_may_be_repeated(tmp_path: Path) -> None:
    units = make_units(2)
    run(tmp_path / "out.partial", units, layout_of(units))
    expected = hash_files(tmp_path / "out.partial")
    publish(tmp_path / "out.partial", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors"]
    assert hash_files(tmp_path / "out") == expected
    (tmp_path / "out" / ".state").mkdir()  # killed between the rename and the removal
    publish(tmp_path / "out.partial", tmp_path / "out")
    assert not (tmp_path / "out" / ".state").exists()


def test_publish_over_something(tmp_path: Path) -> None:
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "which").write_text(name)
    with pytest.raises(BadInput, match="exists already"):
        publish(tmp_path / "out.partial", tmp_path / "out")
    assert (tmp_path / "out" / "which").read_text() == "out"
    publish(tmp_path / "out.partial", tmp_path / "out", replace=True)
    assert (tmp_path / "out" / "which").read_text() == "out.partial"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(BadInput, match="nothing to publish"):
        publish(tmp_path / "nowhere.partial", tmp_path / "nowhere")


def test_journal_is_readable_by_people(tmp_path: Path) -> None:
    units = make_units(1)
    run(tmp_path / "out", units, layout_of(units))
    (line,) = (tmp_path / "out" / ".state" / "journal.jsonl").read_text().splitlines()
    data = json.loads(line)
    assert data["name"] == "layer.0"
    assert len(data["sha256"]) == 64
    assert data["tensors"] == list(units["layer.0"])
