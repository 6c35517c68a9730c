"""What a run is said to cost: never less than the parts that are known, fewer workers where memory is short."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from tersor.anatomy import analyse, open_source, skeleton
from tersor.contracts import Anatomy
from tersor.errors import BadInput
from tersor.stages.estimate import (
    check_disk,
    choose_workers,
    chunk_sequences,
    disk_bytes,
    estimate,
    peak_memory,
)
from tersor.stages.options import Budget, Options

OPTIONS = Options(Budget("bpw", 4.0))


@pytest.fixture(scope="module")
def anatomy(small: Path) -> Anatomy:
    source = open_source(small)
    return analyse(source, skeleton(source))


def test_chunks_hold_about_a_thousand_tokens_whatever_the_machine() -> None:
    assert [chunk_sequences(length) for length in (8, 256, 1024, 2048)] == [128, 4, 1, 1]


def test_memory_grows_with_workers_and_choose_workers_keeps_the_cap(anatomy: Anatomy) -> None:
    need = [peak_memory(anatomy, OPTIONS, workers) for workers in range(1, 9)]
    assert need == sorted(need)
    assert need[0] < need[-1]
    assert choose_workers(anatomy, OPTIONS, 8) == 8
    assert choose_workers(anatomy, replace(OPTIONS, workers=3), 8) == 3
    for workers, enough in enumerate(need, 1):
        chosen = choose_workers(anatomy, replace(OPTIONS, max_memory=enough), 8)
        assert chosen >= workers
        assert need[chosen - 1] <= enough


def test_a_cap_below_one_worker_names_what_would_do(anatomy: Anatomy) -> None:
    least = peak_memory(anatomy, OPTIONS, 1)
    with pytest.raises(BadInput, match=f"need about {least:,} bytes with one worker"):
        choose_workers(anatomy, replace(OPTIONS, max_memory=least - 1), 8)


def test_an_estimate_counts_the_file_and_what_is_kept_between_blocks(anatomy: Anatomy) -> None:
    found = estimate(anatomy, OPTIONS, 2, 40_000)
    assert found.memory == peak_memory(anatomy, OPTIONS, 2)
    assert found.disk == disk_bytes(anatomy, OPTIONS, 40_000)
    # Hidden states of 64 sequences of 256 tokens before and after a block, 64 wide, in two bytes.
    assert found.disk > 40_000 + 2 * 64 * 256 * 64 * 2
    assert found.seconds is not None
    assert 0 < found.seconds < 600
    few, more = (estimate(anatomy, replace(OPTIONS, sequences=count), 2, 40_000) for count in (16, 6400))
    assert more.disk - found.disk == 2 * (6400 - 64) * 256 * 64 * 2
    # The backward pass keeps the states of both blocks, and gradients, for at most 8,192 tokens.
    assert found.disk - few.disk == 2 * (64 - 16) * 256 * 64 * 2 + (8192 - 16 * 256) * 64 * (2 * 2 + 8)


def test_a_disk_with_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 100_000))
    partial = tmp_path / "out.partial"
    check_disk(partial, 100_000)
    with pytest.raises(BadInput, match="needs about 100,001 bytes"):
        check_disk(partial, 100_001)
    # What an interrupted run holds already need not be free.
    (partial / "deep").mkdir(parents=True)
    (partial / "deep" / "file").write_bytes(bytes(50_000))
    check_disk(partial, 140_000)
