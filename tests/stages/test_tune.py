"""Blocks tuned in a run: what is recorded of them, and that the model comes nearer to the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_runs
from tersor import api
from tersor.artifact import ArtifactWriter
from tersor.stages import encode
from tersor.stages.options import Budget, Options


@pytest.fixture
def compress(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[api.Result, dict[str, dict[str, Any]]]]:
    def run(family: str, *, tune: bool, candidates: tuple[str, ...]) -> tuple[api.Result, dict[str, dict[str, Any]]]:
        records: dict[str, dict[str, Any]] = {}
        model = tiny_runs.with_tokenizer(tiny(family), tmp_path / f"{family}-{tune}")
        text = tiny_runs.text(tmp_path / "text.txt")
        with pytest.MonkeyPatch.context() as patch:
            write = ArtifactWriter.write

            def kept(self: ArtifactWriter, unit: str, tensors: Any, *, record: Any = None) -> None:
                records[unit] = dict(record or {})
                write(self, unit, tensors, record=record)

            patch.setattr(ArtifactWriter, "write", kept)
            settings = {**tiny_runs.SETTINGS, "sequences": 24, "eval_sequences": 6}
            done = api.compress(
                model,
                tmp_path / f"{family}-{tune}-out",
                bpw=8.0,
                text=text,
                tune=tune,
                candidates=(*candidates, "bf16"),
                cache_dir=tmp_path / "cache",
                **settings,
            )
        return done, records

    return run


@pytest.mark.parametrize(
    ("family", "candidates"),
    [("llama", ("int2:g16",)), ("gpt2", ("int2:g16",)), ("qwen3moe", ("int2:row",)), ("llama", ("rot(int2:row)",))],
)
def test_tuned_blocks_are_nearer_to_the_originals(
    family: str,
    candidates: tuple[str, ...],
    compress: Callable[..., tuple[api.Result, dict[str, dict[str, Any]]]],
    monkeypatch: pytest.MonkeyPatch,
):
    # Experts of a tiny model trade tokens when their weights move far.
    monkeypatch.setattr(encode, "TUNING", replace(encode.TUNING, rate=0.005))
    tuned, records = compress(family, tune=True, candidates=candidates)
    plain, others = compress(family, tune=False, candidates=candidates)
    blocks = [record["tuned"] for record in records.values() if "tuned" in record]
    assert blocks
    assert all(after <= before for before, after in blocks)
    assert sum(after for _, after in blocks) < sum(before for before, _ in blocks)
    assert not any("tuned" in record for record in others.values())
    assert tuned.plan.file_bytes == plain.plan.file_bytes
    assert tuned.quality.kl != plain.quality.kl


def test_who_wants_the_best_gets_tuned_blocks():
    assert Options(Budget("bpw", 4.0), effort="best").tuned
    assert not Options(Budget("bpw", 4.0), effort="best", tune=False).tuned
    assert not Options(Budget("bpw", 4.0)).tuned
    assert Options(Budget("bpw", 4.0), tune=True).tuned
