"""What a run keeps while it works: all of a file or none of it, and nobody else's."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tersor.errors import CannotResume, TersorError
from tersor.stages.work import Hidden, Work

IDENTITY = {"model": "abc", "plan": None, "--seed": 0, "--candidates": ("int4:row", "bf16")}


def test_a_run_continues_itself_only(tmp_path: Path) -> None:
    work = Work(tmp_path / "out.partial")
    work.begin(IDENTITY)
    Work(tmp_path / "out.partial").begin(dict(reversed(IDENTITY.items())))
    with pytest.raises(CannotResume) as caught:
        work.begin({**IDENTITY, "--seed": 1, "model": "xyz"})
    sentence = str(caught.value)
    assert "differs in --seed, model (--seed was 0, is 1; model was 'abc', is 'xyz')" in sentence
    assert str(tmp_path / "out.partial") in sentence
    assert "--restart" in sentence
    with pytest.raises(CannotResume, match="differs in version of torch"):
        work.begin({**IDENTITY, "version of torch": "9"})


def test_records_and_tensors_come_back(tmp_path: Path) -> None:
    work = Work(tmp_path)
    data = {"a": [1, 2.5, None], "ü": {"b": True}}
    assert not work.has("deep/record.json")
    work.save("deep/record.json", data)
    assert work.has("deep/record.json")
    assert work.load("deep/record.json") == data
    tensors = {"x": torch.arange(6).reshape(2, 3).T, "y": torch.tensor(2.5, dtype=torch.bfloat16)}
    work.save_tensors("some.safetensors", tensors)
    found = work.load_tensors("some.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_torn_event_is_passed_over(tmp_path: Path) -> None:
    work = Work(tmp_path)
    assert work.events() == []
    work.begin(IDENTITY)
    work.event("encode", "block begun", block=0)
    work.event("encode", "block done", block=0)
    with (work.folder / "events.jsonl").open("a") as file:
        file.write('{"time": 1, "sta')
    assert [(event["event"], event["block"]) for event in work.events()] == [("block begun", 0), ("block done", 0)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.integers(1, 9), st.booleans())
def test_hidden_states_come_back_chunk_by_chunk(
    tmp_path: Path, sequences: int, length: int, width: int, chunk: int, wide: bool
) -> None:
    dtype = torch.float32 if wide else torch.bfloat16
    values = torch.randn(sequences, length, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    store = Hidden(tmp_path / "states.hidden", (sequences, length, width), dtype, chunk)
    store.remove()
    for number in range(store.chunks):
        store.write(number, values[store.sequences(number)])
        assert not store.complete
    store.finish()
    assert store.complete
    order = reversed(range(store.chunks))
    assert all(torch.equal(store.read(number), values[store.sequences(number)]) for number in order)
    assert [path.name for path in tmp_path.iterdir()] == ["states.hidden"]
    store.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_half_written_is_begun_anew(tmp_path: Path) -> None:
    shape = (4, 2, 3)
    values = torch.arange(24.0).reshape(shape)
    first = Hidden(tmp_path / "h", shape, torch.float32, 2)
    first.write(0, -values[:2])
    again = Hidden(tmp_path / "h", shape, torch.float32, 2)
    for number in (0, 1):
        again.write(number, values[again.sequences(number)])
    again.finish()
    assert torch.equal(torch.cat([again.read(0), again.read(1)]), values)


def test_states_that_nobody_reads_count_as_complete(tmp_path: Path) -> None:
    store = Hidden(tmp_path / "h", (4, 2, 3), torch.float32, 2)
    store.skip()
    assert store.complete
    store.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, _: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    store = Hidden(tmp_path / "h", (1, 2, 3), torch.float32, 1)
    monkeypatch.setattr(Path, "open", lambda *_: Full())
    with pytest.raises(TersorError, match=r"writing needs 24 bytes and the disk has \d+ free; free some space"):
        store.write(0, torch.zeros(1, 2, 3))


def test_saving_over_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(tmp_path)
    work.save("record.json", {"n": 1})

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", crash)
        with pytest.raises(KeyboardInterrupt):
            work.save("record.json", {"n": 2})
    assert work.load("record.json") == {"n": 1}
    work.save("record.json", {"n": 2})
    assert json.loads((work.folder / "record.json").read_text()) == {"n": 2}
