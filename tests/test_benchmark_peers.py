"""The comparison with other compressors: its table, and both ends of tersor's side of it, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tersor import pipeline

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_table

    return peer_table


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_budgets

    return peer_budgets


def quality(kl: float) -> dict[str, float]:
    return {"kl": kl, "kl_error": kl / 10, "perplexity": 20.0, "top1": 0.5}


def peer(title: str, size: int | None, bits: float, kl: float, outside: float | None = None) -> dict[str, object]:
    linears = quality(kl if outside is None else outside)
    row = {"title": title, "file_bytes": size, "bits_per_weight": bits, "quality": quality(kl)}
    return {**row, "quality_linears": linears, "seconds": 1.0, "cpu_seconds": 1.0, "version": "1"}


def own(size: int, bits: float, kl: float) -> dict[str, object]:
    return {
        "file_bytes": size,
        "bits_per_weight": bits,
        "quality": quality(kl),
        "seconds": 1.0,
        "cpu_seconds": 1.0,
    }


def test_ratios_are_against_the_best_peer_no_larger(table: ModuleType) -> None:
    peers = [
        peer("small", 100, 3.0, 0.4),
        peer("large and worse", 200, 4.0, 0.8),
        peer("rates only", None, 3.5, 0.2),
        {"title": "broken", "error": "it ended with 1"},
    ]
    found = table.summary(peers, [own(90, 2.9, 0.1), own(201, 4.1, 0.01)], [own(150, 3.4, 0.05)])
    files = {row["peer"]: row for row in found["files"]}
    assert set(files) == {"small", "large and worse"}
    assert files["small"]["ratio"] == pytest.approx(0.25)
    # The larger peer is no better than the smaller one, and our file for it is one byte too large.
    assert files["large and worse"]["best"] == "small"
    assert files["large and worse"]["ours_at"] == 90
    linears = {row["peer"]: row for row in found["linears"]}
    assert "ratio" not in linears["small"]
    assert linears["large and worse"]["best"] == "rates only"
    assert linears["large and worse"]["ratio"] == pytest.approx(0.25)


def test_the_table_shows_failures_and_what_was_not_run(table: ModuleType) -> None:
    rows = [peer("some", 100, 3.0, 0.4), {"title": "broken", "error": "it ended with 1"}]
    result = {"model": "m", "calibration": "c", "evaluation": "e", "rows": rows, "ours": []}
    result |= {"ours_linears": [], "preparation": {"seconds": 61.0}}
    shown = table.markdown({**result, **table.summary(rows, [], [])})
    assert "| broken | failed: it ended with 1 |" in shown
    assert "not run" in shown
    assert "61 s before it" in shown


def test_times_are_compared_as_a_whole_and_for_solving_alone(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    ours = {"bits": 4, "group": 64, "seconds": 50.0, "cpu_seconds": 80.0, "solving_seconds": 8.0}
    theirs = {"peer": "gptqmodel", "settings": {"bits": 4}, "version": "1"}
    times = {"seconds": 125.0, "cpu_seconds": 200.0, "solving_seconds": 60.0}
    slower = {**ours, "seconds": 62.5, "solving_seconds": 10.0}
    assert peers.speed([{**theirs, **times, "settings": {"bits": 3}}], ours, slower) is None
    found = peers.speed([{**theirs, **times}], ours, slower)
    assert (found["plain"]["seconds_ratio"], found["plain"]["solving_seconds_ratio"]) == (2.5, 7.5)
    assert (found["refitted"]["seconds_ratio"], found["refitted"]["cpu_seconds_ratio"]) == (2.0, 2.5)
    result = {"model": "m", "calibration": "c", "evaluation": "e", "rows": [], "ours": [], "ours_linears": []}
    result |= {"preparation": {"seconds": 1.0}, "speed": found}
    shown = table.markdown({**result, **table.summary([], [], [])})
    assert "| GPTQModel | 125 | 200 | 60.0 |" in shown
    assert "| tersor | 50 | 80 | 8.0 | 2.50 | 2.50 | 7.50 |" in shown
    assert "| tersor, scales refitted | 62 | 80 | 10.0 | 2.00 | 2.50 | 6.00 |" in shown


def test_every_size_is_asked_for_once_those_at_which_peers_get_better_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    rows = [peer("a", 100, 2.5, 0.9), peer("b", 100, 2.5, 0.5), peer("c", 150, 3.0, 0.6), peer("d", 200, 3.5, 0.1)]
    assert peers.budgets(rows, "file_bytes", "quality") == [100, 200, 150]


def test_budgets_are_kept_and_the_source_itself_loses_nothing(
    ours: ModuleType, small: Path, words: Path, tmp_path: Path
) -> None:
    with pipeline.one_thread_each():
        compressor = ours.prepare(small, words, tmp_path / "work", sequences=4, length=32, workers=1)
        ids = compressor.texts.calibration.ids[:3]
        judge = ours.Judge(compressor.context, ids, "words")
        same = judge(judge.original)
        assert same.kl == pytest.approx(0.0, abs=1e-6)
        assert same.top1 == 1.0

        plan = compressor.linears(4.6)
        row = compressor.encode(plan, judge)
        assert 4.0 < row["bits_per_weight"] <= 4.6
        outside = [layer.name for layer in compressor.context.anatomy.layers_of(None)]
        assert {plan.layers[name].codec for name in outside} == {"bf16"}
        assert row["quality"]["kl"] > same.kl
        for refit in (False, True):
            times = ours.feedback_speed(compressor, 4, 32, refit=refit)
            assert 0 < times["solving_seconds"] < times["seconds"]

        budget = plan.file_bytes
        sized = compressor.encode(compressor.sized(budget), judge)
        assert sized["file_bytes"] <= budget
        assert not list((tmp_path / "work").glob("artifact*"))


def test_linears_alone_leave_the_embedding_as_it_is(
    ours: ModuleType, small: Path, complete: Callable[..., Path], words: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    with pipeline.one_thread_each():
        compressor = ours.prepare(small, words, tmp_path / "work", sequences=4, length=32, workers=1)
        judge = ours.Judge(compressor.context, compressor.texts.calibration.ids[:2], "words")
        damaged = tmp_path / "damaged"
        damaged.mkdir()
        (damaged / "config.json").write_bytes((small / "config.json").read_bytes())
        tensors = load_file(small / "model.safetensors")
        noise = torch.Generator().manual_seed(0)
        for name in tensors:
            if "embed" in name or "lm_head" in name:
                tensors[name] = tensors[name] + torch.randn(tensors[name].shape, generator=noise)
        save_file(tensors, damaged / "model.safetensors")
        assert judge.folder(damaged, linears_only=True).kl == pytest.approx(0.0, abs=1e-6)
        assert judge.folder(damaged, linears_only=False).kl > 0.01


def test_other_windows_than_the_reference_saw_are_refused(ours: ModuleType) -> None:
    class Stream:
        head = head_module = close = None

    ids = torch.arange(12).reshape(3, 4)
    remembered = ours.Remembered(Stream(), ids, torch.zeros(3, 4, 2))
    assert remembered.embed(ids[2:3]).shape == (1, 4, 2)
    with pytest.raises(ValueError, match="not run"):
        remembered.embed(ids[:2] + 1)
