"""Writes ``packed.safetensors``: linears that other programs packed, and what they say that those stand for.

Run it once in an environment with GPTQModel 7.6 and once in one with compressed-tensors 0.19; no other needs them:

    python make_packed.py MODEL gptqmodel            # MODEL: a folder with a small Llama, float16, and a tokenizer
    python make_packed.py MODEL compressed-tensors

Each case keeps one linear; of its dequantized weight only type, shape and SHA-256 are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).with_name("packed.safetensors")
MODULE = "model.layers.0.self_attn.k_proj"
GPTQ: dict[str, dict[str, Any]] = {
    "gptq4-sorted": {"bits": 4, "group_size": 32, "desc_act": True, "sym": True},
    "gptq4-v2": {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "format": "gptq_v2"},
    "gptq3": {"bits": 3, "group_size": 32, "desc_act": False, "sym": False},
    "gptq8": {"bits": 8, "group_size": -1, "desc_act": False, "sym": True, "act_group_aware": False},
    "gptq2-sorted": {"bits": 2, "group_size": 32, "desc_act": True, "sym": False},
}
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "packed4": ("pack-quantized", {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}),
    "packed4-asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 16},
    ),
    "packed3": ("pack-quantized", {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": 16}),
    "packed8": ("pack-quantized", {"num_bits": 8, "symmetric": True, "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "symmetric": True, "strategy": "channel"}),
    "int8-tensor": ("int-quantized", {"num_bits": 8, "symmetric": False, "strategy": "tensor"}),
    "float8": ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}),
    "float8-blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "block", "block_structure": [12, 20]},
    ),
}


def keep(name: str, settings: dict[str, Any], tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    """Put one case into the file, beside those that are there."""
    held, cases = {}, {}
    if GOLDEN.exists():
        with safe_open(GOLDEN, "pt") as file:
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
            cases = json.loads(file.metadata()["cases"])
    weight = weight.contiguous()
    digest = hashlib.sha256(weight.view(torch.uint8).numpy().tobytes()).hexdigest()
    cases[name] = {"settings": settings, "dtype": str(weight.dtype), "shape": list(weight.shape), "sha256": digest}
    held.update({f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()})
    save_file(held, GOLDEN, metadata={"cases": json.dumps(cases, sort_keys=True)})


def parts(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{MODULE}.")}


def by_gptqmodel(model: Path) -> None:
    """Quantize with GPTQModel, load what it saved, and let its own kernel dequantize."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, pack_awq

    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 100, (48,), generator=draw).tolist() for _ in range(24)]
    for name, wanted in GPTQ.items():
        with tempfile.TemporaryDirectory() as folder:
            packer = GPTQModel.load(str(model), QuantizeConfig(device="cpu", **wanted))
            packer.quantize([{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids], batch_size=1)
            packer.save(folder)
            loaded = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
            settings = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
            settings.pop("meta")
            with torch.no_grad():
                weight = loaded.model.get_submodule(MODULE).dequantize_weight().T
            keep(name, settings, parts(Path(folder)), weight)
    codes = torch.randint(0, 16, (64, 32), generator=draw)
    zeros = torch.randint(0, 16, (4, 32), generator=draw)
    qweight, qzeros = pack_awq(codes, zeros, 4)
    scales = (torch.rand(4, 32, generator=draw) / 8).half()
    keep(
        "awq4",
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
        {"qweight": qweight, "qzeros": qzeros, "scales": scales},
        dequantize_gemm(qweight, qzeros, scales, 4, 16).T,
    )


def by_compressed_tensors(model: Path) -> None:
    """Round to nearest, and have the library's compressors store and restore that."""
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = load_file(model / "model.safetensors")[f"{MODULE}.weight"].to(torch.bfloat16)
    for name, (form, wanted) in COMPRESSED.items():
        args = QuantizationArgs(**{"type": "int", **wanted})
        rows, columns = {
            "group": (1, args.group_size),
            "channel": (1, weight.shape[1]),
            "tensor": tuple(weight.shape),
            "block": tuple(args.block_structure or ()),
        }[str(args.strategy)]
        down, across = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
        padded = torch.zeros(down * rows, across * columns, dtype=weight.dtype)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        tiles = padded.reshape(down, rows, across, columns)
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
        if str(args.strategy) == "tensor":
            low, high = low.flatten(), high.flatten()
        scale, zero = calculate_qparams(low, high, args)
        state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16)}
        state |= {} if args.symmetric else {"weight_zero_point": zero}
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = PackedQuantizationCompressor if form == "pack-quantized" else NaiveQuantizationCompressor
        stored = compressor.compress(state, scheme)
        settings = {
            "quant_method": "compressed-tensors",
            "format": form,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}},
        }
        tensors = {leaf: tensor for leaf, tensor in stored.items() if isinstance(tensor, torch.Tensor)}
        keep(name, settings, tensors, compressor.decompress(stored, scheme)["weight"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"gptqmodel": by_gptqmodel, "compressed-tensors": by_compressed_tensors}[sys.argv[2]](Path(sys.argv[1]))
