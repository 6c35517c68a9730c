"""Packed modules that multiply by compiled products: when they do, and that all else stays what it was."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tersor.codecs import parse
from tersor.contracts import Codec, LeafCodec
from tersor.kernels import products
from tersor.runtime import products as runtime_products
from tersor.runtime.packed import Packed, PackedEmbedding, PackedLinear, TiedLinear, adopt
from tersor.runtime.products import decoded_only, input_bits
from tersor.solvers import Encoder, Nearest

pytestmark = pytest.mark.skipif(not products.available, reason="nothing was compiled")
OUT, IN = 40, 96


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of tokens that compiled products were asked for."""
    asked: list[int] = []
    multiply = products.multiply

    def noted(product: Any, x: Tensor, **options: Any) -> Tensor:
        asked.append(len(x))
        return multiply(product, x, **options)

    monkeypatch.setattr(products, "multiply", noted)
    return asked


def stored(codec: Codec, weight: Tensor) -> dict[str, Tensor]:
    codec = codec.learn(weight, None) if isinstance(codec, LeafCodec) else codec
    return Encoder(Nearest())(weight, codec, None)[0]


def linear(text: str = "rot(int4:g32)", *, bias: bool = True, seed: int = 0) -> PackedLinear:
    torch.manual_seed(seed)
    module = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    weight = module.weight.detach().clone()
    adopt(module, parse(text))
    module.load_state_dict(stored(parse(text), weight), strict=False)
    assert isinstance(module, PackedLinear)
    return module


def plain(packed: PackedLinear) -> nn.Linear:
    result = copy.deepcopy(packed)
    result.release()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("text", ["int4:g32", "rot(int3:row)", "trellis2:L8", "bf16", "coded(int4:row):3.5"])
def test_a_linear_layer_uses_its_product(text: str, bias: bool, dtype: torch.dtype, used: list[int]) -> None:
    packed = linear(text, bias=bias)
    x = torch.randn(2, 3, IN).to(dtype)
    wanted = plain(packed)(x.float())
    got = packed(x)
    assert (got.dtype, got.shape) == (dtype, (2, 3, OUT))
    assert used == [6]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), wanted, rtol=eps, atol=2e-4)
    with decoded_only():
        torch.testing.assert_close(packed(x.float()), wanted)
    assert used == [6]


def test_inputs_are_rounded_to_eight_bits_on_request(used: list[int]) -> None:
    packed = linear("int4:g32")
    x = torch.randn(4, IN)
    wanted, fine = plain(packed)(x), packed(x)
    with input_bits(8):
        coarse = packed(x)
    assert torch.equal(packed(x), fine)
    assert used == [4, 4, 4]
    off = (coarse - wanted).norm() / wanted.norm()
    assert 10 * (fine - wanted).norm() / wanted.norm() < off < 0.02


def test_inputs_that_are_not_contiguous(used: list[int]) -> None:
    packed = linear()
    x = torch.randn(IN, 7, 2).permute(2, 1, 0)[:, ::2]
    torch.testing.assert_close(packed(x), plain(packed)(x), rtol=0, atol=2e-4)
    turned = torch.randn(3, 2 * IN)[:, ::2]
    torch.testing.assert_close(packed(turned), plain(packed)(turned), rtol=0, atol=2e-4)
    assert used == [8, 3]
    assert packed(torch.zeros(0, IN)).shape == (0, OUT)


def test_gradients_and_doubles_are_computed_from_decoded_weights(used: list[int]) -> None:
    packed = linear()
    weight = plain(packed).weight
    x = torch.randn(3, IN, requires_grad=True)
    y = packed(x)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, packed.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))
    double = torch.randn(3, IN, dtype=torch.float64)
    wanted = nn.functional.linear(double, weight.double(), packed.bias.double())
    torch.testing.assert_close(packed(double), wanted)
    assert used == []
    with torch.no_grad():
        packed(x)
    with torch.inference_mode():
        packed(x)
    assert used == [3, 3]


@pytest.mark.filterwarnings("ignore")
def test_what_is_traced_does_not_depend_on_the_inputs_it_was_traced_with(used: list[int]) -> None:
    packed = linear("int4:g32")
    with torch.no_grad():
        traced = torch.jit.trace(packed, torch.zeros(2, IN), check_trace=False)
        x = torch.randn(2, IN)
        torch.testing.assert_close(traced(x), plain(packed)(x))
    assert used == []


@pytest.mark.parametrize("quick", [True, False])
def test_many_tokens_in_bfloat16_are_left_to_torch_where_it_is_faster(
    quick: bool, monkeypatch: pytest.MonkeyPatch, used: list[int]
) -> None:
    monkeypatch.setattr(runtime_products.held, "_multiplies_bfloat16", lambda: quick)
    for text, limit in (("bf16", 48), ("int4:g32", 256), ("lut3:row", 256), ("rot(int4:g32)", None)):
        packed = linear(text)
        for tokens in (47, 48, 255, 256, 300):
            used.clear()
            packed(torch.randn(tokens, IN).bfloat16())
            by_product = not quick or limit is None or tokens < limit
            assert used == ([tokens] if by_product else [])
            packed(torch.randn(tokens, IN))
            assert used[-1:] == [tokens]


