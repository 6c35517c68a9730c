"""Recipes of codes and their lengths: what each does with a layer."""

from __future__ import annotations

import pytest
import torch

from leaf_checks import correlated_gram, gaussian
from tersor.codecs import SmallFloat, parse
from tersor.recipes import NothingFits, recipes
from tersor.recipes.entropy import split_for
from tersor.solvers import Encoder
from tersor.statistics.generalized_gaussian import fit
from tersor.survey.bench import encode_layer

ALL = recipes()


def test_heavier_tails_get_more_exponent() -> None:
    codec = parse("fp8:e4m3:row")
    assert isinstance(codec, SmallFloat)
    splits = [split_for(tenths, codec) for tenths in (3, 5, 10, 20)]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] > splits[-1]
    assert ALL["rf8"].refine is not None
    heavy, light = (ALL["rf8"].refine(gaussian(64, 512) ** power, codec) for power in (9, 1))
    assert isinstance(heavy, SmallFloat)
    assert isinstance(light, SmallFloat)
    assert heavy.exponent > light.exponent
    assert ALL["rf8"].refine(torch.zeros(8, 512), codec) == codec


def test_the_fitted_split_loses_least_of_all() -> None:
    for power in (1, 3, 9):
        weight = gaussian(64, 512) ** power
        codec = parse("fp8:e4m3:row")
        assert ALL["rf8"].refine is not None
        fitted = ALL["rf8"].refine(weight, codec)
        losses = {
            text: float((weight - Encoder(ALL["rf8"].solver())(weight, parse(text), None)[1]).square().sum())
            for text in (f"fp8:e{e}m{7 - e}:row" for e in (2, 3, 4, 5))
        }
        assert losses[str(fitted)] <= 1.3 * min(losses.values())


def test_floats_need_eight_bits() -> None:
    for name in ("rf8", "e5m2"):
        with pytest.raises(NothingFits, match="8 bits"):
            ALL[name].codec_for(4.25, (64, 64))


def test_reshaping_keeps_order_and_signs_within_its_bound() -> None:
    weight, gram = gaussian(128, 96), correlated_gram(96)
    codec = ALL["deepshape"].codec_for(3.25, (128, 96))
    assert ALL["deepshape"].prepare is not None
    prepared = ALL["deepshape"].prepare(weight, gram, codec)
    moved = prepared.weight
    assert prepared.gram is None
    assert torch.equal(moved.sign(), weight.sign())
    order = weight.abs().flatten().argsort(stable=True)
    assert (moved.abs().flatten()[order].diff() >= -1e-5).all()
    assert fit(moved).shape < fit(weight).shape - 0.02
    change = moved - weight
    _, plain = encode_layer(ALL["coded-rtn"], weight, codec, gram, Encoder(ALL["coded-rtn"].solver()))
    lost, rounding = (float(((m @ gram.matrix) * m).sum()) for m in (change, weight - plain))
    assert 0 < lost < 0.2 * rounding
    assert torch.equal(prepared.restore(moved), moved)


def test_blocks_beat_one_scale_at_equal_bits() -> None:
    weight, gram = gaussian(128, 96) * torch.logspace(-1, 0, 96), correlated_gram(96)
    losses = {}
    for name in ("bct", "per-tensor"):
        one = ALL[name]
        codec = one.codec_for(4.25, (128, 96))
        assert 32 * weight.numel() / codec.bits((128, 96)) >= 7
        _, values = encode_layer(one, weight, codec, gram, Encoder(one.solver()))
        losses[name] = float((weight - values).square().sum())
    assert losses["bct"] < losses["per-tensor"]
