"""Makes the golden artifacts: good ones, and broken ones that must fail with a named error.

Run ``python tests/golden/make_artifacts.py`` to write them anew; a test checks that this gives the very same bytes, so
a change of the format cannot go unnoticed. Contents are simple arithmetic patterns, packed here bit by bit and not by
the package, so that the files do not depend on the code they test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tersor.artifact import (
    ArtifactWriter,
    Manifest,
    SourceRecord,
    TextRecord,
    compute_layout,
    hash_files,
    publish,
    quantization_config,
    read_manifest,
    write_calibration,
    write_manifest,
)
from tersor.artifact.decoder_numpy import Folder, float_table, parse_codec
from tersor.codecs import parse
from tersor.contracts import Choice, Plan, Quality

HERE = Path(__file__).parent / "artifact"
GOOD = ("good-every-codec", "good-sharded")

CODECS = (
    *(f"int{bits}:g8" for bits in range(1, 9)),
    *(f"int{bits}:g4:asym" for bits in range(1, 9)),
    *(
        "int3:row",
        "int5:row:asym",
        "int4:g8:bf16",
        "int4:g8:s8",
        "int3:g6:asym:s8",
        "int6:row:asym:bf16",
        "int2:row:s8",
    ),
    *("fp4:e2m1:g8", "fp4:e1m2:row", "fp4:e3m0:g4:bf16", "fp6:e2m3:g8", "fp6:e3m2:g6:s8", "fp6:e5m0:row"),
    *("fp8:e4m3:row", "fp8:e5m2:g8", "fp8:e3m4:g12:s8", "lut2:row", "lut3:row", "lut4:row", "bf16", "fp16"),
    *("rows(1:int5:row:asym:s8,2:lut2:row,3:bf16)", "rows(2:int6:row,3:fp4:e2m1:row)"),
)


def pack_by_hand(codes: list[list[int]], bits: int) -> Tensor:
    """Codes to bytes through one big integer a row: code j is shifted to bit j * bits."""
    rows = []
    for row in codes:
        number = sum(code << (j * bits) for j, code in enumerate(row))
        rows.append(list(number.to_bytes((len(row) * bits + 7) // 8, "little")))
    return torch.tensor(rows, dtype=torch.uint8)


def tensors_by_hand(text: str, shape: tuple[int, int], salt: int = 0) -> dict[str, Tensor]:
    """Valid parts for a codec, by part name, filled with patterns that exercise all codes."""
    if text.startswith("rows("):
        return {
            prefix + name: tensor
            for start, stop, inner, prefix in _stretches_by_hand(text)
            for name, tensor in tensors_by_hand(inner, (stop - start, shape[1]), salt + start).items()
        }
    codec, (rows, columns) = parse_codec(text), shape
    tensors: dict[str, Tensor] = {}
    usable = list(range(2**codec.bits)) if codec.bits <= 8 else []
    if codec.kind == "fp":
        table = float_table(codec.bits, codec.exponent)
        usable = [code for code in usable if table[code] == table[code]]
    groups = columns // (codec.group or columns)
    for part in parse(text).parts(shape):
        r = torch.arange(part.shape[0])[:, None] + salt
        c = torch.arange(part.shape[1])[None, :]
        if part.name in ("codes", "zero"):
            count = columns if part.name == "codes" else groups
            pattern = [[usable[(11 * (i + salt) + 7 * j) % len(usable)] for j in range(count)] for i in range(rows)]
            tensors[part.name] = pack_by_hand(pattern, codec.bits)
        elif part.name == "scale" and part.dtype == torch.uint8:
            tensors["scale"] = (1 + (17 * r + 29 * c) % 255).to(torch.uint8)
        elif part.name in ("scale", "super"):
            power = -5.0 if part.name == "scale" else -12.0
            tensors[part.name] = ((1 + (3 * r + 5 * c) % 8 / 8) * 2.0**power).to(part.dtype)
        elif part.name == "table":
            tensors["table"] = ((c - part.shape[1] / 2 + r / 8) / 16).to(part.dtype)
        else:
            tensors[part.name] = ((37 * (r * columns + c) % 256 - 128) / 64).to(part.dtype)
    return tensors


def _stretches_by_hand(text: str) -> list[tuple[int, int, str, str]]:
    """First row, row after the last, codec text and prefix of the parts of each stretch."""
    pairs = [pair.split(":", 1) for pair in text.removeprefix("rows(").removesuffix(")").split(",")]
    starts = [0, *(int(stop) for stop, _ in pairs)]
    return [(starts[i], int(stop), inner, f"s{i}_") for i, (stop, inner) in enumerate(pairs)]


def build(
    folder: Path,
    layers: Mapping[str, tuple[str, tuple[int, int]]],
    kept: Mapping[str, Tensor],
    *,
    max_shard_size: int = 10**9,
) -> None:
    """A complete artifact with hand-made contents. ``layers``: name to (codec text, shape)."""
    units = {
        name: {f"{name}.{part}": tensor for part, tensor in tensors_by_hand(text, shape, salt).items()}
        for salt, (name, (text, shape)) in enumerate(layers.items())
    }
    units["kept"] = dict(kept)
    flat = {key: (tensor.dtype, tuple(tensor.shape)) for unit in units.values() for key, tensor in unit.items()}
    layout = compute_layout(flat, max_shard_size=max_shard_size)
    partial = folder.with_name(folder.name + ".partial")
    with ArtifactWriter(partial, layout, {"model": "by hand"}) as writer:
        for name, unit in units.items():
            writer.write(name, unit)
        writer.finish()
    config = {"model_type": "llama", "quantization_config": quantization_config({n: t for n, (t, _) in layers.items()})}
    (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    ids_hash = write_calibration(partial, torch.arange(12).reshape(2, 6))
    choices = {name: Choice(text, parse(text).bits(shape) // 8, 0.25) for name, (text, shape) in layers.items()}
    manifest = Manifest(
        versions={"tersor": "0.1.0", "torch": "2.6.0", "transformers": "5.10.0"},
        source=SourceRecord("by hand", "0" * 64),
        plan=Plan(choices, layout.total_bytes, layout.total_bytes, 0.25 * len(choices), {"seed": 0}),
        shapes={name: shape for name, (_, shape) in layers.items()},
        kept={name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()},
        text=TextRecord("by hand", 12, 0, ids_hash),
        quality=Quality(0.01, 0.001, 10.5, 10.25, 0.875, 12, "by hand"),
        errors=dict.fromkeys(layers, 0.125),
        notes=("Contents are patterns, not a model.",),
        files=hash_files(partial),
    )
    write_manifest(partial, manifest)
    publish(partial, folder)


def small_layers() -> dict[str, tuple[str, tuple[int, int]]]:
    return {"embed": ("int4:g4:asym", (5, 8)), "head": ("fp4:e2m1:g4", (3, 8)), "proj": ("fp16", (2, 2))}


def small_kept() -> dict[str, Tensor]:
    return {"norm.weight": torch.tensor([1.0, 0.5, -2.0], dtype=torch.bfloat16), "steps": torch.tensor(3)}


def edit_header(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON header of the weights file; the data stays."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    replace_header(folder, json.dumps(header, separators=(",", ":")).encode())


def replace_header(folder: Path, text: bytes) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def set_length(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=1) + "\n")


def poke(folder: Path, tensor: str, value: int) -> None:
    """Set the first byte of a tensor."""
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    raw[8 + length + json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0]] = value
    path.write_bytes(raw)


def _duplicate(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = raw[8 : 8 + length].rstrip()
    replace_header(folder, text[:-1] + b',"steps":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}')


def _extra(folder: Path) -> None:
    path = folder / "model.safetensors"
    size = path.stat().st_size
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    end = size - 8 - length
    path.write_bytes(path.read_bytes() + b"\x01\x02")
    edit_header(folder, lambda h: h.update(intruder={"dtype": "U8", "shape": [2], "data_offsets": [end, end + 2]}))


def _cut_last(folder: Path) -> None:
    """Remove the last tensor of the file, data and all."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-12])
    edit_header(folder, lambda h: h.pop("head.codes"))


