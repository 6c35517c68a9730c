"""Entropy-coded trellis codecs: exact bytes, exact decoding, and the distortion that theory promises."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.artifact import decoder_numpy_ectcq as plain
from tersor.codecs import parse
from tersor.codecs.ectcq import EntropyCodedTrellis
from tersor.codecs.ectcq_leaf import TrellisGrid
from tersor.contracts import Gram, LeafCodec
from tersor.errors import BadInput, ShapeMismatch
from tersor.kernels import coded
from tersor.solvers import CoordinateDescent, Encoder, ErrorFeedback, Nearest
from tersor.solvers.sequential import sequential_round

NAMES = {torch.uint8: "U8", torch.float32: "F32"}


def correlated(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Gram]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(2, 0.05, columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    return weight, Gram(x.T @ x / len(x), len(x))


def distortion(error: Tensor, gram: Gram) -> float:
    return float(((error @ gram.matrix) * error).sum())


def check(codec: EntropyCodedTrellis, weight: Tensor, gram: Gram | None, encoder: Encoder) -> Tensor:
    """Encode, and compare everything that must agree; returns the values."""
    shape = (weight.shape[0], weight.shape[1])
    before = weight.clone()
    tensors, values = encoder(weight, codec, gram)
    assert torch.equal(weight, before)
    declared = {part.name: (part.dtype, part.shape) for part in codec.parts(shape)}
    assert declared == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert codec.bits(shape) == 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(codec.decode(tensors, shape), values)
    assert torch.equal(codec.decode_rows(tensors, shape, slice(1, 5)), values[1:5])
    assert plain.parts(str(codec), *shape) == {name: (NAMES[kind], size) for name, (kind, size) in declared.items()}
    assert re.fullmatch(plain.HEAD, str(codec).split(":")[0])
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert plain.decode(str(codec), arrays, *shape).tobytes() == values.numpy().tobytes()
    return values


@pytest.mark.parametrize("solver", [Nearest(), ErrorFeedback(), CoordinateDescent(sweeps=1)], ids=str)
@pytest.mark.parametrize("text", ["ectcq2", "ectcq0.75:t4", "ectcq3.333:t1", "ectcq6:t16", "ectcq8:t64"])
@pytest.mark.parametrize("shape", [(24, 96), (150, 131)])
def test_bits_and_round_trips(text: str, solver: object, shape: tuple[int, int]) -> None:
    codec = parse(text)
    assert isinstance(codec, EntropyCodedTrellis)
    if not codec.accepts(shape):
        pytest.skip("too small for the rate")
    weight, gram = correlated(*shape)
    weight[3] = 0
    gram.matrix[7] = 0
    gram.matrix[:, 7] = 0
    values = check(codec, weight, gram, Encoder(solver))  # type: ignore[arg-type]
    assert torch.isfinite(values).all()
    limit = 1.02 * 2.0 ** (-2 * (codec.milli / 1000 - 0.55)) if shape[0] < 128 else 1.0
    live = torch.arange(shape[1]) != 7
    if isinstance(solver, Nearest):
        assert (weight - values)[:, live].square().sum() < limit * weight.square().sum() * 12
    assert distortion(weight - values, gram) < limit * distortion(weight, gram)


@settings(max_examples=100, deadline=None)
@given(
    milli=st.integers(500, 8000),
    states=st.sampled_from([1, 4, 8, 16, 32, 64, 128, 256]),
    rows=st.integers(0, 3000),
    columns=st.integers(1, 3000),
)
def test_text_and_bits(milli: int, states: int, rows: int, columns: int) -> None:
    codec = EntropyCodedTrellis(max(milli, 900) if states == 1 else milli, states)
    milli = codec.milli
    assert parse(str(codec)) == codec
    assert hash(parse(str(codec))) == hash(codec)
    if not codec.accepts((rows, columns)):
        assert rows >= 128
        return
    bits = codec.bits((rows, columns))
    if rows >= 128:
        assert bits == milli * rows * columns // 8000 * 8
    shapes = {part.name: part.shape for part in codec.parts((rows, columns))}
    assert {name: shape for name, (_, shape) in plain.parts(str(codec), rows, columns).items()} == shapes


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 80),
    milli=st.sampled_from([600, 1500, 4000, 8000]),
    tails=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_odd_sizes(rows: int, columns: int, milli: int, tails: bool, seed: int) -> None:
    codec = EntropyCodedTrellis(milli)
    if not codec.accepts((rows, columns)):
        return
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values = check(codec, weight**5 if tails else weight, None, Encoder(Nearest()))
    assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    ("states", "rate", "gap"),
    [
        *((1, rate, 0.268) for rate in (0.9, 2.0, 4.0)),
        *((4, rate, 0.107) for rate in (0.75, 2.0, 4.0)),
        *((8, rate, 0.093) for rate in (0.75, 2.0, 4.0)),
        *((64, rate, 0.066) for rate in (0.75, 2.0, 4.0)),
        (8, 0.9, 0.115),
    ],
)
def test_gaussian_distortion(states: int, gap: float, rate: float) -> None:
    """Distance to Shannon's limit, all that is stored counted.

    Sequences without end have .254, .100, .076 and .047; here they are of 384, and begin in a fixed state.
    """
    codec = EntropyCodedTrellis(round(rate * 1000), states)
    weight = torch.randn(384, 768, generator=torch.Generator().manual_seed(1))
    tensors, values = Encoder(Nearest())(weight, codec, None)
    stream = 8 * len(tensors["stream"]) / weight.numel()
    loss = float((weight - values).square().mean())
    assert stream + 0.5 * math.log2(loss) < gap
    used = int(tensors["stream"].nonzero().max()) + 1
    assert used > 0.99 * len(tensors["stream"])


def test_error_feedback_beats_nearest_and_integers() -> None:
    weight, gram = correlated(256, 192, seed=3)
    codec = parse("ectcq3")
    fed = check(codec, weight, gram, Encoder(ErrorFeedback()))  # type: ignore[arg-type]
    near = check(codec, weight, gram, Encoder(Nearest()))  # type: ignore[arg-type]
    assert distortion(weight - fed, gram) < 0.8 * distortion(weight - near, gram)
    _, integers = Encoder(ErrorFeedback())(weight, parse("int3:g64"), gram)
    assert distortion(weight - fed, gram) < 0.5 * distortion(weight - integers, gram)


def test_without_compiled_kernels_the_bytes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = correlated(130, 72)
    compiled, _ = Encoder(ErrorFeedback())(weight, parse("ectcq4:t16"), gram)
    monkeypatch.setattr(coded, "_coded", None)
    plainly, values = Encoder(ErrorFeedback())(weight, parse("ectcq4:t16"), gram)
    assert all(torch.equal(compiled[name], plainly[name]) for name in compiled)
    assert torch.equal(parse("ectcq4:t16").decode(plainly, (130, 72)), values)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_distance_to_reverse_water_filling(spread: float) -> None:
    """Correlated inputs, at 3 bits: little above the least rate that any code needs for this distortion.

    ``spread``: how unlike the scales of inputs are (natural logarithm). Scalars with an ideal entropy code lose .255
    bits (arXiv:2603.04956); group integers more than .6.
    """
    generator = torch.Generator().manual_seed(0)
    size = 384
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
    matrix = basis * (torch.arange(1, size + 1).double() ** -0.5) @ basis.T
    scale = torch.exp(spread * torch.randn(size, generator=generator)).double()
    gram = Gram((scale[:, None] * matrix * scale).float(), 1000)
    weight = torch.randn(size, size, generator=generator)
    energy = torch.linalg.eigvalsh(gram.matrix.double())

    def excess(text: str) -> float:
        _, values = Encoder(ErrorFeedback(damping=1e-4))(weight, parse(text), gram)
        level = distortion(weight - values, gram) / weight.numel()
        low, high = 1e-12, float(energy.max())
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if float(energy.clamp(max=middle).mean()) < level else (low, middle)
        rate = float((0.5 * torch.log2(energy / low)).clamp(min=0).mean())
        return parse(text).bits((size, size)) / weight.numel() - rate

    assert excess("ectcq3") < (0.11 if spread == 0 else 0.185)
    assert excess("int3:g64") > 0.6


def test_zeros_cost_nothing_and_stay() -> None:
    for shape in ((16, 40), (160, 160)):
        assert not check(EntropyCodedTrellis(2000), torch.zeros(shape), None, Encoder(Nearest())).any()


def test_same_bytes_for_any_number_of_workers() -> None:
    weight, gram = correlated(600, 96)
    one, _ = Encoder(ErrorFeedback())(weight, parse("ectcq2"), gram)
    two, _ = Encoder(ErrorFeedback(), workers=2)(weight, parse("ectcq2"), gram)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("text", "says"),
    [("ectcq0.4", "0.5 to 8"), ("ectcq9", "0.5 to 8"), ("ectcq2:t7", "7 states"), ("ectcq2:g64", "write ectcq"),
     ("ectcq2:t8:t8", "write ectcq"), ("ectcq2(int4)", "write ectcq"), ("ectcq2.0001", "Unknown codec")],
)  # fmt: skip
def test_unreadable_texts_say_why(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse(text)


def test_layers_too_small_for_the_rate_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"128 x 2.*higher rate"):
        EntropyCodedTrellis(500).parts((128, 2))
    with pytest.raises(BadInput, match=r"without a trellis rates begin at 0\.9"):
        EntropyCodedTrellis(800, 1)


@pytest.mark.skipif(not coded.compiled, reason="nothing was compiled")
@pytest.mark.parametrize("states", [1, 8, 64])
@pytest.mark.parametrize("shape", [(1, 3), (33, 20), (300, 64)])
def test_columns_in_order_are_searched_at_once_with_the_same_bits(
    states: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = correlated(*shape)
    weight[0, 0] = math.inf  # as far as numbers go
    codec = TrellisGrid(states, -0.5, 24, 0.36)
    side = codec.prepare(correlated(*shape)[0])
    columns = torch.randperm(shape[1], generator=torch.Generator().manual_seed(1))
    mixing = (gram.matrix / gram.matrix.diagonal().max()).triu(1).contiguous()

    def searched() -> tuple[Tensor, Tensor]:
        given = {"reference": weight.nan_to_num(0.0), "mixing": mixing, "columns": columns, "in_features": shape[1]}
        return sequential_round(codec, side, weight.clone(), **given)  # type: ignore[arg-type]

    assert codec.round_all(weight, side, columns, weight, mixing) is not None
    at_once = searched()
    monkeypatch.setattr(TrellisGrid, "round_all", LeafCodec.round_all)
    step_by_step = searched()
    assert torch.equal(at_once[0], step_by_step[0])
    assert torch.equal(at_once[1], step_by_step[1])
