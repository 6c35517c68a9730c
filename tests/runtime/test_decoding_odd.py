"""Models with something odd in their configuration or their modules: no decoder, a reason, and never another error."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tiny_models
from tersor.errors import UnknownArchitecture
from tersor.kernels import step
from tersor.runtime.decoding import Decoder

pytestmark = pytest.mark.skipif(not step.available, reason="products were not compiled")


def config(name: str, value: object) -> Callable[[Any], None]:
    return lambda model: vars(model.config).__setitem__(name, value)


def attention(name: str, value: object) -> Callable[[Any], None]:
    return lambda model: setattr(model.model.layers[1].self_attn, name, value)


def mlp(name: str, value: object) -> Callable[[Any], None]:
    return lambda model: setattr(model.model.layers[1].mlp, name, value)


def norm(name: str, value: object) -> Callable[[Any], None]:
    return lambda model: setattr(model.model.layers[1].input_layernorm, name, value)


def base(name: str, value: object) -> Callable[[Any], None]:
    return lambda model: setattr(model.model, name, value)


def itself(name: str, value: object) -> Callable[[Any], None]:
    return lambda model: setattr(model, name, value)


def linear(into: int, out: int, *, bias: int | None = None) -> nn.Linear:
    made = nn.Linear(into, out, bias=False)
    if bias is not None:
        made.bias = nn.Parameter(torch.zeros(bias))
    return made


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_args: object, **_options: object) -> Any:
        raise error

    return fail


class Given(nn.Module):
    """A module that gives what it is told to, and holds nothing."""

    def __init__(self, give: Callable[..., Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.give(*args, **options)


def angles(*shape: int) -> Given:
    return Given(lambda *_args, **_options: (torch.ones(shape), torch.zeros(shape)))


def whole(model: Any) -> None:
    """A weight in whole numbers."""
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.ones(48, 32, dtype=torch.int32), requires_grad=False)


def nowhere(model: Any) -> None:
    model.model.layers[1].input_layernorm.to("meta")


def nowhere_linear(model: Any) -> None:
    model.model.layers[1].mlp.down_proj.to("meta")


def one_value(model: Any) -> None:
    """Keys of 24 and values of 8 rows: together as many as they should be."""
    model.model.layers[1].self_attn.k_proj = linear(32, 24)
    model.model.layers[1].self_attn.v_proj = linear(32, 8)


def one_gate(model: Any) -> None:
    model.model.layers[1].mlp.gate_proj = linear(32, 47)
    model.model.layers[1].mlp.up_proj = linear(32, 49)


def no_configuration(model: Any) -> None:
    model.config = SimpleNamespace()


def bare_configuration(model: Any) -> None:
    model.config = SimpleNamespace(get_text_config=SimpleNamespace)


@pytest.mark.parametrize(
    "spoil",
    [
        no_configuration,
        bare_configuration,
        *(config("num_hidden_layers", value) for value in (None, "3", 0, -1, 2, True)),
        *(config("num_attention_heads", value) for value in (None, "4", 0, -4, 3, 4.0, [4, 4, 4])),
        *(config("num_key_value_heads", value) for value in ("2", -2, 3, 4, [2, 2, 2])),
        *(config("final_logit_softcapping", value) for value in ("30", -30.0, float("nan"), [30.0])),
        *(attention("head_dim", value) for value in (0, -8, 7, 8.0, "8")),
        *(attention("scaling", value) for value in ("x", float("nan"), float("inf"), -1.0, torch.ones(2))),
        *(attention("attn_logit_softcapping", value) for value in ("x", -1.0, float("nan"))),
        attention("q_proj", linear(32, 31)),
        attention("q_proj", linear(31, 32)),
        attention("q_proj", linear(32, 32, bias=31)),
        attention("q_proj", nn.Identity()),
        attention("q_proj", None),
        attention("o_proj", linear(32, 31)),
        attention("o_proj", linear(31, 32)),
        attention("q_norm", nn.LayerNorm(5)),
        one_value,
        one_gate,
        whole,
        nowhere,
        nowhere_linear,
        mlp("down_proj", linear(48, 31)),
        mlp("down_proj", linear(47, 32)),
        mlp("act_fn", None),
        mlp("act_fn", Given(failing(KeyError("nothing")))),
        mlp("act_fn", Given(lambda x: x[:1])),
        mlp("act_fn", Given(lambda x: (x,))),
        *(norm("variance_epsilon", value) for value in (None, "1e-6", -1.0, float("nan"))),
        norm("weight", nn.Parameter(torch.ones(31))),
        norm("weight", nn.Parameter(torch.ones(0))),
        norm("weight", nn.Parameter(torch.ones(1))),
        norm("weight", nn.Parameter(torch.ones(32, dtype=torch.int32), requires_grad=False)),
        norm("forward", failing(AttributeError("nothing"))),
        norm("forward", lambda x: (x, x)),
        norm("forward", lambda x: x[0]),
        base("norm", nn.LayerNorm(31)),
        base("layers", nn.ModuleList()),
        base("embed_tokens", nn.Embedding(100, 31)),
        base("embed_tokens", nn.Embedding(50, 32)),
        base("embed_tokens", Given(failing(RuntimeError("nothing")))),
        base("embed_tokens", Given(lambda ids: ids)),
        base("rotary_emb", Given(failing(KeyError("an unknown rope type")))),
        base("rotary_emb", Given(failing(ZeroDivisionError("a factor of 0")))),
        base("rotary_emb", Given(lambda *_args, **_options: None)),
        base("rotary_emb", angles(1, 1, 8)),
        base("rotary_emb", angles(1, 64, 7)),
        base("rotary_emb", angles(1, 64, 16)),
        base("rotary_emb", angles(64, 8)),
        base("rotary_emb", angles(2, 64, 8)),
        itself("lm_head", linear(31, 100)),
        itself("lm_head", nn.Identity()),
        itself("lm_head", None),
        itself("base_model_prefix", ""),
        itself("get_output_embeddings", failing(NotImplementedError("nothing"))),
        itself("get_input_embeddings", failing(NotImplementedError("nothing"))),
        itself("get_input_embeddings", lambda: None),
        itself("get_output_embeddings", lambda: torch.ones(3)),
    ],
)
def test_no_decoder_and_a_reason(spoil: Callable[[Any], None]) -> None:
    model = tiny_models.build("llama")
    spoil(model)
    with pytest.raises(UnknownArchitecture) as refused:
        Decoder.of(model, context=64)
    assert len(str(refused.value)) > 20


@pytest.mark.parametrize(
    "change",
    [
        config("num_key_value_heads", 2),
        config("final_logit_softcapping", None),
        config("final_logit_softcapping", 0),
        config("sliding_window", "wide"),
        config("a_window", True),
        attention("scaling", None),
        attention("attn_logit_softcapping", 0.0),
    ],
)
def test_what_is_odd_and_harmless_is_taken(change: Callable[[Any], None]) -> None:
    model = tiny_models.build("llama")
    change(model)
    assert Decoder.of(model, context=64).difference < 1e-3


def test_weights_may_lie_in_any_order() -> None:
    model = tiny_models.build("llama")
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        weight.data = weight.data.t().contiguous().t()
    assert Decoder.of(model, context=64).difference < 1e-3
