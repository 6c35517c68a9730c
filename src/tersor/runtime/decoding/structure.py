"""What a decoder's step consists of, found in a loaded model: by what its modules are, hold and do, not by its name."""

from __future__ import annotations

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


_NORMS = {"input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}


def find_structure(model: Any) -> Structure:
    """The structure of a causal language model of transformers, on the CPU. Raises UnknownArchitecture, saying why."""
    config = model.config.get_text_config()
    base, embedding, head = model.base_model, model.get_input_embeddings(), model.get_output_embeddings()
    if base is model or head is None:
        raise UnknownArchitecture(f"{type(model).__name__} has no head of its own")
    blocks = _blocks(base, config.num_hidden_layers)
    used: set[nn.Module] = {embedding, head}
    layers = tuple(_layer(block, config, used) for block in blocks)
    others = [module for module in base.children() if module is not embedding and list(module.parameters())]
    final = [module for module in others if not isinstance(module, nn.ModuleList)]
    if len(final) != 1:
        raise UnknownArchitecture(f"after its layers there are {len(final)} modules with weights, and not one norm")
    norm = _norm(final[0], used)
    _check_all_used(model, used)
    vocabulary, width = _shape(head)
    cap = getattr(config, "final_logit_softcapping", None)
    return Structure(base, embedding, tuple(blocks), layers, norm, head, width, vocabulary, float(cap or 0.0))


def _blocks(base: nn.Module, count: int) -> list[nn.Module]:
    lists = [module for module in base.children() if isinstance(module, nn.ModuleList) and len(module) == count]
    if len(lists) != 1:
        raise UnknownArchitecture(f"it has {len(lists)} lists of {count} layers, and not one")
    return list(lists[0])


def _layer(block: nn.Module, config: Any, used: set[nn.Module]) -> Layer:
    parts = {name: module for name, module in block.named_children() if list(_weights(module))}
    norms = {name: _norm(parts.pop(name), used) for name in sorted(parts.keys() & _NORMS)}
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
        _attention(attention[0], config, used),
        _mlp(mlp[0], used),
        before_attention=norms.get("input_layernorm"),
        after_attention=norms.get("post_attention_layernorm") if sandwich or after_only else None,
        before_mlp=norms.get("pre_feedforward_layernorm" if sandwich or after_only else "post_attention_layernorm"),
        after_mlp=norms.get("post_feedforward_layernorm"),
    )


def _attention(module: Any, config: Any, used: set[nn.Module]) -> Attention:
    names = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    inputs = tuple(_linear(module, name, used) for name in names)
    output = _linear(module, "o_proj", used)
    heads = config.num_attention_heads
    dim = getattr(module, "head_dim", None) or _shape(output)[1] // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if _shape(output)[1] != heads * dim:
        raise UnknownArchitecture(f"its attention does not give {heads} heads of {dim}")
    if sum(_shape(linear)[0] for linear in inputs) != (heads + 2 * key_heads) * dim or heads % key_heads:
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
        scale=float(getattr(module, "scaling", None) or dim**-0.5),
        cap=float(getattr(module, "attn_logit_softcapping", None) or 0.0),
        query_norm=norms[0],
        key_norm=norms[1],
        rotates=bool(getattr(module, "use_rope", True)),
    )


def _mlp(module: nn.Module, used: set[nn.Module]) -> GatedMlp:
    fused = hasattr(module, "gate_up_proj")
    inputs = tuple(_linear(module, name, used) for name in (("gate_up_proj",) if fused else ("gate_proj", "up_proj")))
    output = _linear(module, "down_proj", used)
    width = _shape(output)[1]
    if sum(_shape(linear)[0] for linear in inputs) != 2 * width:
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
        with torch.no_grad():
            given = function(x)
        for name, other in known.items():
            if isinstance(given, Tensor) and torch.allclose(given, other(x), rtol=1e-6, atol=1e-6):
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
    used.add(module)
    return module


def _shape(linear: Any) -> tuple[int, int]:
    return int(linear.out_features), int(linear.in_features)


def _norm(module: Any, used: set[nn.Module]) -> Norm:
    """A norm, recognised by what it does to two probes: one of the size of activations, one where eps counts."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = {name for name, _ in module.named_parameters()}
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float) or names - {"weight", "bias"}:
        raise UnknownArchitecture(f"{type(module).__name__} is not a norm that a step of ours can take")
    gain, bias = weight.detach().float(), getattr(module, "bias", None)
    bias = None if bias is None else bias.detach().float().clone()
    centred = isinstance(module, nn.LayerNorm)
    options = [Norm(gain.clone(), bias, eps, centred)]
    if not centred:
        options.append(Norm(gain + 1, None, eps, False))
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, len(gain), generator=generator) * torch.tensor([[1.0], [eps**0.5]])
    probe = probe.to(weight.dtype)
    with torch.no_grad():
        given = module(probe).float()
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    for norm in options:
        expected = _normalised(probe.float(), norm)
        if torch.allclose(given, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            used.add(module)
            return norm
    raise UnknownArchitecture(f"{type(module).__name__} does something else than a root mean square norm")


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