# Name: (error class, words the message must hold, the damage). Unless the damage is to sizes or sums themselves, the
# manifest is brought in line afterwards, so that the deeper check is what fails.
BROKEN: dict[str, tuple[str, tuple[str, ...], Callable[[Path], None]]] = {
    "truncated": (
        "CorruptArtifact",
        ("model.safetensors", "bytes", "truncated"),
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-5]),
    ),
    "truncated-to-nothing": (
        "CorruptArtifact",
        ("model.safetensors", "found only 4 bytes"),
        lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0"),
    ),
    "header-length-huge": (
        "CorruptArtifact",
        ("model.safetensors", str(2**60)),
        lambda f: set_length(f, 2**60),
    ),
    "header-length-past-end": ("CorruptArtifact", ("model.safetensors", "9999"), lambda f: set_length(f, 9999)),
    "header-not-json": (
        "CorruptArtifact",
        ("model.safetensors", "expected JSON"),
        lambda f: replace_header(f, b'{"embed.codes":'),
    ),
    "header-nested": (
        "CorruptArtifact",
        ("model.safetensors",),  # some Pythons refuse the depth, others get through and find no tensor entry
        lambda f: replace_header(f, b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}"),
    ),
    "tensor-twice": ("CorruptArtifact", ("model.safetensors", "'steps'", "twice"), _duplicate),
    "dtype-unknown": (
        "CorruptArtifact",
        ("model.safetensors", "'embed.codes'", "U4"),
        lambda f: edit_header(f, lambda h: h["embed.codes"].update(dtype="U4")),
    ),
    "shape-negative": (
        "CorruptArtifact",
        ("model.safetensors", "'embed.codes'", "-5"),
        lambda f: edit_header(f, lambda h: h["embed.codes"].update(shape=[-5, -4])),
    ),
    "shape-huge": (
        "CorruptArtifact",
        ("model.safetensors", "'embed.codes'", "needs"),
        lambda f: edit_header(f, lambda h: h["embed.codes"].update(shape=[2**62, 2**62])),
    ),
    "offsets-past-end": (
        "CorruptArtifact",
        ("model.safetensors", "'embed.codes'", "data_offsets"),
        lambda f: edit_header(f, lambda h: h["embed.codes"].update(data_offsets=[10**6, 10**6 + 20])),
    ),
    "offsets-overlap": (
        "CorruptArtifact",
        ("model.safetensors", "begins at data byte"),
        lambda f: edit_header(f, lambda h: h["head.codes"].update(data_offsets=[0, 12])),
    ),
    "offsets-hole": (
        "CorruptArtifact",
        ("model.safetensors", "begins at data byte"),
        lambda f: edit_header(f, lambda h: h.pop("head.scale")),
    ),
    "dtype-wrong": (
        "CorruptArtifact",
        ("model.safetensors", "'embed.scale'", "expected F16 [5, 2]", "found BF16 [5, 2]"),
        lambda f: edit_header(f, lambda h: h["embed.scale"].update(dtype="BF16")),
    ),
    "shape-wrong": (
        "CorruptArtifact",
        ("model.safetensors", "'embed.codes'", "expected U8 [5, 4]", "found U8 [4, 5]"),
        lambda f: edit_header(f, lambda h: h["embed.codes"].update(shape=[4, 5])),
    ),
    "part-missing": (
        "CorruptArtifact",
        ("model.safetensors", "'head.codes'", "expected U8 [3, 4]", "found none"),
        _cut_last,
    ),
    "tensor-extra": ("CorruptArtifact", ("model.safetensors", "'intruder'"), _extra),
    "codec-unknown": (
        "CorruptArtifact",
        ("config.json", "'head'", "int9"),
        lambda f: edit_json(
            f / "config.json", lambda c: c["quantization_config"]["layers"].update({"head": "int9:g4"})
        ),
    ),
    "group-does-not-divide": (
        "CorruptArtifact",
        ("'head'", "g3", "8"),
        lambda f: edit_json(
            f / "config.json", lambda c: c["quantization_config"]["layers"].update({"head": "fp4:e2m1:g3"})
        ),
    ),
    "layer-missing": (
        "CorruptArtifact",
        ("config.json", "'proj'"),
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"]["layers"].pop("proj")),
    ),
    "format-newer": (
        "BadInput",
        ("config.json", "format 2", "upgrade"),
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(format=2)),
    ),
    "other-method": (
        "BadInput",
        ("config.json", "not a tersor artifact"),
        lambda f: edit_json(f / "config.json", lambda c: c["quantization_config"].update(quant_method="gptq")),
    ),
    "manifest-missing": ("BadInput", ("tersor.json", "missing"), lambda f: (f / "tersor.json").unlink()),
    "manifest-path-outside": (
        "CorruptArtifact",
        ("tersor.json", "../secret"),
        lambda f: edit_json(
            f / "tersor.json", lambda m: m["files"].update({"../secret": {"bytes": 1, "sha256": "0" * 64}})
        ),
    ),
    "manifest-shape-text": (
        "CorruptArtifact",
        ("tersor.json", "shapes.head"),
        lambda f: edit_json(f / "tersor.json", lambda m: m["shapes"].update(head="3x8")),
    ),
    "weights-missing": (
        "CorruptArtifact",
        ("model.safetensors", "found neither"),
        lambda f: (f / "model.safetensors").unlink(),
    ),
}
UNTOUCHED_MANIFEST = ("truncated", "manifest-missing", "manifest-path-outside", "manifest-shape-text")

