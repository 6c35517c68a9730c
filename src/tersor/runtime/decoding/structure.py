"""What a decoder's step consists of, found in a loaded model: by what its modules are, hold and do, not by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.errors import UnknownArchitecture
from tersor.runtime.packed import Packed, TiedLinear


@dataclass(frozen=True)
class Norm:
    """``weight``: what the normalised values are multiplied by, ``(n,)`` float32, an offset of the model's included."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool


@dataclass(frozen=True)
class Attention:
    """``inputs``: the linears of queries, keys and values, or one for all; ``rotates``: whether positions enter."""

    inputs: tuple[nn.Module, ...]
    output: nn.Module
    heads: int
    key_heads: int
    dim: int
    scale: float
    cap: float
    query_norm: Norm | None
    key_norm: Norm | None
    rotates: bool


@dataclass(frozen=True)
class GatedMlp:
    """``inputs``: the linears of gate and up, or one for both; ``width`` is that of either."""

    inputs: tuple[nn.Module, ...]
    output: nn.Module
    width: int
    activation: str


@dataclass(frozen=True)
class Layer:
    """Norms are None where there are none: before or after attention or MLP, always inside the residual branch."""

    attention: Attention
    mlp: GatedMlp
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None


@dataclass(frozen=True)
class Structure:
    """A decoder: embedding, layers, a norm and a head. ``base``: the module that runs all but the head."""

    base: nn.Module
    embedding: nn.Module
    blocks: tuple[nn.Module, ...]
    layers: tuple[Layer, ...]
    norm: Norm
    head: nn.Module
    width: int
    vocabulary: int
    logit_cap: float


MISUSE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, AssertionError)
"""What a model's own code raises where its configuration and its weights do not go together."""
_NORMS = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}


def find_structure(model: Any) -> Structure:
    """The structure of a causal language model of transformers, on the CPU. Raises UnknownArchitecture, saying why."""
    config = _config(model)
    base, embedding, head = (_part(model, name) for name in ("base_model", "input_embeddings", "output_embeddings"))
    if base is model or head is None:
        raise UnknownArchitecture(f"{type(model).__name__} has no head of its own")
    vocabulary, width = _shape(head)
    _check_embedding(embedding, vocabulary, width)
    blocks = _blocks(base, _count(config, "num_hidden_layers"))
    used: set[nn.Module] = {embedding, head}
    layers = tuple(_layer(block, config, width, used) for block in blocks)
    others = [module for module in base.children() if module is not embedding and list(module.parameters())]
    final = [module for module in others if not isinstance(module, nn.ModuleList)]
    if len(final) != 1:
        raise UnknownArchitecture(f"after its layers there are {len(final)} modules with weights, and not one norm")
    norm = _norm(final[0], used, width)
    _check_all_used(model, used)
    cap = _number(config, "final_logit_softcapping", 0.0)
    return Structure(base, embedding, tuple(blocks), layers, norm, head, width, vocabulary, cap)


def _config(model: Any) -> Any:
    text = getattr(getattr(model, "config", None), "get_text_config", None)
    config = text() if callable(text) else None
    if not callable(getattr(config, "to_dict", None)):
        raise UnknownArchitecture(f"{type(model).__name__} has no configuration as models of transformers have")
    return config


def _part(model: Any, name: str) -> Any:
    """A module that a model says it has, or None."""
    try:
        part = model.base_model if name == "base_model" else getattr(model, f"get_{name}")()
    except MISUSE as error:
        raise UnknownArchitecture(f"{type(model).__name__} does not say what its {name} are ({error})") from error
    if part is not None and not isinstance(part, nn.Module):
        raise UnknownArchitecture(f"the {name} of {type(model).__name__} are no module")
    return part


def _count(owner: Any, name: str, default: int | None = None) -> int:
    """A number of things that a configuration or a module has; ``default`` where it says nothing."""
    value = getattr(owner, name, None)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnknownArchitecture(f"{type(owner).__name__} says that its {name} is {value!r}, which is no such number")
    return value


def _number(owner: Any, name: str, default: float) -> float:
    """A number above 0 that is there, or ``default``."""
    value = getattr(owner, name, None)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UnknownArchitecture(f"{type(owner).__name__} says that its {name} is {value!r}, which is no such number")
    return float(value) or default


