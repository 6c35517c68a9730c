"""Recipes: within their bits on any shape, found by name, from a package and from a file."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.codecs import WeightSplit, parse
from tersor.contracts import Gram
from tersor.errors import BadInput
from tersor.recipes import Claim, NothingFits, Paper, Recipe, chosen, fullest, grouped, load_file, recipe, recipes
from tersor.recipes.registry import GROUP
from tersor.solvers import Encoder, Nearest
from tersor.survey.bench import SIDE, encode_layer

ALL = recipes()
WIDE = [(192, 576), (576, 1536), (96, 256)]


def correlated(columns: int) -> Gram:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * columns, columns, generator=generator) * torch.linspace(3, 0.1, columns)
    return Gram(x.T @ x / len(x), len(x))


def test_every_recipe_says_where_it_comes_from_and_how_it_differs():
    assert {"rtn", "gptq", "awq", "hqq", "quip", "finequant", "quantease", "squeezellm", "gwq", "decoupleq"} <= set(ALL)
    for one in ALL.values():
        assert one.paper.title
        assert one.differs.endswith(".")
        assert one.summary.endswith(".")


def test_every_claim_is_against_a_recipe_that_there_is():
    for one in ALL.values():
        for claim in one.claims:
            assert claim.baseline in ALL or ALL[one.name].needs, (one.name, claim.baseline)
            assert claim.baseline != one.name


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", WIDE)
def test_codecs_stay_within_their_bits(name: str, shape: tuple[int, int]):
    weights = shape[0] * shape[1]
    fits = 0
    for bits in (2 + SIDE, 3 + SIDE, 4 + SIDE, 8 + SIDE):
        try:
            codec = ALL[name].codec_for(bits, shape)
        except NothingFits:
            continue
        assert ALL[name].bits(codec, shape) <= bits * weights
        fits += 1
    assert fits


@settings(deadline=None, max_examples=30)
@given(bits=st.floats(0.6, 8.0), rows=st.integers(1, 300), columns=st.integers(1, 40).map(lambda n: 8 * n))
def test_no_number_of_bits_is_ever_exceeded(bits: float, rows: int, columns: int):
    for name in ("rtn", "gwq", "eora", "squeezellm", "finequant", "pb-llm", "binary"):
        try:
            codec = ALL[name].codec_for(bits, (rows, columns))
        except NothingFits:
            continue
        assert codec.bits((rows, columns)) <= bits * rows * columns + 1e-6


@pytest.mark.parametrize("name", ALL)
def test_recipes_encode_a_layer_in_what_they_promise(name: str):
    one, shape = ALL[name], (96, 192)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05
    gram = correlated(shape[1])
    if one.gradients:
        gram = replace(gram, gradients=torch.rand(shape, generator=torch.Generator().manual_seed(5)))
    for bits in (2.6, 4.6, 8.6):
        try:
            codec = one.codec_for(bits, shape)
        except NothingFits:
            continue
        used, values = encode_layer(one, weight, codec, gram, Encoder(one.solver()))
        assert used <= bits * weight.numel()
        # Of the outputs: where inputs hardly matter, least squares may leave more than there was.
        lost, whole = (float(((rows @ gram.matrix) * rows).sum()) for rows in (weight - values, weight))
        assert lost < 0.5 * whole
        assert torch.isfinite(values).all()
        return
    pytest.fail("fits at no number of bits")


def test_awq_scales_are_undone_exactly_and_help():
    shape = (64, 128)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    diagonal = torch.ones(128)
    diagonal[:4] = 400.0
    gram = Gram(torch.diag(diagonal), 1000)
    codec = parse("int3:g64:asym")
    one = ALL["awq"]
    assert one.prepare is not None
    prepared = one.prepare(weight, gram, codec)
    assert torch.allclose(prepared.restore(prepared.weight), weight, rtol=1e-6)
    assert prepared.gram is not None
    before, after = ((m @ g.matrix @ m.T).trace() for m, g in ((weight, gram), (prepared.weight, prepared.gram)))
    assert float(after) == pytest.approx(float(before), rel=1e-4)
    errors = []
    for scaled in (True, False):
        if scaled:
            values = encode_layer(one, weight, codec, gram, Encoder(Nearest()))[1]
        else:
            values = Encoder(Nearest())(weight, codec, gram)[1]
        errors.append(float(((weight - values).square() * diagonal).sum()))
    assert errors[0] < errors[1]


def test_partial_binarization_takes_all_salient_weights_that_fit():
    one, shape = ALL["pb-llm"], (576, 1536)
    codec = one.codec_for(2.25, shape)
    assert isinstance(codec, WeightSplit)
    assert (str(codec.salient), str(codec.rest)) == ("int8:row", "bin:row")
    more = codec.count(shape[1]) + 8  # a byte of signs less, eight of integers more
    assert parse(f"weights(int8:row,bin:row):{more / shape[1]:.6f}").bits(shape) > 2.25 * 576 * 1536
    assert str(one.codec_for(1.75, shape)).startswith("sum(sparse")


def test_fullest_names_what_it_tried():
    with pytest.raises(NothingFits, match=r"int4:row.*64 x 64.*3\.000"):
        fullest(["int4:row"], 3.0, (64, 64))
    assert grouped("int3:{}", 10) == ["int3:row"]


def make(name: str, **fields: object) -> Recipe:
    given = {"codec": lambda _bits, _shape: "int3:row", "solver": Nearest, "differs": "x."}
    return recipe(name=name, paper=Paper("x"), summary="x.", **{**given, **fields})


def test_recipes_that_need_a_missing_codec_do_not_exist(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tersor.recipes.registry._RECIPES", dict(ALL))
    make("needs-nothing")
    make("needs-magic", needs=("magic3:g64",))
    assert "needs-nothing" in recipes()
    assert "needs-magic" not in recipes()


def test_bad_recipes_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tersor.recipes.registry._RECIPES", dict(ALL))
    with pytest.raises(BadInput, match="two recipes called rtn"):
        make("rtn")
    with pytest.raises(BadInput, match="cannot be called"):
        make("a b")
    with pytest.raises(BadInput, match="must be calibrated"):
        make("c", calibrated=False, prepare=lambda *_: None)
    with pytest.raises(BadInput, match="at least one number of bits"):
        Claim("x", "rtn", ())
    with pytest.raises(NothingFits, match="more than the"):
        make("d", codec=lambda _bits, _shape: "int8:row").codec_for(3.0, (64, 64))


def test_installed_packages_add_recipes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tersor.recipes.registry._RECIPES", dict(ALL))
    entry = SimpleNamespace(value="outside.recipes", load=lambda: make("from-outside"))
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == GROUP else [])
    assert "from-outside" in recipes()
    assert "from-outside" in recipes()  # loaded once


def test_a_file_must_exist_and_add_something(tmp_path: Path):
    with pytest.raises(BadInput, match="does not exist"):
        load_file(tmp_path / "none.py")
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(BadInput, match="adds no recipe"):
        load_file(empty)
    with pytest.raises(BadInput, match="There is no recipe 'nothing-like-it'"):
        chosen(("nothing-like-it",))
