"""GPTQ checkpoints (arXiv:2210.17323) as AutoGPTQ, GPTQModel and optimum write them.

For a linear of ``in`` inputs and ``out`` outputs, codes of ``b`` bits and ``G`` groups:

* ``qweight`` int32 ``(⌈in·b/32⌉, out)``: the codes of each output one after the other along the inputs, lowest bits
  first; 3-bit codes cross words, 32 of them fill three.
* ``qzeros`` int32 ``(G, ⌈out·b/32⌉)``: the zero points, packed alike along the outputs. Files of the first format hold
  each minus one; ``checkpoint_format: gptq_v2`` says that they are as they are.
* ``scales`` ``(G, out)``.
* ``g_idx`` int32 ``(in)``: the group of each input. Any order where ``desc_act`` sorted inputs; without it, input ``i``
  is in group ``i // group_size``.

``weight[o, i] = scales[g, o] · (code[i, o] − zero[g, o])`` with ``g = g_idx[i]``, rounded once to the type of the
scales, as the layout's own programs do. Described after ``nn_modules/qlinear`` and ``utils/model.py`` of GPTQModel 7.6
(Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersor.anatomy.packed.module import (
    FLOATS,
    Module,
    Packed,
    check_groups,
    computed,
    group_text,
    modules_with,
    stretches,
    unpack_words,
    weight_type,
    words_for,
)
from tersor.anatomy.shards import TensorInfo, map_tensor
from tersor.errors import BadInput, CorruptArtifact

BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def read(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Packed]:
    """Every packed linear by the name of its weight. Only ``g_idx`` is read of the data.

    Raises BadInput for bits or a format that are not read; CorruptArtifact for tensors that are missing, do not fit
    together, or point to groups that do not exist.
    """
    form = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if settings.get("is_marlin_format"):
        form = "marlin"
    if form not in _FORMATS:
        raise BadInput(
            f"The model is packed for GPTQ in the format {form!r}, which is not read (read are gptq and gptq_v2); give "
            "the original model, or the checkpoint before it was repacked for one kernel."
        )
    if settings.get("pack_dtype", "int32") != "int32":
        raise BadInput(f"The model's GPTQ codes are packed into {settings['pack_dtype']}; only int32 is read.")
    made = {}
    for module in modules_with(tensors, "qweight"):
        packed = _linear(module, settings, minus_one=form == "gptq")
        made[packed.tensor.name] = packed
    return made


def _linear(module: Module, settings: Mapping[str, Any], *, minus_one: bool) -> Packed:
    words = module.need("qweight", (torch.int32,))
    zeros = module.need("qzeros", (torch.int32,))
    scales = module.need("scales", FLOATS)
    if len(words.shape) != 2 or len(scales.shape) != 2:
        raise CorruptArtifact(f"Tensor {words.name} in {words.file} has the shape {words.shape}, expected two axes.")
    outputs, groups = words.shape[1], scales.shape[0]
    module.check(scales, (groups, outputs), why=f"{words.name} has {outputs} outputs")
    bits = _bits(module, settings, zeros, groups, outputs)
    index = module.tensors.get("g_idx")
    inputs = index.shape[0] if index is not None and index.shape else _inputs(settings, words.shape[0], bits, groups)
    module.check(words, (words_for(inputs, bits), outputs), why=f"{inputs} inputs of {bits} bits")
    group = _group(settings, inputs, groups)
    if index is None:
        if -(-inputs // group) != groups:
            raise CorruptArtifact(
                f"Tensor {scales.name} in {scales.file} has {groups} groups, expected {-(-inputs // group)} (groups of "
                f"{group} of {inputs} inputs)."
            )
    else:
        index = module.need("g_idx", (torch.int32, torch.int64))
        module.check(index, (inputs,), why=f"{inputs} inputs")
        low, high = torch.aminmax(map_tensor(index))
        check_groups(index, int(low), int(high), groups)
    parts = (words, zeros, scales) if index is None else (words, zeros, scales, index)
    dtype = weight_type(scales.dtype, settings)
    compute = partial(dequantize, bits=bits, inputs=inputs, group=group, minus_one=minus_one, dtype=dtype)
    tensor = computed(module, parts, (outputs, inputs), dtype, compute)
    return Packed(tensor, f"{bits}-bit {group_text(group, inputs)}")


def _bits(module: Module, settings: Mapping[str, Any], zeros: TensorInfo, groups: int, outputs: int) -> int:
    """Bits of a module's codes: what the configuration says, or, where it has exceptions, what its tensors say."""
    bits = settings.get("bits")
    if bits not in BITS:
        raise BadInput(f"The model's GPTQ codes have {bits!r} bits; read are {', '.join(map(str, BITS))}.")
    if settings.get("dynamic"):
        fitting = [one for one in BITS if zeros.shape == (groups, words_for(outputs, one))]
        bits = bits if bits in fitting or not fitting else fitting[0]
    module.check(zeros, (groups, words_for(outputs, bits)), why=f"{groups} groups, {outputs} outputs of {bits} bits")
    return int(bits)


def _inputs(settings: Mapping[str, Any], words: int, bits: int, groups: int) -> int:
    """Inputs of a module whose files do not say: whole groups where they fill the words, else what the words hold."""
    size = settings.get("group_size")
    whole = groups * size if isinstance(size, int) and size > 0 else 0
    return whole if words_for(whole, bits) == words else words * 32 // bits


def _group(settings: Mapping[str, Any], inputs: int, groups: int) -> int:
    """Inputs that share a scale; the configured number, unless this module has other groups by exception."""
    size = settings.get("group_size", -1)
    if not isinstance(size, int) or size == 0 or size < -1:
        raise BadInput(f"The model's GPTQ group_size {size!r} is not a number of inputs (or -1).")
    size = inputs if size == -1 else min(size, inputs)
    return size if -(-inputs // size) == groups or inputs % groups or not settings.get("dynamic") else inputs // groups


def dequantize(
    words: Tensor,
    zeros: Tensor,
    scales: Tensor,
    index: Tensor | None = None,
    *,
    bits: int,
    inputs: int,
    group: int,
    minus_one: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The weight ``(out, in)`` of packed tensors laid out as the module says, in ``dtype``."""
    outputs = words.shape[1]
    owner = torch.arange(inputs) // group if index is None else index.long()
    offsets = _zero_points(zeros, bits, outputs, minus_one=minus_one).T.float()
    steps = scales.T.float()
    weight = torch.empty(outputs, inputs, dtype=dtype)
    for rows in stretches(outputs, inputs):
        codes = unpack_words(words[:, rows].T, bits, inputs).float()
        weight[rows] = (codes - offsets[rows][:, owner]) * steps[rows][:, owner]
    return weight


def _zero_points(words: Tensor, bits: int, outputs: int, *, minus_one: bool) -> Tensor:
    """Zero points ``(G, out)``.

    The one that was subtracted is added to whole words where codes do not cross them: writers subtract it so, and
    then a zero point of 0 borrows from its neighbour.
    """
    if not minus_one:
        return unpack_words(words, bits, outputs)
    if bits in _ONES:
        return unpack_words(words + torch.tensor(_ONES[bits], dtype=torch.int32), bits, outputs)
    return (unpack_words(words, bits, outputs) + 1) & ((1 << bits) - 1)
