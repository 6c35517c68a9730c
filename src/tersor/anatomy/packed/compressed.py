"""compressed-tensors checkpoints, as llm-compressor writes them for vLLM, and the FP8 blocks of DeepSeek and Qwen 3.

* ``pack-quantized``: ``weight_packed`` int32 ``(out, ⌈in·b/32⌉)`` holds signed codes plus 2^(b−1), lowest bits first,
  across words; ``weight_shape`` int64 ``(2)`` is ``(out, in)``; ``weight_zero_point`` int32 ``(⌈out·b/32⌉, G)`` is
  packed alike along the outputs, and missing where codes are symmetric.
* ``int-quantized``, ``float-quantized``, ``naive-quantized``: ``weight`` is int8 or float8; ``weight_zero_point``,
  where there is one, has the shape of the scales and the type of the codes.
* ``weight_scale``: one, ``(out, 1)``, ``(out, G)``, or one for each block of rows and columns. ``weight_g_idx``
  ``(in)``: the group of each input where inputs were sorted; else input ``i`` is in group ``i // (in / G)``.
* ``quant_method: fp8``: ``weight`` float8 and ``weight_scale_inv``, one for each block of ``weight_block_size``, or
  one in all; a float, or E8M0, the power of two of the OCP microscaling formats.

``weight = (code − zero) · scale``, rounded once to the type of the scales (to that of the model where they are E8M0).
What files say of activations is left out.
Described after compressed-tensors 0.19 and transformers' ``quantizers/quantizer_finegrained_fp8.py`` (both Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tersor.anatomy.packed.module import (
    FLOATS,
    POWERS,
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

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_PLAIN = (torch.int8, *_FLOAT8)
_BITS = range(1, 9)


def read(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Packed]:
    """Every quantized linear by the name of its weight. Only ``weight_shape`` and ``weight_g_idx`` are read.

    Raises BadInput for formats, sparsity or online transforms that are not read, CorruptArtifact for tensors that are
    missing or do not fit together.
    """
    groups = [group for group in _object(settings, "config_groups").values() if isinstance(group, Mapping)]
    for form in (settings.get("format"), *(group.get("format") for group in groups)):
        if form is not None and form not in _FORMATS:
            raise BadInput(
                f"The model is stored in the compressed-tensors format {form!r}, which is not read (read are "
                f"{', '.join(_FORMATS[:4])}); give the original model."
            )
    sparsity = _object(settings, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise BadInput(
            f"The model's weights are stored sparse ({sparsity}), which is not read; give the original model."
        )
    if _object(settings, "transform_config").get("config_groups"):
        raise BadInput(
            "The model rotates activations while it runs (transform_config), which its weights alone do not show; give "
            "the original model."
        )
    schemes = [_object(group, "weights") for group in groups]
    block = _block(schemes)
    # A few inputs fill as many words at several numbers of bits, so what the configuration says of them counts.
    widths = [bits for bits in _BITS if any(scheme.get("num_bits") == bits for scheme in schemes)] or _BITS
    made = {}
    for module in modules_with(tensors, "weight_packed"):
        packed = _packed(module, widths, settings)
        made[packed.tensor.name] = packed
    for module in modules_with(tensors, "weight_scale"):
        if "weight_packed" not in module.tensors:
            packed = _plain(module, "weight_scale", block, settings)
            made[packed.tensor.name] = packed
    return made


def read_blocks(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Packed]:
    """As :func:`read`, for ``quant_method: fp8``."""
    block = _block([{"block_structure": settings.get("weight_block_size")}])
    made = {}
    for leaf in ("weight_scale_inv", "weight_scale"):
        for module in modules_with(tensors, leaf):
            packed = _plain(module, leaf, block, settings)
            made[packed.tensor.name] = packed
    return made


def _object(settings: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The JSON object ``key``, empty where there is none. Raises CorruptArtifact for anything else."""
    found = settings.get(key) or {}
    if not isinstance(found, Mapping):
        raise CorruptArtifact(f"{key} in the model's quantization_config is {found!r:.60}, not a JSON object.")
    return found