def test_other_stored_tensors_make_another_product(used: list[int]) -> None:
    """Whether they are written in place, replaced, or moved; the same ones keep theirs."""
    for text in ("int4:g32", "ternary:g32"):  # used where it lies; kept in another form
        packed, other = linear(text), linear(text, seed=1)
        x = torch.randn(2, IN)
        packed(x)
        first = packed.product()
        assert packed.product() is first
        packed.load_state_dict(other.state_dict())
        assert torch.equal(packed(x), other(x))
        assert packed.product() is not first
        packed.load_state_dict(linear(text, seed=2).state_dict(), assign=True)
        assert torch.equal(packed(x), linear(text, seed=2)(x))
        packed.to("meta")
        assert packed.product() is None
    assert len(used) == 10


def test_copies_have_products_of_their_own() -> None:
    packed = linear()
    x = torch.randn(2, IN)
    before = packed(x)
    twin = copy.deepcopy(packed)
    assert twin.handle != packed.handle
    packed.part("r_codes").zero_()
    assert torch.equal(twin(x), before)
    assert not torch.equal(packed(x), before)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), before)
    assert again.handle not in (packed.handle, twin.handle)


def test_what_is_saved_does_not_change_by_running() -> None:
    for text in ("rot(int4:g32)", "ternary:g32", "bin2:g32", "coded(int4:row):3.5", "mxfp4:e2m1:g32"):
        packed = linear(text)
        before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
        packed(torch.randn(3, IN))
        after = packed.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        released = plain(packed)
        assert set(released.state_dict()) == {"weight", "bias"}
        assert not hasattr(released, "handle")


def test_without_compiled_products_everything_works(monkeypatch: pytest.MonkeyPatch, used: list[int]) -> None:
    monkeypatch.setattr(products, "available", False)
    packed = linear()
    x = torch.randn(4, IN)
    torch.testing.assert_close(packed(x), plain(packed)(x))
    assert packed.product() is None
    assert used == []


MISSING = """
import sys
sys.modules["tersor.kernels._products"] = None
import torch
from torch import nn
from tersor.codecs import parse
from tersor.kernels import products
from tersor.runtime.packed import adopt
module = nn.Linear(32, 8).requires_grad_(False)
adopt(module, parse("bf16"))
module.load_state_dict({"weight": torch.ones(8, 32, dtype=torch.bfloat16), "bias": torch.zeros(8)})
assert not products.available
for tokens in (1, 300):
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(module(torch.ones(tokens, 32, dtype=dtype)), torch.full((tokens, 8), 32.0, dtype=dtype))
"""


def test_where_nothing_was_compiled_all_is_decoded() -> None:
    subprocess.run([sys.executable, "-c", MISSING], check=True)


def test_a_codec_without_a_product_is_decoded(used: list[int]) -> None:
    packed = linear("fp4:e2m1:g6")  # no multiple of 4 columns
    x = torch.randn(4, IN)
    torch.testing.assert_close(packed(x), plain(packed)(x))
    assert used == []


def tiny(text: str, **options: Any) -> Any:
    """A small Llama whose linear layers and embedding are packed, with a tied head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=True, attention_bias=True, **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Embedding)) and path != "lm_head":
            weight = module.weight.detach().clone()
            adopt(module, parse(text))
            module.load_state_dict(stored(parse(text), weight), strict=False)
    model.lm_head = TiedLinear(model.model.embed_tokens)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_compiles_a_packed_model_in_one_graph(used: list[int]) -> None:
    model = tiny("int4:row")
    ids = torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        eager = len(used)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = compiled(input_ids=ids, use_cache=False).logits
    assert eager == 15
    assert len(used) == 2 * eager
    torch.testing.assert_close(got, wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_pass_through_a_compiled_layer() -> None:
    packed = linear()
    packed.bias.requires_grad_(True)
    weight = plain(packed).weight
    x = torch.randn(2, 3, IN, requires_grad=True)
    torch.compile(packed, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    other, bias = x.detach().clone().requires_grad_(), packed.bias.detach().clone().requires_grad_()
    nn.functional.linear(other, weight, bias).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(packed.bias.grad, bias.grad, rtol=1e-3, atol=1e-3)


def test_operators_are_what_torch_expects() -> None:
    packed = linear()
    bias = packed.bias.detach().clone().requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, IN).to(dtype)
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(
            torch.ops.tersor.packed_linear, (x, bias.detach().to(dtype), packed.handle), test_utils=checks
        )
        torch.library.opcheck(torch.ops.tersor.packed_linear, (x, None, packed.handle), test_utils=checks)
    model = tiny("int4:row")
    table = model.model.embed_tokens
    assert isinstance(table, Packed)
    torch.library.opcheck(torch.ops.tersor.packed_rows, (torch.tensor([[1, 2], [63, 0]]), table.handle))


def test_a_model_generates_the_same_tokens_with_and_without() -> None:
    model = tiny("int8:row")
    ids = torch.randint(64, (1, 4), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    fast = model.generate(ids, **options)
    with decoded_only():
        slow = model.generate(ids, **options)
    assert torch.equal(fast, slow)
    assert runtime_products.held._Switch.on


@pytest.mark.parametrize("text", ["q4_0", "ternary:row", "bin2:row"])
def test_a_few_rows_do_not_repack_a_table(text: str) -> None:
    table = PackedEmbedding(parse(text), (64, 256))
    table._buffers.update({name: torch.zeros_like(table.part(name)) for name in table.part_names})
    assert table(torch.tensor([3, 5])).shape == (2, 256)
    assert table._product._product is None
