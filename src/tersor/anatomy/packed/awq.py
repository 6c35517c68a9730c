"""AWQ checkpoints (arXiv:2306.00978) as AutoAWQ writes them, 4 bits.

``version: gemm`` (also called ``exllama`` and ``ipex`` in configurations; the files are alike): ``qweight`` int32
``(in, out/8)``, ``qzeros`` int32 ``(G, out/8)``, ``scales`` ``(G, out)`` with ``G = in / group_size``. A word holds
eight neighbouring outputs, from its lowest bits on in the order 0 2 4 6 1 3 5 7.

``version: gemv``: ``qweight`` int32 ``(out, in/8)``, ``qzeros`` int32 ``(out, Z)``, ``scales`` ``(out, 8·Z)``: packed
along the inputs, in order; ``Z`` is ``G / 8`` rounded up to what the kernel likes, and only the first ``G`` columns
count.

``weight[o, i] = scales[g, o] · (code[i, o] − zero[g, o])`` with ``g = i // group_size``, rounded once to the type of
the scales. What AWQ moves between layers is in the weights already. Described after ``awq/modules/linear`` of AutoAWQ
0.2 (MIT) and ``quantization/awq/utils`` of GPTQModel 7.6 (Apache-2.0).
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
    computed,
    group_text,
    modules_with,
    stretches,
    unpack_words,
    weight_type,
)
from tersor.anatomy.shards import TensorInfo
from tersor.errors import BadInput, CorruptArtifact

_BITS = 4
_IN_A_WORD = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in its word each of eight neighbouring outputs lies."""
_GEMM, _GEMV = ("gemm", "exllama", "ipex"), "gemv"


def read(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Packed]:
    """Every packed linear by the name of its weight; no data are read.

    Raises BadInput for bits or a version that are not read, CorruptArtifact for tensors that are missing or do not fit.
    """
    version = str(settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm")
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    if version.lower() not in (*_GEMM, _GEMV):
        raise BadInput(
            f"The model is packed for AWQ in the version {version!r}, which is not read (read are gemm and gemv); give "
            "the original model, or the checkpoint before it was repacked for one kernel."
        )
    if bits != _BITS:
        raise BadInput(f"The model's AWQ codes have {bits!r} bits; only {_BITS} are read.")
    size = settings.get("group_size", settings.get("q_group_size", -1))
    if not isinstance(size, int) or size == 0 or size < -1:
        raise BadInput(f"The model's AWQ group_size {size!r} is not a number of inputs (or -1).")
    linear = _gemv if version.lower() == _GEMV else _gemm
    made = {}
    for module in modules_with(tensors, "qweight"):
        packed = linear(module, settings, size)
        made[packed.tensor.name] = packed
    return made


def _gemm(module: Module, settings: Mapping[str, Any], size: int) -> Packed:
    words, zeros, scales = _parts(module)
    inputs, outputs = words.shape[0], words.shape[1] * _IN_A_WORD
    group = inputs if size == -1 else min(size, inputs)
    groups = -(-inputs // group)
    why = f"groups of {group} of {inputs} inputs, {outputs} outputs"
    module.check(zeros, (groups, words.shape[1]), why=why)
    module.check(scales, (groups, outputs), why=why)
    dtype = weight_type(scales.dtype, settings)
    compute = partial(dequantize_gemm, group=group, dtype=dtype)
    tensor = computed(module, (words, zeros, scales), (outputs, inputs), dtype, compute)
    return Packed(tensor, f"{_BITS}-bit {group_text(group, inputs)}")


def _gemv(module: Module, settings: Mapping[str, Any], size: int) -> Packed:
    words, zeros, scales = _parts(module)
    outputs, inputs = words.shape[0], words.shape[1] * _IN_A_WORD
    group = inputs if size == -1 else min(size, inputs)
    groups = -(-inputs // group)
    if len(zeros.shape) != 2 or zeros.shape[0] != outputs or zeros.shape[1] * _IN_A_WORD < groups:
        raise CorruptArtifact(
            f"Tensor {zeros.name} in {zeros.file} has the shape {zeros.shape}, expected {outputs} rows with at least "
            f"{groups} zero points ({_IN_A_WORD} to a word)."
        )
    module.check(scales, (outputs, zeros.shape[1] * _IN_A_WORD), why=f"as wide as {zeros.name}")
    dtype = weight_type(scales.dtype, settings)
    compute = partial(dequantize_gemv, group=group, dtype=dtype)
    tensor = computed(module, (words, zeros, scales), (outputs, inputs), dtype, compute)
    return Packed(tensor, f"{_BITS}-bit {group_text(group, inputs)}")


def _parts(module: Module) -> tuple[TensorInfo, TensorInfo, TensorInfo]:
    words = module.need("qweight", (torch.int32,))
    if len(words.shape) != 2:
        raise CorruptArtifact(f"Tensor {words.name} in {words.file} has the shape {words.shape}, expected two axes.")
    return words, module.need("qzeros", (torch.int32,)), module.need("scales", FLOATS)


def dequantize_gemm(words: Tensor, zeros: Tensor, scales: Tensor, *, group: int, dtype: torch.dtype) -> Tensor:
    """The weight ``(out, in)`` of tensors laid out for gemm, in ``dtype``."""
    inputs, outputs = words.shape[0], words.shape[1] * _IN_A_WORD
    offsets, steps = _outputs_in_order(zeros).float(), scales.float()
    weight = torch.empty(outputs, inputs, dtype=dtype)
    for some in stretches(inputs, outputs):
        owner = torch.arange(some.start, some.stop) // group
        weight[:, some] = ((_outputs_in_order(words[some]).float() - offsets[owner]) * steps[owner]).T.to(dtype)
    return weight


def dequantize_gemv(words: Tensor, zeros: Tensor, scales: Tensor, *, group: int, dtype: torch.dtype) -> Tensor:
    """The weight ``(out, in)`` of tensors laid out for gemv, in ``dtype``."""
    outputs, inputs = words.shape[0], words.shape[1] * _IN_A_WORD
    owner = torch.arange(inputs) // group
    weight = torch.empty(outputs, inputs, dtype=dtype)
    for rows in stretches(outputs, inputs):
        codes = unpack_words(words[rows], _BITS, inputs).float()
        offsets = unpack_words(zeros[rows], _BITS, zeros.shape[1] * _IN_A_WORD).float()
        weight[rows] = (codes - offsets[:, owner]) * scales[rows].float()[:, owner]
    return weight


def _outputs_in_order(words: Tensor) -> Tensor:
    """Codes ``(n, out)`` uint8 of ``(n, out/8)`` words."""
    codes = unpack_words(words, _BITS, words.shape[1] * _IN_A_WORD)
    return codes.reshape(len(words), -1, _IN_A_WORD)[..., list(_PLACES)].flatten(1)
