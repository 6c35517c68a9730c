"""Tiny checkpoints in the packed layouts of other programs, for tests; written from the layouts' descriptions alone.

Codes are packed as one large Python integer a row, which has nothing in common with how they are unpacked.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Rounded:
    """A weight ``(out, in)`` as codes, with zero points and scales ``(out, G)``; ``owner``: each input's group."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: Tensor
    owner: np.ndarray

    def values(self) -> Tensor:
        """The weight: products in double precision, which holds them exactly, rounded once to the scales' type."""
        zeros, scales = self.zeros[:, self.owner], self.scales.double().numpy()[:, self.owner]
        exact = torch.from_numpy((self.codes.astype(np.float64) - zeros) * scales)
        # With scales of 16 bits float32 holds the product too; torch rounds double to 16 bits by way of it.
        assert self.scales.dtype == torch.float32 or torch.equal(exact.float().double(), exact)
        return exact.float().to(self.scales.dtype)


def round_off(weight: Tensor, bits: int, group: int, *, order: bool, dtype: torch.dtype, seed: int = 0) -> Rounded:
    """A weight rounded to nearest. ``order``: inputs are in groups at random, as where they were sorted."""
    inputs = weight.shape[1]
    owner = np.arange(inputs) // group
    if order:
        random.Random(seed).shuffle(owner)
    groups = int(owner.max()) + 1
    w = weight.double().numpy()
    low = np.stack([w[:, owner == g].min(1) for g in range(groups)], 1)
    high = np.stack([w[:, owner == g].max(1) for g in range(groups)], 1)
    top = (1 << bits) - 1
    scales = torch.from_numpy(np.maximum(high - low, 1e-3) / top).to(dtype)
    steps = scales.double().numpy()
    # Zero points of at least 1: the first GPTQ format cannot tell 0 from 2^bits.
    zeros = np.clip(np.round(-low / steps), 1, top).astype(np.int64)
    codes = np.clip(np.round(w / steps[:, owner]) + zeros[:, owner], 0, top).astype(np.int64)
    return Rounded(codes, zeros, scales, owner)


def pack(codes: np.ndarray, bits: int) -> Tensor:
    """``(n, count)`` to int32 ``(n, ⌈count·bits/32⌉)``, lowest bits first."""
    size = 4 * -(-codes.shape[1] * bits // 32)
    rows = [sum(int(code) << (bits * i) for i, code in enumerate(row)).to_bytes(size, "little") for row in codes]
    return torch.from_numpy(np.frombuffer(b"".join(rows), dtype="<i4").reshape(len(codes), -1).copy())


def gptq(rounded: Rounded, bits: int, *, minus_one: bool = True, index: bool = True) -> dict[str, Tensor]:
    """Tensors of a linear as GPTQ stores them."""
    zeros = rounded.zeros - 1 if minus_one else rounded.zeros
    tensors = {
        "qweight": pack(rounded.codes, bits).T,
        "qzeros": pack(zeros.T, bits),
        "scales": rounded.scales.T,
        "g_idx": torch.from_numpy(rounded.owner).int(),
    }
    return tensors if index else {name: tensor for name, tensor in tensors.items() if name != "g_idx"}


def awq(rounded: Rounded) -> dict[str, Tensor]:
    """Tensors of a linear as AWQ stores them for gemm."""

    def mixed(codes: np.ndarray) -> np.ndarray:
        return np.concatenate([codes[:, at : at + 8][:, AWQ_ORDER] for at in range(0, codes.shape[1], 8)], 1)

    return {
        "qweight": pack(mixed(rounded.codes.T), 4),
        "qzeros": pack(mixed(rounded.zeros.T), 4),
        "scales": rounded.scales.T,
    }


def awq_gemv(rounded: Rounded, width: int) -> dict[str, Tensor]:
    """Tensors of a linear as AWQ stores them for gemv; ``width``: words of zero points a row, more than there are."""
    spare = 8 * width - rounded.zeros.shape[1]
    return {
        "qweight": pack(rounded.codes, 4),
        "qzeros": pack(np.pad(rounded.zeros, ((0, 0), (0, spare))), 4),
        "scales": torch.nn.functional.pad(rounded.scales, (0, spare)),
    }


def packed_quantized(rounded: Rounded, bits: int, *, index: bool = False) -> dict[str, Tensor]:
    """Tensors of a linear as compressed-tensors packs them."""
    tensors = {
        "weight_packed": pack(rounded.codes, bits),
        "weight_scale": rounded.scales,
        "weight_zero_point": pack(rounded.zeros.T, bits).T,
        "weight_shape": torch.tensor(rounded.codes.shape),
    }
    return {**tensors, "weight_g_idx": torch.from_numpy(rounded.owner).int()} if index else tensors


@dataclass
class Checkpoint:
    """A packed folder, and the weights that it stands for by name."""

    folder: Path
    weights: dict[str, Tensor] = field(default_factory=dict)

    def configure(self, **changes: Any) -> None:
        """Change entries of the quantization_config; ``...`` takes one away."""
        file = self.folder / "config.json"
        raw = json.loads(file.read_text())
        settings = {**raw["quantization_config"], **changes}
        raw["quantization_config"] = {key: value for key, value in settings.items() if value is not ...}
        file.write_text(json.dumps(raw))

    def change(self, edit: Callable[[dict[str, Tensor]], object]) -> None:
        """Let ``edit`` change the stored tensors."""
        tensors = load_file(self.folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, self.folder / "model.safetensors")


def write(
    model: Path,
    folder: Path,
    settings: dict[str, Any],
    round_one: Callable[[Tensor], Rounded],
    store: Callable[[Rounded], dict[str, Tensor]],
) -> Checkpoint:
    """A copy of a model's folder with the linears of its blocks packed."""
    shutil.copytree(model, folder)
    made = Checkpoint(folder)
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        path, _, leaf = name.rpartition(".")
        if tensor.ndim != 2 or not (".layers." in name or ".h." in name) or leaf != "weight" or path.endswith(".gate"):
            stored[name] = tensor
            made.weights[name] = tensor
            continue
        rounded = round_one(tensor)
        made.weights[name] = rounded.values()
        stored.update({f"{path}.{part}": value.contiguous() for part, value in store(rounded).items()})
    save_file(stored, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": settings}))
    return made
