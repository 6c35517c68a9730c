"""The compiled step against transformers: tokens, logits, what is refused and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_models
from tersor.codecs import parse
from tersor.errors import BadInput, NotFinite, UnknownArchitecture
from tersor.kernels import step
from tersor.runtime.decoding import Chooser, Decoder, linears, write_on
from tersor.runtime.packed import PackedLinear, adopt
from tersor.solvers import Encoder, Nearest

pytestmark = pytest.mark.skipif(not step.available, reason="products were not compiled")

PROMPT = [5, 60, 7, 8, 33, 10, 11]
TOKENS = 128
KNOWN = ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "olmo2", "stablelm")


def build(family: str, **options: object) -> Any:
    return tiny_models.build(family, max_position_embeddings=256, **options)  # type: ignore[arg-type]


def greedy(model: Any, prompt: list[int] = PROMPT, tokens: int = TOKENS) -> list[int]:
    """What transformers writes, token by token with a cache of its own."""
    given = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    output = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


def written(decoder: Decoder, prompt: list[int] = PROMPT, tokens: int = TOKENS) -> list[int]:
    return list(write_on(decoder, prompt, Chooser(), tokens=tokens, stops=()))


def logits_of(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def pack(model: Any, text: str) -> None:
    """All linear layers in place as ``text``, rounded to nearest; the head too where it has a weight of its own."""
    codec = parse(text)
    tied = model.get_input_embeddings().weight
    for module in [module for module in model.modules() if type(module) is nn.Linear and module.weight is not tied]:
        stored, _ = Encoder(Nearest())(module.weight.detach(), codec, None)
        adopt(module, codec)
        for name, tensor in stored.items():
            module.part(name).copy_(tensor)  # type: ignore[operator]


def unpack(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.release()
    return model


@pytest.mark.parametrize("family", KNOWN)
def test_tokens_are_those_of_transformers(family: str) -> None:
    model = build(family)
    decoder = Decoder.of(model, context=len(PROMPT) + TOKENS)
    assert written(decoder) == greedy(model)
    assert decoder.difference < 1e-4


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_angles_are_the_models_own(scaling: dict[str, Any]) -> None:
    model = build("llama", rope_parameters={"rope_theta": 10000.0, **scaling})
    assert written(Decoder.of(model, context=120), tokens=100) == greedy(model, tokens=100)


def test_a_part_of_a_head_may_be_rotated() -> None:
    model = build("phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert written(Decoder.of(model, context=80), tokens=60) == greedy(model, tokens=60)


def test_angles_that_depend_on_the_length_are_refused_where_they_do() -> None:
    scaling = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    model = tiny_models.build("llama", max_position_embeddings=32, rope_parameters=scaling)
    with pytest.raises(UnknownArchitecture, match="angles of positions are others in texts of 100 tokens"):
        Decoder.of(model, context=100)
    assert written(Decoder.of(model, context=30), tokens=20) == greedy(model, tokens=20)


@pytest.mark.parametrize("codec", ["int4:row", "int8:row", "rot(int4:row)"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
def test_packed_models_differ_by_rounding_alone(family: str, codec: str) -> None:
    """Where a token is another, the two likeliest must be closer than what rounding inputs to 16 bits has been seen to
    do to logits: 1e-2 of their standard deviation.
    """
    model, plain = build(family), build(family)
    pack(model, codec)
    pack(plain, codec)
    unpack(plain)
    decoder = Decoder.of(model, context=len(PROMPT) + TOKENS)
    mine = written(decoder)
    expected = logits_of(plain, [*PROMPT, *mine])[len(PROMPT) - 1 : -1]
    for token, row in zip(mine, expected, strict=True):
        assert float(row.max() - row[token]) <= 1e-2 * float(row.std())


def test_layers_without_a_product_are_run_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gemma2")
    lacking = {model.lm_head, model.model.layers[0].self_attn.k_proj, model.model.layers[1].mlp.down_proj}
    found = linears.compiled_product
    monkeypatch.setattr(
        "tersor.runtime.decoding.build.compiled_product", lambda linear: None if linear in lacking else found(linear)
    )
    decoder = Decoder.of(model, context=len(PROMPT) + TOKENS)
    assert sum(stretch.host is not None for stretch in decoder._step.stretches) == 3
    assert written(decoder) == greedy(model)
    assert decoder.timings(3)["products"] > 0


def test_logits_do_not_depend_on_how_a_text_is_fed() -> None:
    model = build("mistral")
    ids = torch.randint(0, 100, (90,), generator=torch.Generator().manual_seed(1)).tolist()
    decoder = Decoder.of(model, context=90)
    whole = decoder.feed(ids).clone()
    assert decoder.room == 0
    decoder.rewind()
    for token in ids:
        single = decoder.feed([token])
    assert torch.equal(single, whole)
    decoder.rewind(50)
    assert torch.equal(decoder.feed(ids[50:]), whole)
    torch.testing.assert_close(whole, logits_of(model, ids)[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits(dtype: torch.dtype) -> None:
    """Computed in float32: nearer to the model in float32 than the model itself is."""
    model = build("qwen2").to(dtype)
    decoder = Decoder.of(model, context=64)
    ids = list(range(3, 60))
    exact = logits_of(build("qwen2").to(dtype).float(), ids)[-1]
    torch.testing.assert_close(decoder.feed(ids), exact, rtol=1e-4, atol=1e-4)


def test_a_cache_of_halves() -> None:
    model = build("qwen3")
    decoder = Decoder.of(model, context=64, cache_dtype=torch.float16)
    exact = logits_of(model, list(range(60)))[-1]
    difference = (decoder.feed(list(range(60))) - exact).abs().max() / exact.std()
    assert 0 < float(difference) < 5e-3


@pytest.mark.parametrize("family", sorted(tiny_models.FAMILIES.keys() - set(KNOWN)))
def test_other_families_are_refused_with_a_reason(family: str) -> None:
    with pytest.raises(UnknownArchitecture) as refused:
        Decoder.of(tiny_models.build(family), context=32)
    assert len(str(refused.value)) > 20


def _spoil_scale(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda _m, _i, output: output * 1.05)


def _spoil_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) + 0.1)


def _spoil_parameter(model: Any) -> None:
    model.model.layers[0].mlp.gain = nn.Parameter(torch.ones(1))


def _spoil_norm(model: Any) -> None:
    norm = model.model.norm
    norm.forward = lambda x: x * norm.weight


def _spoil_hook(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _m, _i, output: output)


def _spoil_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = nn.Mish()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_spoil_scale, "standard deviations from its own"),
        (_spoil_forward, "standard deviations from its own"),
        (_spoil_parameter, r"holds model\.layers\.0\.mlp\.gain"),
        (_spoil_norm, "something else than a root mean square norm"),
        (_spoil_hook, "has hooks"),
        (_spoil_activation, r"activation of its MLP \(Mish\)"),
    ],
)
def test_what_is_not_as_it_seems_is_refused(spoil: Callable[[Any], None], reason: str) -> None:
    model = build("llama")
    spoil(model)
    with pytest.raises(UnknownArchitecture, match=reason):
        Decoder.of(model, context=64)


def test_the_model_is_left_as_it_was() -> None:
    model = build("gemma3")
    before = greedy(model, tokens=20)
    Decoder.of(model, context=64)
    assert not any("forward" in vars(module) for module in model.modules())
    assert greedy(model, tokens=20) == before


@pytest.mark.parametrize("text", [None, "int8:row"])
def test_weights_are_used_where_they_lie(text: str | None) -> None:
    """A change of a weight in place is seen, so there is no copy of it."""
    model = build("llama")
    if text:
        pack(model, text)
    decoder = Decoder.of(model, context=32)
    before = decoder.feed(PROMPT).clone()
    for layer in model.model.layers:
        for linear in (layer.self_attn.v_proj, layer.mlp.down_proj):
            (linear.part(linear.part_names[0]) if text else linear.weight.data).zero_()
    decoder.rewind()
    assert not torch.equal(decoder.feed(PROMPT), before)


def test_drawing_has_a_generator_of_its_own() -> None:
    decoder = Decoder.of(build("llama"), context=64)

    def draw(**options: Any) -> list[int]:
        decoder.rewind()
        return list(write_on(decoder, PROMPT, Chooser(**options), tokens=30, stops=()))

    state = torch.get_rng_state()
    first = draw(temperature=1.5, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(temperature=1.5, seed=3) == first != draw(temperature=1.5, seed=4)
    likeliest = draw()
    assert draw(temperature=5.0, top_k=1) == draw(temperature=5.0, top_p=1e-6) == likeliest


def test_chosen_tokens_are_distributed_as_they_should_be() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0])
    for options, kept in (({}, [0, 1, 2, 3, 4]), ({"top_k": 3}, [1, 2, 3]), ({"top_p": 0.6}, [2, 3])):
        choose = Chooser(temperature=2.0, seed=1, **options)  # type: ignore[arg-type]
        counts = torch.bincount(torch.tensor([choose(logits) for _ in range(4000)]), minlength=5) / 4000
        expected = torch.zeros(5)
        expected[kept] = (logits[kept] / 2).softmax(0)
        torch.testing.assert_close(counts, expected, rtol=0, atol=0.03)


def test_a_text_ends_at_a_stop_and_at_the_end_of_the_context() -> None:
    model = build("llama")
    expected = greedy(model, tokens=40)
    decoder = Decoder.of(model, context=len(PROMPT) + 20)
    stop = expected[9]
    assert list(write_on(decoder, PROMPT, Chooser(), tokens=40, stops={stop})) == expected[: expected.index(stop) + 1]
    decoder.rewind()
    # The last of these is chosen when the context is full, and not fed.
    assert written(decoder, tokens=40) == expected[:21]
    with pytest.raises(BadInput, match="has become 28 tokens long, and there is room for 27"):
        decoder.feed([1])
    with pytest.raises(ValueError, match="no tokens"):
        decoder.feed([])
    with pytest.raises(ValueError, match="cannot go back"):
        decoder.rewind(28)
    with pytest.raises(BadInput, match="context of 0"):
        Decoder.of(model, context=0)


def test_logits_that_are_no_numbers_are_told() -> None:
    with pytest.raises(NotFinite):
        Chooser()(torch.tensor([0.0, float("nan")]))
    model = build("llama")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(UnknownArchitecture, match="not finite"):
        Decoder.of(model, context=32)


@pytest.mark.parametrize("codec", ["int4:g32", "trellis2:L8"])
def test_threads_that_fetch_ahead_for_each_other_give_the_same_bits(codec: str) -> None:
    model = build("llama", hidden_size=192, intermediate_size=1280, num_attention_heads=4, num_key_value_heads=2)
    pack(model, codec)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            decoder = Decoder.of(model, context=64)
            found.append(torch.stack([decoder.feed([token]).clone() for token in PROMPT]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equally_likely_tokens_the_first_is_chosen(dtype: torch.dtype) -> None:
    logits = torch.tensor([-2.0, 1.5, 0.0, 1.5], dtype=dtype, requires_grad=True)
    assert Chooser()(logits) == 1
