"""Which tensors of a GGUF a model's parameters become, and how their rows are ordered there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tersor.contracts import Anatomy, Layer
from tersor.errors import BadInput

ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
"""transformers' model types, and llama.cpp's names for them."""


@dataclass(frozen=True)
class Piece:
    """A tensor of the GGUF made of a parameter. ``rows``: its rows among the parameter's, in their new order; None for
    all as they are. ``shape``: of the tensor, outermost first."""

    name: str
    rows: Tensor | None
    shape: tuple[int, ...]


def gguf() -> Any:
    """The package for the container. Raises BadInput when it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise BadInput("Writing a GGUF needs the package gguf: pip install 'tersor[gguf]'.") from error


def architecture(config: PretrainedConfig) -> str:
    """llama.cpp's name of the architecture. Raises BadInput for one that cannot be written."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise BadInput(f"A model of type {config.model_type} cannot be written for llama.cpp here; known are {known}.")
    return ARCHITECTURES[config.model_type]


def pieces(anatomy: Anatomy, config: PretrainedConfig) -> dict[str, tuple[Piece, ...]]:
    """By layer name, or by parameter name for what is kept: the tensors it becomes.

    Raises BadInput naming a parameter that llama.cpp has no place for.
    """
    find = _finder(architecture(config), len(anatomy.blocks))
    found = {layer.name: _of_layer(layer, config, find) for layer in anatomy.layers}
    for name, (_, shape) in anatomy.kept.items():
        if name.endswith(".rotary_emb.inv_freq"):
            continue
        found[name] = _of_kept(name, shape, config, find)
    return found


def _finder(arch: str, blocks: int) -> Callable[[str], str]:
    package = gguf()
    number = next(key for key, value in package.MODEL_ARCH_NAMES.items() if value == arch)
    names = package.get_tensor_name_map(number, blocks)

    def find(parameter: str) -> str:
        name: str | None = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise BadInput(f"llama.cpp's {arch} has no place for the parameter {parameter!r}.")
        return name

    return find


def _of_layer(layer: Layer, config: PretrainedConfig, find: Callable[[str], str]) -> tuple[Piece, ...]:
    out, columns = layer.shape
    if layer.copies > 1:
        return _of_experts(layer, find)
    rows = rotary_rows(layer.name, out, config)
    return (Piece(find(layer.parameter), rows, (out, columns)),)


def _of_experts(layer: Layer, find: Callable[[str], str]) -> tuple[Piece, ...]:
    """Experts' gates and inputs lie in one parameter in transformers, in two tensors in a GGUF."""
    out, columns = layer.shape
    base, _, last = layer.parameter.rpartition(".")
    number = torch.arange(layer.copies * out).reshape(layer.copies, out)
    if last != "gate_up_proj":
        return (Piece(find(f"{base}.{last}.weight"), None, (layer.copies, out, columns)),)
    half = out // 2
    sides = {"gate_proj": number[:, :half], "up_proj": number[:, half:]}
    return tuple(
        Piece(find(f"{base}.{name}.weight"), rows.flatten(), (layer.copies, half, columns))
        for name, rows in sides.items()
    )


def _of_kept(
    name: str, shape: tuple[int, ...], config: PretrainedConfig, find: Callable[[str], str]
) -> tuple[Piece, ...]:
    rows = rotary_rows(name.removesuffix(".bias"), shape[0], config) if name.endswith(".bias") else None
    return (Piece(find(name), rows, shape),)


def rotary_rows(name: str, out: int, config: PretrainedConfig) -> Tensor | None:
    """The order of query and key rows for llama.cpp's ``llama``, which rotates neighbours: ``(0, h/2, 1, h/2+1, …)``
    in each head. None for all others, which rotate halves as transformers does."""
    if architecture(config) != "llama" or not name.endswith(("q_proj", "k_proj")):
        return None
    heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
    return torch.arange(out).reshape(heads, 2, out // heads // 2).transpose(1, 2).flatten()


def kept_value(name: str, value: Tensor, config: PretrainedConfig) -> Tensor:
    """A kept parameter as llama.cpp wants it: Gemma's norms multiply by one plus their weight, which is added here."""
    added = architecture(config).startswith("gemma") and name.endswith("norm.weight")
    return value.float() + 1 if added else value.float()
