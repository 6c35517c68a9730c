"""Packed modules against plain ones that hold the decoded weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.contracts import Codec, Part, Shape
from tersor.errors import BadInput, ShapeMismatch, UnknownArchitecture
from tersor.runtime import packed as module_under_test
from tersor.runtime.packed import (
    TILE_BYTES,
    Packed,
    PackedEmbedding,
    PackedExperts,
    PackedLinear,
    TiedLinear,
    adopt,
)


class Bytes(Codec):
    """int8 codes with a float16 scale per row; remembers how many rows and weights it was asked for at a time."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.largest = 0

    def __str__(self) -> str:
        return "bytes"

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        if shape[1] % 4:
            raise ShapeMismatch(f"{shape[1]} inputs are not a multiple of 4")
        return (Part("codes", torch.int8, shape), Part("scale", torch.float16, (shape[0], 1)))

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        assert tensors["codes"].shape == shape
        assert tensors["scale"].shape == (shape[0], 1)
        self.rows.append(shape[0])
        self.largest = max(self.largest, 4 * shape[0] * shape[1])
        return tensors["codes"].to(torch.float32) * tensors["scale"].to(torch.float32)


def fill(packed: Packed, seed: int = 0) -> Tensor:
    """Random parts; returns the float32 weight that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    packed.part("codes").random_(-127, 128, generator=generator)
    packed.part("scale").uniform_(0.001, 0.02, generator=generator)
    return packed.part("codes").float() * packed.part("scale").float()


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 rows for all layers of up to 64 columns, so that several are needed."""
    monkeypatch.setattr(module_under_test, "TILE_BYTES", 8 * 4 * 8)


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 70), groups=st.integers(1, 9), batch=st.integers(0, 5), bias=st.booleans())
def test_linear_is_the_decoded_product(out: int, groups: int, batch: int, bias: bool) -> None:
    columns = 4 * groups
    linear = PackedLinear(Bytes(), (out, columns), bias=nn.Parameter(torch.randn(out)) if bias else None)
    weight = fill(linear)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test, "TILE_BYTES", 64)
        assert linear.tile_rows == 8
        x = torch.randn(batch, 3, columns)
        got = linear(x)
    assert got.shape == (batch, 3, out)
    torch.testing.assert_close(got, nn.functional.linear(x, weight, linear.bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_linear_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    linear = PackedLinear(Bytes(), (24, 16), bias=nn.Parameter(torch.randn(24)))
    weight = fill(linear)
    x = torch.randn(5, 16, dtype=dtype)
    got = linear(x)
    assert got.dtype == dtype
    assert torch.equal(got, nn.functional.linear(x, weight.to(dtype), linear.bias.to(dtype)))


def test_linear_follows_autocast() -> None:
    linear = PackedLinear(Bytes(), (24, 16), bias=nn.Parameter(torch.randn(24)))
    weight = fill(linear)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = linear(x), nn.functional.linear(x, weight, linear.bias)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_tiles_stay_below_the_bound_and_each_row_is_decoded_once() -> None:
    codec = Bytes()
    linear = PackedLinear(codec, (1000, 4096))
    fill(linear)
    linear(torch.randn(7, 4096))
    assert codec.largest <= TILE_BYTES
    assert sum(codec.rows) == 1000
    assert all(rows % 8 == 0 for rows in codec.rows[:-1])
    wide = PackedLinear(codec, (16, 4 * TILE_BYTES), device="meta")
    assert wide.tile_rows == 8


def test_gradients_pass_through_to_inputs_and_bias(small_tiles: None) -> None:
    linear = PackedLinear(Bytes(), (20, 8), bias=nn.Parameter(torch.randn(20)))
    weight = fill(linear)
    x = torch.randn(3, 8, requires_grad=True)
    linear(x).square().sum().backward()
    plain_x, plain_bias = x.detach().clone().requires_grad_(), linear.bias.detach().clone().requires_grad_()
    nn.functional.linear(plain_x, weight, plain_bias).square().sum().backward()
    torch.testing.assert_close(x.grad, plain_x.grad)
    torch.testing.assert_close(linear.bias.grad, plain_bias.grad)


def test_integer_inputs_are_refused() -> None:
    with pytest.raises(BadInput, match="floating-point"):
        PackedLinear(Bytes(), (8, 8))(torch.ones(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casting_changes_the_dtype_but_never_the_parts(cast) -> None:
    table = PackedEmbedding(Bytes(), (10, 8))
    weight = fill(table)
    before = {name: table.part(name).clone() for name in table.part_names}
    ids = torch.tensor([[1, 9], [0, 1]])
    model = cast(nn.Sequential(table))
    assert all(torch.equal(table.part(name), part) for name, part in before.items())
    assert all(table.part(name).dtype == part.dtype for name, part in before.items())
    assert table.dtype != torch.float32
    assert torch.equal(model(ids), weight[ids].to(table.dtype))


def test_state_dict_holds_the_parts_alone_and_loads_back() -> None:
    linear = PackedLinear(Bytes(), (8, 8))
    fill(linear)
    assert set(linear.state_dict()) == {"codes", "scale"}
    other = PackedLinear(Bytes(), (8, 8))
    other.load_state_dict(linear.state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(linear(x), other(x))


def test_a_part_may_be_called_weight() -> None:
    class Kept(Bytes):
        def parts(self, shape: Shape) -> tuple[Part, ...]:
            return (Part("weight", torch.bfloat16, shape),)

        def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
            return tensors["weight"].float()

    linear = PackedLinear(Kept(), (8, 4))
    linear.load_state_dict({"weight": torch.randn(8, 4).bfloat16()})
    x = torch.randn(2, 4)
    assert torch.equal(linear(x), x @ linear.state_dict()["weight"].float().T)
    assert linear.weight.dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.integers(0, 29), max_size=40))
def test_embedding_decodes_only_the_rows_asked(ids: list[int]) -> None:
    codec = Bytes()
    table = PackedEmbedding(codec, (30, 8), padding_idx=0)
    weight = fill(table)
    asked = torch.tensor(ids, dtype=torch.int64)
    assert torch.equal(table(asked), weight[asked])
    assert sum(codec.rows) == len(set(ids))


@pytest.mark.parametrize("wrong", [30, -1])
def test_an_id_outside_the_table_raises(wrong: int) -> None:
    table = PackedEmbedding(Bytes(), (30, 8))
    fill(table)
    with pytest.raises(IndexError):
        nn.functional.embedding(torch.tensor([wrong]), torch.zeros(30, 8))
    with pytest.raises(IndexError):
        table(torch.tensor([wrong]))


class Scaled(nn.Embedding):
    """As some models have it: the rows are scaled in the module's own forward."""

    def __init__(self, *size: int) -> None:
        super().__init__(*size)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Shifted(nn.Embedding):
    """As learned positions have it: the argument is not the ids, and the look-up is not by super()."""

    def forward(self, positions: Tensor) -> Tensor:
        return nn.functional.embedding(positions + 2, self.weight, self.padding_idx)


class ByHand(nn.Linear):
    """As one model family has it: the product is written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("plain", [nn.Embedding(20, 8), Scaled(20, 8), Shifted(20, 8), ByHand(8, 20), nn.Linear(8, 20)])
def test_adopted_modules_keep_their_own_forward(plain: nn.Module) -> None:
    packed = copy.deepcopy(plain)
    adopt(packed, Bytes())
    with torch.no_grad():
        plain.weight.copy_(fill(packed))
    x = torch.tensor([[3, 0], [7, 3]]) if isinstance(plain, nn.Embedding) else torch.randn(4, 8)
    assert isinstance(packed, type(plain))
    assert torch.equal(packed(x), plain(x))
    assert "weight" not in packed.state_dict()
    again = copy.deepcopy(packed)
    assert torch.equal(again(x), plain(x))
    again.release()
    assert type(again) is type(plain)
    assert torch.equal(again.weight, plain.weight)
    assert set(again.state_dict()) == set(plain.state_dict())
    assert torch.equal(again(x), plain(x))


class Stream(Codec):
    """All bytes of a layer in one part; counts how often it was decoded."""

    def __init__(self) -> None:
        self.decoded = 0

    def __str__(self) -> str:
        return "stream"

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        return (Part("stream", torch.int8, (shape[0] * shape[1],), shared=True),)

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        self.decoded += 1
        return tensors["stream"].reshape(shape).float()

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        return self.decode(tensors, shape)[rows]


def test_a_stream_is_decoded_once_for_all_that_follows(small_tiles: None) -> None:
    codec = Stream()
    plain = nn.Linear(8, 40)
    packed = copy.deepcopy(plain)
    adopt(packed, codec)
    assert isinstance(packed, PackedLinear)
    x = torch.randn(3, 8)
    for seed in (0, 1):  # what is loaded later counts
        packed.part("stream").random_(-9, 9, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            plain.weight.copy_(packed.part("stream").reshape(40, 8))
        for _ in range(2):
            assert torch.equal(packed(x), plain(x))
        assert codec.decoded == seed + 1
    assert set(packed.state_dict()) == {"stream", "bias"}
    half = packed.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert codec.decoded == 3
    half.release()
    assert half.weight.equal(plain.weight.bfloat16())


def test_what_cannot_be_packed_is_refused_and_left_alone() -> None:
    rewriting = nn.Embedding(20, 8, max_norm=1.0)
    with pytest.raises(UnknownArchitecture, match="max_norm"):
        adopt(rewriting, Bytes())
    odd = nn.Linear(6, 8)
    with pytest.raises(ShapeMismatch):
        adopt(odd, Bytes())
    for module in (rewriting, odd):
        assert isinstance(module.weight, nn.Parameter)
        assert not isinstance(module, Packed)


def test_the_stand_in_answers_what_models_ask_and_refuses_the_rest() -> None:
    linear = PackedLinear(Bytes(), (12, 8), dtype=torch.bfloat16)
    weight = linear.weight
    assert (weight.dtype, weight.device.type, weight.shape, weight.T.shape) == (torch.bfloat16, "cpu", (12, 8), (8, 12))
    assert (weight.size(), weight.size(1), weight.ndim, weight.numel()) == ((12, 8), 8, 2, 96)
    with pytest.raises(AttributeError, match="dequantize"):
        weight.data.add_(1)
    with pytest.raises(BadInput, match="dequantize"):
        torch.cat([torch.zeros(1, 8), weight])
    with pytest.raises(BadInput, match="dequantize"):
        torch.zeros(1, 12) @ weight
    with pytest.raises(AttributeError, match="cannot be set"):
        linear.weight = torch.zeros(12, 8)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_are_decoded_one_at_a_time(transposed: bool, small_tiles: None) -> None:
    codec = Bytes()
    experts = PackedExperts(codec, (12, 8), copies=3, transposed=transposed, dtype=torch.bfloat16)
    stacked = fill(experts).view(3, 12, 8).bfloat16()
    stacked = stacked.transpose(1, 2) if transposed else stacked
    assert experts.shape == stacked.shape
    for index in (0, 2, -1, torch.tensor(1), torch.tensor([2])):
        codec.rows.clear()
        assert torch.equal(experts[index], stacked[int(index)])
        assert sum(codec.rows) == 12
        assert codec.largest <= 8 * 4 * 8
    assert [torch.equal(one, plain) for one, plain in zip(experts, stacked, strict=True)] == [True] * 3


def test_experts_used_whole_say_what_to_do() -> None:
    experts = PackedExperts(Bytes(), (12, 8), copies=3)
    with pytest.raises(BadInput, match="eager"):
        torch.bmm(torch.zeros(3, 1, 12), experts)
    for index in (slice(0, 2), torch.tensor([0, 1]), (0, 1)):
        with pytest.raises(BadInput, match="eager"):
            experts[index]
    with pytest.raises(IndexError):
        experts[3]
    with pytest.raises(AttributeError, match="eager"):
        experts.transpose(1, 2)


def test_a_tied_layer_has_nothing_of_its_own() -> None:
    table = PackedEmbedding(Bytes(), (12, 8))
    weight = fill(table)
    model = nn.ModuleDict({"table": table, "head": TiedLinear(table, nn.Parameter(torch.randn(12)))})
    assert set(model.state_dict()) == {"table.codes", "table.scale", "head.bias"}
    x = torch.randn(3, 8)
    expected = nn.functional.linear(x, weight, model["head"].bias)
    assert torch.equal(model["head"](x), expected)
    twin = copy.deepcopy(model)
    assert twin["head"].source is twin["table"]
    table.part("codes").zero_()
    assert torch.equal(twin["head"](x), expected)