# Opened without complaint, found by an explicit look: (what fails, words of the message, the damage).
HIDDEN: dict[str, tuple[str, tuple[str, ...], Callable[[Path], None]]] = {
    "hidden-changed-byte": (
        "verify_hashes",
        ("model.safetensors", "SHA-256"),
        lambda f: poke(f, "embed.codes", 0xFF),
    ),
    "hidden-reserved-code": (
        "decoder_numpy",
        ("head", "0x8"),
        lambda f: poke(f, "head.codes", 0x08),
    ),
}


def make_all(root: Path) -> None:
    """Write all golden artifacts under ``root``, and ``decoded.json`` with the SHA-256 of each good layer's weight."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    every = {f"layer.{i:02d}": (text, (3, 21 if "row" in text else 24)) for i, text in enumerate(CODECS)}
    build(root / "good-every-codec", every, small_kept())
    build(root / "good-sharded", small_layers(), small_kept(), max_shard_size=40)
    for name, (_, _, damage) in {**BROKEN, **HIDDEN}.items():
        folder = root / name
        build(folder, small_layers(), small_kept())
        damage(folder)
        if name not in UNTOUCHED_MANIFEST and name != "hidden-changed-byte":
            manifest = read_manifest(folder)
            write_manifest(folder, dataclasses.replace(manifest, files=hash_files(folder)))
    decoded = {}
    for name in GOOD:
        folder = Folder(root / name)
        decoded[name] = {layer: hashlib.sha256(folder.decode(layer).tobytes()).hexdigest() for layer in folder.layers}
    (root / "decoded.json").write_text(json.dumps(decoded, indent=1) + "\n")


if __name__ == "__main__":
    make_all(HERE)