def _asked(module: Any, x: Tensor) -> Tensor:
    """What a model's own function of one tensor gives. Raises UnknownArchitecture where it gives none of this shape."""
    try:
        with torch.no_grad():
            given = module(x)
    except MISUSE as error:
        raise UnknownArchitecture(f"{type(module).__name__} cannot be run alone ({error})") from error
    if not isinstance(given, Tensor) or given.shape != x.shape:
        raise UnknownArchitecture(f"{type(module).__name__} does not give one number for each that it is given")
    return given.float()


def _check_embedding(module: Any, vocabulary: int, width: int) -> None:
    """It has a row for each token that the head knows, as wide as what the head takes."""
    if module is None:
        raise UnknownArchitecture("it has no embedding of tokens")
    try:
        with torch.no_grad():
            rows = module(torch.tensor([0, vocabulary - 1]))
    except MISUSE as error:
        raise UnknownArchitecture(
            f"its embedding does not have {vocabulary} tokens as its head does ({error})"
        ) from error
    if not isinstance(rows, Tensor) or rows.shape != (2, width):
        raise UnknownArchitecture(f"its embedding does not give what its head takes, {width} numbers a token")


def _blocks(base: nn.Module, count: int) -> list[nn.Module]:
    lists = [module for module in base.children() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(lists) != 1:
        raise UnknownArchitecture(f"it has {len(lists)} lists of {count} layers, and not one")
    return list(lists[0])


def _layer(block: nn.Module, config: Any, width: int, used: set[nn.Module]) -> Layer:
    parts = {name: module for name, module in block.named_children() if list(_weights(module))}
    norms = {name: _norm(parts.pop(name), used, width) for name in sorted(parts.keys() & _NORMS)}
    attention = [module for module in parts.values() if hasattr(module, "o_proj")]
    mlp = [module for module in parts.values() if hasattr(module, "down_proj")]
    if len(parts) != 2 or len(attention) != 1 or len(mlp) != 1:
        found = ", ".join(f"{name} ({type(parts[name]).__name__})" for name in sorted(parts))
        raise UnknownArchitecture(
            f"its layers hold {found}, which is not one attention and one gated MLP as we know them"
        )
    sandwich = "pre_feedforward_layernorm" in norms
    after_only = "input_layernorm" not in norms
    return Layer(
        _attention(attention[0], config, width, used),
        _mlp(mlp[0], width, used),
        before_attention=norms.get("input_layernorm"),
        after_attention=norms.get("post_attention_layernorm") if sandwich or after_only else None,
        before_mlp=norms.get("pre_feedforward_layernorm" if sandwich or after_only else "post_attention_layernorm"),
        after_mlp=norms.get("post_feedforward_layernorm"),
    )


def _attention(module: Any, config: Any, width: int, used: set[nn.Module]) -> Attention:
    names = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    inputs = tuple(_linear(module, name, used) for name in names)
    output = _linear(module, "o_proj", used)
    heads = _count(config, "num_attention_heads")
    dim = _count(module, "head_dim", _shape(output)[1] // heads)
    key_heads = _count(config, "num_key_value_heads", heads)
    if _shape(output) != (width, heads * dim):
        raise UnknownArchitecture(f"its attention does not give {heads} heads of {dim}")
    rows = [heads * dim, key_heads * dim, key_heads * dim]
    rows = [sum(rows)] if len(inputs) == 1 else rows
    if [_shape(linear) for linear in inputs] != [(count, width) for count in rows] or heads % key_heads:
        raise UnknownArchitecture(f"its attention does not take {heads} heads of queries and {key_heads} of keys")
    norms = [
        _norm(getattr(module, name), used) if isinstance(getattr(module, name, None), nn.Module) else None
        for name in ("q_norm", "k_norm")
    ]
    for norm, count in zip(norms, (heads, key_heads), strict=True):
        if norm is not None and len(norm.weight) not in (dim, count * dim):
            raise UnknownArchitecture("a norm of its queries or keys is neither as wide as a head nor as all of them")
    return Attention(
        inputs,
        output,
        heads,
        key_heads,
        dim,
        scale=_number(module, "scaling", dim**-0.5),
        cap=_number(module, "attn_logit_softcapping", 0.0),
        query_norm=norms[0],
        key_norm=norms[1],
        rotates=bool(getattr(module, "use_rope", True)),
    )


def _mlp(module: nn.Module, into: int, used: set[nn.Module]) -> GatedMlp:
    fused = hasattr(module, "gate_up_proj")
    inputs = tuple(_linear(module, name, used) for name in (("gate_up_proj",) if fused else ("gate_proj", "up_proj")))
    output = _linear(module, "down_proj", used)
    out, width = _shape(output)
    rows = 2 * width if fused else width
    if out != into or any(_shape(linear) != (rows, into) for linear in inputs):
        raise UnknownArchitecture("gate and up of its MLP are not as wide as what enters down")
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    return GatedMlp(inputs, output, width, _activation(act))


def _activation(function: Any) -> str:
    """Which of the known activations a function is, found by what it gives."""
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
    }
    x = torch.linspace(-6, 6, 97)
    if callable(function):
        given = _asked(function, x)
        for name, other in known.items():
            if torch.allclose(given, other(x), rtol=1e-6, atol=1e-6):
                return name
    raise UnknownArchitecture(f"the activation of its MLP ({type(function).__name__}) is not known")


def _linear(owner: Any, name: str, used: set[nn.Module]) -> nn.Module:
    module = getattr(owner, name, None)
    # A subclass may do anything in its forward; only what multiplies and adds a bias is taken.
    if not isinstance(module, nn.Linear) or not (
        isinstance(module, Packed) or type(module).forward is nn.Linear.forward
    ):
        raise UnknownArchitecture(f"{type(owner).__name__} has no linear layer {name}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnknownArchitecture(f"its {name} has hooks, which a step of ours would not call")
    _shape(module)
    used.add(module)
    return module


def _shape(linear: Any) -> tuple[int, int]:
    """``(out, in)`` of a linear layer, which its weight and bias have too."""
    out, into = _count(linear, "out_features"), _count(linear, "in_features")
    weight, bias = None if isinstance(linear, (Packed, TiedLinear)) else linear.weight, getattr(linear, "bias", None)
    for tensor, shape in ((weight, (out, into)), (bias, (out,))):
        if tensor is not None and (not isinstance(tensor, Tensor) or tensor.shape != shape):
            raise UnknownArchitecture(
                f"a linear layer of {into} inputs and {out} outputs holds something of another shape"
            )
        if tensor is not None and (tensor.device.type != "cpu" or not tensor.is_floating_point()):
            raise UnknownArchitecture("a linear layer holds something that is no floats on the CPU")
    return out, into


def _norm(module: Any, used: set[nn.Module], width: int | None = None) -> Norm:
    """A norm, recognised by what it does to two probes: one of the size of activations, one where eps counts.

    ``width``: what it must have, where only one will do.
    """
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = {name for name, _ in module.named_parameters()}
    bias = getattr(module, "bias", None)
    vectors = [tensor for tensor in (weight, bias) if tensor is not None]
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or not eps >= 0 or names - {"weight", "bias"}:
        raise UnknownArchitecture(f"{type(module).__name__} is not a norm that a step of ours can take")
    if not all(_is_vector(tensor, weight.shape) for tensor in vectors) or width not in (None, len(weight)):
        raise UnknownArchitecture(
            f"{type(module).__name__} does not hold what a norm of {width or 'heads'} numbers does"
        )
    gain = weight.detach().float()
    bias = None if bias is None else bias.detach().float().clone()
    centred = isinstance(module, nn.LayerNorm)
    options = [Norm(gain.clone(), bias, eps, centred)]
    if not centred:
        options.append(Norm(gain + 1, None, eps, False))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, len(gain), generator=generator) * torch.tensor([[1.0], [eps**0.5]])
    probe = probe.to(weight.dtype)
    given = _asked(module, probe)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for norm in options:
        expected = _normalised(probe.float(), norm)
        if torch.allclose(given, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            used.add(module)
            return norm
    raise UnknownArchitecture(f"{type(module).__name__} does something else than a root mean square norm")


def _is_vector(tensor: Any, shape: tuple[int, ...]) -> bool:
    floats = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.device.type == "cpu"
    return floats and tensor.ndim == 1 and len(tensor) > 0 and tensor.shape == shape


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    if norm.centred:
        return functional.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def _weights(module: nn.Module) -> Iterator[str]:
    """Names of everything that a module holds: parameters, and what packed modules have instead."""
    for path, part in module.named_modules():
        if isinstance(part, (Packed, TiedLinear)):
            yield path
    for name, _ in module.named_parameters():
        yield name


def _check_all_used(model: nn.Module, used: set[nn.Module]) -> None:
    """A step that leaves some weight out cannot be right; one whose norm is 1 would even pass a test."""
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if module not in used and (own or isinstance(module, (Packed, TiedLinear))):
            place = ".".join([path, *own[:1]])
            raise UnknownArchitecture(f"it holds {place}, of which a step of ours has no use")
        if any(tensor.device.type != "cpu" for tensor in module.parameters(recurse=False)):
            raise UnknownArchitecture("it is not on the CPU")
