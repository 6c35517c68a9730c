"""What leaves are compared with: theory against published tables, and every leaf named is one that can be measured."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tersor.codecs import parse

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def gaussian(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gaussian

    return gaussian


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import leaf_references

    return leaf_references


def test_theory_is_that_of_published_tables(gaussian: ModuleType) -> None:
    # Max (1960), tables 1 and 2; entropy-coded ones from the frontier's own computation.
    for levels, mse in ((2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)):
        assert gaussian.lloyd_max(levels) == pytest.approx(mse, rel=1e-3)
    for bits, mse in ((1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)):
        assert gaussian.even(bits) == pytest.approx(mse, rel=1e-3)
    for rate, mse in ((1, 0.3483), (1.5, 0.1776), (2, 0.0889), (3, 0.02224), (4, 0.00556)):
        assert gaussian.entropy_coded(rate) == pytest.approx(mse, rel=1e-3)
    assert gaussian.planes(2) == pytest.approx(gaussian.lloyd_max(4), rel=1e-3)
    assert gaussian.greedy_planes(1) == pytest.approx(gaussian.lloyd_max(2), rel=1e-3)
    assert gaussian.space_filling(2, 1) == pytest.approx(2.7207 / 16, rel=1e-3)


def test_scales_of_groups_only_help(gaussian: ModuleType) -> None:
    levels = (-1.5, -0.5, 0.5, 1.5)
    errors = [gaussian.in_groups(levels, group) for group in (16, 64, 1024)]
    assert errors[0] < errors[1] < errors[2]
    assert errors[2] == pytest.approx(gaussian.even(2), rel=0.02)


def test_every_leaf_can_be_measured(references: ModuleType) -> None:
    assert len(set(references.TEXTS)) == len(references.TEXTS)
    for text in references.TEXTS:
        codec = parse(text)
        assert parse(str(codec)) == codec
        assert codec.accepts((768, 1152)) or codec.accepts((768, 1024)), text


def test_references_are_above_shannons_bound(references: ModuleType) -> None:
    for text in ("int3:row", "lut2:row", "bin2:row", "fdb:row", "trellis2:L12", "ectcq2:t64", "ectcq1:t8", "e8p:row"):
        known = references.reference(text)
        assert known is not None, text
        # At most half a bit for scales: what is left of a code's own rate.
        rate = parse(text).bits((768, 1152)) / (768 * 1152)
        assert (known.gap or 0) >= 0
        assert known.gap is not None or known.mse > 0.9 * 4.0**-rate, text
