"""What each codec is in compressed-tensors: its scheme, and its tensors there, the same bits in another order.

Names and layouts are those of the library's compressors (version 0.20): ``weight_packed`` holds codes from the lowest
bit of little-endian 32-bit words, ``weight_zero_point`` the same down the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.codecs import Integer, MicroFloat, NvFloat, SignedInteger, SmallFloat, parse
from tersor.codecs.packing import pack, unpack
from tersor.contracts import Codec, Shape
from tersor.errors import BadInput

DENSE = "bf16"
GROUPS = (32, 64, 128)
_WORD = 32

Spec = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def _texts() -> tuple[str, ...]:
    groups = [*(f"g{group}" for group in GROUPS), "row"]
    symmetric = [f"sint{bits}:{group}:bf16" for bits in (4, 8) for group in groups]
    # Zero points of 8 bits would be read by the library, but no engine's kernels take them.
    asymmetric = [f"int4:{group}:asym:bf16" for group in groups]
    return (
        *symmetric,
        *asymmetric,
        "sint8:row:bf16:a8",
        "sint8:row:bf16:a8s",
        "fp8:e4m3:row:bf16",
        "mxfp4:e2m1:g32",
        "nvfp4:s9",
        DENSE,
    )


TEXTS = _texts()
"""Codecs that have a form there."""


@dataclass(frozen=True)
class Form:
    """One codec as compressed-tensors has it. ``format``: the library's name of the layout."""

    codec: Codec
    format: str

    def scheme(self) -> dict[str, Any]:
        """``weights`` and ``input_activations`` of a config group; fields at the library's defaults are left out."""
        return _scheme(self.codec)

    def spec(self, shape: Shape) -> Spec:
        """Stored tensors for a weight ``(out, in)``, by what follows the module's name: dtype and shape."""
        rows, columns = shape
        if self.format == "mxfp4-pack-quantized":
            return {
                "weight_packed": (torch.uint8, (rows, columns // 2)),
                "weight_scale": (torch.uint8, (rows, columns // 32)),
            }
        if isinstance(self.codec, NvFloat):
            return {
                "weight_packed": (torch.uint8, (rows, columns // 2)),
                "weight_scale": (torch.float8_e4m3fn, (rows, columns // 16)),
                "weight_global_scale": (torch.float32, (1,)),
            }
        if self.format != "pack-quantized":
            kind = torch.int8 if self.format == "int-quantized" else torch.float8_e4m3fn
            inputs: Spec = {"input_scale": (torch.bfloat16, (1,))} if _static(self.codec) else {}
            return {"weight": (kind, shape), "weight_scale": (torch.bfloat16, (rows, 1)), **inputs}
        assert isinstance(self.codec, Integer | SignedInteger)
        bits, groups = self.codec.bits_per_code, self.codec.groups(columns)
        spec: Spec = {
            "weight_packed": (torch.int32, (rows, _words(columns, bits))),
            "weight_scale": (torch.bfloat16, (rows, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if isinstance(self.codec, Integer):
            spec["weight_zero_point"] = (torch.int32, (_words(rows, bits), groups))
        return spec

    def put(self, parts: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        """A codec's stored tensors as the library stores them. Raises BadInput where inputs are of unknown size."""
        if self.format == "mxfp4-pack-quantized":
            return {"weight_packed": parts["codes"], "weight_scale": parts["exponent"]}
        if isinstance(self.codec, NvFloat):
            return {
                "weight_packed": parts["codes"],
                "weight_scale": parts["scale"].contiguous().view(torch.float8_e4m3fn),
                "weight_global_scale": torch.tensor([2.0**self.codec.shift]),
            }
        if self.format == "int-quantized":
            inputs = {"input_scale": parts["input_scale"]} if _static(self.codec) else {}
            if not all(bool((scale > 0).all()) for scale in inputs.values()):
                raise BadInput(
                    f"{self.codec} needs to know how large a layer's inputs get, and no calibration text reached one; "
                    f"give more --text, or use {str(self.codec).removesuffix('s')}, which finds out as it runs."
                )
            return {"weight": (parts["codes"] ^ 0x80).view(torch.int8), "weight_scale": parts["scale"], **inputs}
        if self.format == "float-quantized":
            return {"weight": parts["codes"].contiguous().view(torch.float8_e4m3fn), "weight_scale": parts["scale"]}
        assert isinstance(self.codec, Integer | SignedInteger)
        bits = self.codec.bits_per_code
        tensors = {
            "weight_packed": _to_words(parts["codes"]),
            "weight_scale": parts["scale"],
            "weight_shape": torch.tensor(shape, dtype=torch.int64),
        }
        if "zero" in parts:
            down = unpack(parts["zero"], bits, self.codec.groups(shape[1])).T
            tensors["weight_zero_point"] = _plain(_to_words(pack(down, bits)).T)
        return tensors

    def get(self, tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        """The inverse of :meth:`put`."""
        if self.format == "mxfp4-pack-quantized":
            return {"codes": tensors["weight_packed"], "exponent": tensors["weight_scale"]}
        if isinstance(self.codec, NvFloat):
            return {"codes": tensors["weight_packed"], "scale": tensors["weight_scale"].view(torch.uint8)}
        if self.format == "int-quantized":
            inputs = {"input_scale": tensors["input_scale"]} if _static(self.codec) else {}
            return {"codes": tensors["weight"].view(torch.uint8) ^ 0x80, "scale": tensors["weight_scale"], **inputs}
        if self.format == "float-quantized":
            return {"codes": tensors["weight"].view(torch.uint8), "scale": tensors["weight_scale"]}
        assert isinstance(self.codec, Integer | SignedInteger)
        bits = self.codec.bits_per_code
        wide = {part.name: part.shape[1] for part in self.codec.parts(shape)}
        parts = {
            "codes": tensors["weight_packed"].view(torch.uint8)[:, : wide["codes"]].contiguous(),
            "scale": tensors["weight_scale"],
        }
        if isinstance(self.codec, Integer):
            down = _plain(tensors["weight_zero_point"].T).view(torch.uint8)
            zero = unpack(down, bits, shape[0]).T
            parts["zero"] = pack(zero, bits)
        return parts


def form_of(text: str) -> Form | None:
    """The form of a codec; None for bf16, which is stored as it is, and for what has none there."""
    return FORMS.get(text)


def text_of(scheme: Mapping[str, Any]) -> str | None:
    """The codec whose scheme, with all of the library's fields, this is; None when it is that of no codec."""
    found = _essence(scheme)
    return next((text for text, form in FORMS.items() if _essence(form.scheme()) == found), None)


def _static(codec: Codec) -> bool:
    return isinstance(codec, SignedInteger) and codec.static


def _words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD)


def _to_words(stream: Tensor) -> Tensor:
    """Bytes ``(rows, n)`` as 32-bit words, zeros after the last byte."""
    return _plain(torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4))).view(torch.int32)


def _plain(tensor: Tensor) -> Tensor:
    """A copy with the plainest strides; ``contiguous`` leaves odd ones where a side is 1."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _scheme(codec: Codec) -> dict[str, Any]:
    token = {"dynamic": True, "strategy": "token", "symmetric": True}
    if isinstance(codec, NvFloat):
        scales = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 16, "strategy": "tensor_group"}
        return {"weights": {**weights, **scales}}
    if isinstance(codec, MicroFloat):
        scales = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": 32, "strategy": "group", **scales}
        return {"weights": weights}
    if isinstance(codec, SmallFloat):
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
        return {"weights": weights, "input_activations": {"num_bits": 8, "type": "float", **token}}
    assert isinstance(codec, Integer | SignedInteger)
    grouping = {"strategy": "channel"} if codec.group is None else {"group_size": codec.group, "strategy": "group"}
    symmetric = isinstance(codec, SignedInteger)
    weights = {"num_bits": codec.bits_per_code, "type": "int", "symmetric": symmetric, **grouping}
    if isinstance(codec, SignedInteger) and codec.activations == 8:
        one = {"dynamic": False, "strategy": "tensor", "symmetric": True}
        inputs = one if codec.static else token
        return {"weights": weights, "input_activations": {"num_bits": 8, "type": "int", **inputs}}
    return {"weights": weights}


def _essence(scheme: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a scheme decides how weights are stored and used; observers do not."""
    found: list[Any] = []
    for part in ("weights", "input_activations"):
        values = scheme.get(part)
        if values is None:
            found.append(None)
            continue
        fields = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
        # These orders of columns only decided the order of rounding; any other changes which group a column is in.
        order = values.get("actorder") if values.get("actorder") not in ("static", "weight") else None
        found.append((*(values.get(field) or None for field in fields), order))
    return tuple(found)


def _format(codec: Codec) -> str:
    if isinstance(codec, NvFloat):
        return "nvfp4-pack-quantized"
    if isinstance(codec, MicroFloat):
        return "mxfp4-pack-quantized"
    if isinstance(codec, SmallFloat):
        return "float-quantized"
    return "int-quantized" if isinstance(codec, SignedInteger) and codec.activations == 8 else "pack-quantized"


FORMS: Mapping[str, Form] = {text: Form(parse(text), _format(parse(text))) for text in TEXTS if text != DENSE}