def _block(schemes: Iterable[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where a configuration says so."""
    for scheme in schemes:
        found = scheme.get("block_structure")
        if found is None:
            continue
        if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
            return found[0], found[1]
        raise BadInput(f"The model's blocks that share a scale, {found!r}, are not two numbers.")
    return None


def _packed(module: Module, widths: Collection[int], settings: Mapping[str, Any]) -> Packed:
    """``widths``: how many bits codes may have."""
    words = module.need("weight_packed", (torch.int32,))
    scales = module.need("weight_scale", FLOATS)
    shape = module.need("weight_shape", (torch.int64, torch.int32))
    module.check(shape, (2,), why="outputs and inputs")
    outputs, inputs = (int(n) for n in map_tensor(shape))
    bits = next((b for b in widths if words.shape == (outputs, words_for(inputs, b))), None)
    if bits is None:
        raise CorruptArtifact(
            f"Tensor {words.name} in {words.file} has the shape {words.shape}, which holds {outputs} rows of {inputs} "
            f"codes at no number of bits among {', '.join(map(str, widths))}."
        )
    groups = _groups(scales, outputs, inputs)
    zeros = module.tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = module.need("weight_zero_point", (torch.int32,))
        module.check(
            zeros, (words_for(outputs, bits), groups), why=f"{outputs} outputs of {bits} bits, {groups} groups"
        )
    index, ordered = _index(module, inputs, groups)
    dtype = weight_type(scales.dtype, settings)
    compute = partial(
        _dequantize_packed, bits=bits, zeros=zeros is not None, ordered=ordered, shape=(outputs, inputs), dtype=dtype
    )
    parts = (words, scales, *(part for part in (zeros, index, shape) if part is not None))
    tensor = computed(module, parts, (outputs, inputs), dtype, compute)
    return Packed(tensor, f"{bits}-bit {group_text(-(-inputs // groups), inputs)}")


def _groups(scales: TensorInfo, outputs: int, inputs: int) -> int:
    if len(scales.shape) != 2 or scales.shape[0] != outputs or not 0 < scales.shape[1] <= inputs:
        raise CorruptArtifact(
            f"Tensor {scales.name} in {scales.file} has the shape {scales.shape}, expected {outputs} rows of one scale "
            "a group."
        )
    return scales.shape[1]


def _index(module: Module, inputs: int, groups: int) -> tuple[TensorInfo | None, bool]:
    """The tensor that says which group each input is in, if there is one, and whether it says so."""
    if "weight_g_idx" in module.tensors:
        index = module.need("weight_g_idx", (torch.int32, torch.int64))
        module.check(index, (inputs,), why=f"{inputs} inputs")
        low, high = (int(value) for value in torch.aminmax(map_tensor(index)))
        if high >= 0:  # else: inputs were not sorted
            check_groups(index, low, high, groups)
            return index, True
    scales = module.tensors["weight_scale"]
    if inputs % groups:
        raise CorruptArtifact(
            f"Tensor {scales.name} in {scales.file} has {groups} groups, which do not divide the {inputs} inputs."
        )
    return module.tensors.get("weight_g_idx"), False


def _plain(module: Module, leaf: str, block: tuple[int, int] | None, settings: Mapping[str, Any]) -> Packed:
    codes, scales = module.need("weight", _PLAIN), module.need(leaf, (*FLOATS, *POWERS))
    if len(codes.shape) != 2:
        raise CorruptArtifact(f"Tensor {codes.name} in {codes.file} has the shape {codes.shape}, expected two axes.")
    outputs, inputs = codes.shape
    zeros = module.tensors.get("weight_zero_point")
    if zeros is not None:
        zeros = module.need("weight_zero_point", _PLAIN)
        module.check(zeros, scales.shape, why=f"the shape of {scales.name}")
    tile = _tile(scales, outputs, inputs, block)
    dtype = weight_type(scales.dtype, settings)
    compute = partial(_dequantize_plain, tile=tile, dtype=dtype)
    parts = (codes, scales) if zeros is None else (codes, scales, zeros)
    tensor = computed(module, parts, (outputs, inputs), dtype, compute)
    kind = "8-bit" if codes.dtype == torch.int8 else "FP8"
    if tile[0] > 1:
        return Packed(tensor, f"{kind} {'per tensor' if tile == codes.shape else f'{tile[0]}x{tile[1]} blocks'}")
    return Packed(tensor, f"{kind} {group_text(tile[1], inputs)}")


def _tile(scales: TensorInfo, outputs: int, inputs: int, block: tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns that share one of ``scales``."""
    if scales.shape in ((), (1,), (1, 1)):
        return outputs, inputs
    if scales.shape in ((outputs,), (outputs, 1)):
        return 1, inputs
    if block is not None and scales.shape == (-(-outputs // block[0]), -(-inputs // block[1])):
        return block
    if len(scales.shape) == 2 and scales.shape[0] == outputs and inputs % scales.shape[1] == 0:
        return 1, inputs // scales.shape[1]
    raise CorruptArtifact(
        f"Tensor {scales.name} in {scales.file} has the shape {scales.shape}, which is one scale neither for all, nor "
        f"for rows, groups or blocks{'' if block is None else f' of {block[0]} x {block[1]}'} of {outputs} x {inputs} "
        "weights."
    )


def _dequantize_packed(
    words: Tensor,
    scales: Tensor,
    *rest: Tensor,
    bits: int,
    zeros: bool,
    ordered: bool,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight ``(out, in)`` of packed tensors, in ``dtype``. ``rest``: the zero points if there are ``zeros``,
    then the groups of the inputs if they are ``ordered`` by them; more is left alone."""
    outputs, inputs = shape
    groups = scales.shape[1]
    # Codes and zero points both have half the range added, which cancels.
    half = float(1 << (bits - 1))
    offsets = unpack_words(rest[0].T, bits, outputs).T.float() if zeros else torch.full((outputs, groups), half)
    owner = rest[int(zeros)].long() if ordered else torch.arange(inputs) // (inputs // groups)
    weight = torch.empty(shape, dtype=dtype)
    for rows in stretches(outputs, inputs):
        codes = unpack_words(words[rows], bits, inputs).float()
        weight[rows] = (codes - offsets[rows][:, owner]) * scales[rows].float()[:, owner]
    return weight


def _dequantize_plain(
    codes: Tensor, scales: Tensor, zeros: Tensor | None = None, *, tile: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The weight ``(out, in)`` of codes that are numbers of their own, in ``dtype``."""
    outputs, inputs = codes.shape
    grid = (-(-outputs // tile[0]), -(-inputs // tile[1]))
    steps = scales.float().reshape(grid)
    offsets = None if zeros is None else zeros.float().reshape(grid)
    columns = torch.arange(inputs) // tile[1]
    weight = torch.empty(outputs, inputs, dtype=dtype)
    for rows in stretches(outputs, inputs):
        owner = torch.arange(rows.start, rows.stop)[:, None] // tile[0]
        values = codes[rows].float()
        if offsets is not None:
            values = values - offsets[owner, columns]
        weight[rows] = values * steps[owner, columns]
    return weight
