"""Decode a tersor artifact with NumPy alone: no torch, no safetensors, nothing else of tersor.

The reference decoder of ``SPEC.md``, written to be read. With its neighbours ``decoder_numpy_*.py``, which it loads for
the codecs that they are for, it runs by itself::

    python decoder_numpy.py FOLDER --list
    python decoder_numpy.py FOLDER LAYER -o weight.npy

and gives the float32 weight ``(rows, in)`` bit for bit as specified. Sizes are checked before anything is allocated or
indexed, so a damaged file ends in one sentence, not in a crash.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Parts = dict[str, tuple[str, tuple[int, ...]]]

HEADER_LIMIT = 100_000_000
JSON_LIMIT = 256_000_000
FAMILIES = sorted(path.stem[len("decoder_numpy_") :] for path in Path(__file__).parent.glob("decoder_numpy_*.py"))
TILE = 1 << 22
"""Weights decoded at a time; bounds the memory for intermediate values."""

# NumPy has no bfloat16: it is read as the upper half of a float32.
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
WIDTH |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}
NUMPY |= {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
NUMPY |= {"BOOL": "?"}


class DecodeError(ValueError):
    """The artifact cannot be decoded. The message is one sentence: where, expected, found."""


@dataclass(frozen=True)
class Codec:
    """A codec's text, taken apart. ``group``: columns that share a scale or table, None for the whole row."""

    kind: str
    bits: int
    group: int | None = None
    asymmetric: bool = False
    scales: str = "fp16"
    exponent: int = 0
    stretches: tuple[tuple[int, Codec], ...] = ()
    """Of kind ``rows``: the row before which each stretch ends, and its codec."""
    text: str = ""  # of kind ``other``: all of it, for the neighbour that decodes it


@dataclass(frozen=True)
class Stored:
    """A tensor in a weight file. ``start``: absolute byte offset."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def parse_codec(text: str) -> Codec:
    """The codec that a text such as ``int4:g64:asym:s8`` or ``rows(100:int4:g64,900:int2:g64)`` stands for."""
    if not text.startswith("rows("):
        return _parse_leaf(text)
    pairs = [pair.partition(":") for pair in re.split(r",(?=[0-9]+:)", text[5:-1])]
    if text[-1] != ")" or not all(re.fullmatch(r"[0-9]{1,9}", stop) for stop, _, _ in pairs):
        raise DecodeError(f"codec '{text[:80]}' is not of the form rows(<stop>:<codec>,...)")
    stops = [int(stop) for stop, _, _ in pairs]
    if any(low >= high for low, high in zip([0, *stops], stops, strict=False)):
        raise DecodeError(f"codec '{text[:80]}': its stops must ascend, beginning above 0")
    leaves = [_parse_leaf(leaf) for _, _, leaf in pairs]
    return Codec("rows", 0, stretches=tuple(zip(stops, leaves, strict=True)))


def _parse_leaf(text: str) -> Codec:
    if text in ("bf16", "fp16"):
        return Codec(text, 16)
    head, *options = text.split(":")
    match = re.fullmatch(r"(int|fp|lut)(\d)", head)
    if match is None:
        _neighbour(text)
        return Codec("other", 0, text=text)
    kind, bits = match[1], int(match[2])
    groups = [option for option in options if option == "row" or re.fullmatch(r"g[1-9]\d{0,5}", option)]
    scales = [option for option in options if option in ("bf16", "s8")]
    floats = [found for option in options if (found := re.fullmatch(r"e(\d)m(\d)", option))]
    asymmetric = options.count("asym")
    known = len(groups) + len(scales) + len(floats) + asymmetric
    if known != len(options) or len(groups) != 1 or len(scales) > 1 or asymmetric > 1:
        raise DecodeError(f"codec '{text}' has options this decoder does not know, or the same one twice")
    group = None if groups[0] == "row" else int(groups[0][1:])
    form = scales[0] if scales else "fp16"
    if kind == "int" and 1 <= bits <= 8 and not floats:
        return Codec("int", bits, group, bool(asymmetric), form)
    if kind == "fp" and bits in (4, 6, 8) and len(floats) == 1 and not asymmetric:
        exponent = int(floats[0][1])
        if 1 <= exponent <= 5 and 1 + exponent + int(floats[0][2]) == bits:
            return Codec("fp", bits, group, False, form, exponent)
    if kind == "lut" and 2 <= bits <= 4 and options == groups:
        return Codec("lut", bits, group)
    raise DecodeError(f"codec '{text}' is not known to this decoder")


def _neighbour(text: str) -> Any:
    """The file beside this one that decodes a codec: ``HEAD``, ``parts`` and ``decode`` of its own."""
    head = re.split(r"[:(]", text, maxsplit=1)[0]
    for family in FAMILIES:
        name = f"decoder_numpy_{family}"
        module = import_module(f".{name}", __package__) if __package__ else import_module(name)
        if re.fullmatch(module.HEAD, head):
            return module
    raise DecodeError(f"codec '{text[:80]}' is not known to this decoder")


def _inner_decode(text: str, arrays: Mapping[str, Array], rows: int, columns: int) -> Array:
    """The weight of a codec inside another, from its raw arrays."""
    codec = parse_codec(text)
    if codec.kind == "other":
        family = _neighbour(text)
        extra = [_inner_decode] if hasattr(family, "RECURSES") else []
        return np.asarray(family.decode(text, arrays, rows, columns, *extra))
    dtypes = {name: dtype for name, (dtype, _) in parts_of(codec, rows, columns).items()}
    return decode_rows(codec, {name: (dtypes[name], array) for name, array in arrays.items()}, columns)


def _inner_parts(text: str, rows: int, columns: int) -> Parts:
    return parts_of(parse_codec(text), rows, columns)


def parts_of(codec: Codec, rows: int, columns: int) -> Parts:
    """Part name to (dtype, shape): exactly the tensors stored for a weight ``(rows, columns)``."""
    if codec.kind == "other":
        family = _neighbour(codec.text)
        return dict(family.parts(codec.text, rows, columns, *([_inner_parts] if hasattr(family, "RECURSES") else [])))
    if codec.kind == "rows":
        return {
            prefix + name: part
            for start, stop, leaf, prefix in stretches_of(codec, rows)
            for name, part in parts_of(leaf, stop - start, columns).items()
        }
    if codec.kind in ("bf16", "fp16"):
        return {"weight": ("BF16" if codec.kind == "bf16" else "F16", (rows, columns))}
    parts: Parts = {"codes": ("U8", (rows, packed_bytes(columns, codec.bits)))}
    group = codec.group or columns
    if columns % group:
        raise DecodeError(f"a group of {group} does not divide {columns} columns")
    groups = columns // group
    if codec.kind == "lut":
        return {**parts, "table": ("F16", (rows, groups * 2**codec.bits))}
    if codec.scales == "s8":
        parts |= {"scale": ("U8", (rows, groups)), "super": ("F16", (rows, 1))}
    else:
        parts |= {"scale": ("BF16" if codec.scales == "bf16" else "F16", (rows, groups))}
    if codec.asymmetric:
        parts |= {"zero": ("U8", (rows, packed_bytes(groups, codec.bits)))}
    return parts


def stretches_of(codec: Codec, rows: int) -> list[tuple[int, int, Codec, str]]:
    """(first row, row after the last, codec, prefix of the part names) of each stretch of rows with one codec."""
    if codec.kind != "rows":
        return [(0, rows, codec, "")]
    starts = [0, *(stop for stop, _ in codec.stretches)]
    if starts[-1] != rows:
        raise DecodeError(f"expected stretches that end at row {rows}, found the last to end at {starts[-1]}")
    return [(starts[i], stop, leaf, f"s{i}_") for i, (stop, leaf) in enumerate(codec.stretches)]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of ``bits`` bits each."""
    return (count * bits + 7) // 8


def unpack(stream: Array, bits: int, count: int) -> Array:
    """Little-endian bit streams ``(rows, bytes)`` to ``count`` codes a row: code j is bits ``j·bits …``."""
    first = np.arange(count) * bits
    wide = np.pad(stream, ((0, 0), (0, 1))).astype(np.uint16)  # a code touches at most two bytes
    two_bytes = wide[:, first // 8] | (wide[:, first // 8 + 1] << 8)
    return np.asarray((two_bytes >> (first % 8).astype(np.uint16)) & (2**bits - 1))


def to_float32(values: Array, dtype: str) -> Array:
    """Stored numbers to float32, exactly."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def float_table(bits: int, exponent: int) -> Array:
    """The value of every code of a small float, ``(2^bits,)`` float32; NaN for codes that must not occur."""
    mantissa = bits - 1 - exponent
    bias = 2 ** (exponent - 1) - 1
    table = np.empty(2**bits, np.float32)
    for code in range(2**bits):
        sign = -1.0 if code >> (bits - 1) else 1.0
        field = (code >> mantissa) & (2**exponent - 1)
        fraction = (code & (2**mantissa - 1)) / 2**mantissa
        number = (fraction if field == 0 else 1.0 + fraction) * 2.0 ** (max(field, 1) - bias)
        special = {(4, 3): code & 0x7F == 0x7F, (5, 2): field == 31}.get((exponent, mantissa), False)
        table[code] = np.nan if special or code == 2 ** (bits - 1) else sign * number
    return table


def decode_weight(codec: Codec, rows: int, columns: int, read: Callable[[str, int, int], tuple[str, Array]]) -> Array:
    """The float32 weight ``(rows, columns)``. ``read(part, start, stop)``: these rows of a part, as (dtype, array)."""
    weight = np.empty((rows, columns), np.float32)
    for first, end, leaf, prefix in stretches_of(codec, rows):
        names = parts_of(leaf, end - first, columns)
        if leaf.kind == "other":
            whole = {name: read(prefix + name, 0, shape[0])[1] for name, (_, shape) in names.items()}
            weight[first:end] = _inner_decode(leaf.text, whole, end - first, columns)
            continue
        for start, stop in _tiles(end - first, columns):
            tile = {name: read(prefix + name, start, stop) for name in names}
            weight[first + start : first + stop] = decode_rows(leaf, tile, columns)
    return weight


def decode_rows(codec: Codec, parts: Mapping[str, tuple[str, Array]], columns: int) -> Array:
    """Some rows of every part, as (dtype, array), to float32 ``(rows, columns)``; for any codec but ``rows(...)``."""
    if codec.kind in ("bf16", "fp16"):
        dtype, weight = parts["weight"]
        return to_float32(weight, dtype)
    codes = unpack(parts["codes"][1], codec.bits, columns)
    rows = len(codes)
    if codec.kind == "lut":
        first = np.arange(columns) // (codec.group or columns) * 2**codec.bits  # entry of each column's table
        return np.take_along_axis(to_float32(parts["table"][1], "F16"), first + codes, axis=1)
    dtype, stored = parts["scale"]
    scale = to_float32(stored, dtype)
    if codec.scales == "s8":
        scale = to_float32(parts["super"][1], "F16") * scale
    groups = scale.shape[1]
    codes = codes.reshape(rows, groups, columns // groups)
    if codec.kind == "fp":
        values = float_table(codec.bits, codec.exponent)[codes]
        if np.isnan(values).any():
            raise DecodeError(f"found the code {codes[np.isnan(values)][0]:#x}, which stands for no number")
    elif codec.asymmetric:
        zero = unpack(parts["zero"][1], codec.bits, groups).astype(np.float32)
        values = codes.astype(np.float32) - zero[:, :, None]
    else:
        values = codes.astype(np.float32) - np.float32((2**codec.bits - 1) / 2)
    return (values * scale[:, :, None]).reshape(rows, columns)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    if not path.is_file():
        raise DecodeError(f"{path} is missing; expected the folder of a tersor artifact")
    if path.stat().st_size > JSON_LIMIT:
        raise DecodeError(f"{path.name}: expected at most {JSON_LIMIT} bytes, found {path.stat().st_size}")
    return parse_json(path.name, path.read_bytes())


def parse_json(where: str, raw: bytes) -> dict[str, Any]:
    """A JSON object from bytes; no key may occur twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise DecodeError(f"{where}: a key occurs twice in one JSON object")
        return dict(pairs)

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except DecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"{where}: expected JSON, found something else ({str(error)[:80]})") from error
    if not isinstance(data, dict):
        raise DecodeError(f"{where}: expected a JSON object, found {str(data)[:80]}")
    return data


def read_header(path: Path) -> dict[str, Stored]:
    """All tensors of one safetensors file, each checked against the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise DecodeError(f"{path.name}: a header of {length} bytes does not fit a file of {size} bytes")
        entries = parse_json(f"{path.name} (header)", file.read(length))
    entries.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    position = 8 + length
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.nbytes)):
        if stored.start != position:
            raise DecodeError(f"{path.name}: expected a tensor at byte {position}, found one at {stored.start}")
        position += stored.nbytes
    if position != size:
        raise DecodeError(f"{path.name}: the tensors end at byte {position}, the file at {size}")
    return tensors


def _stored(path: Path, name: str, entry: Any, data_start: int, size: int) -> Stored:
    """One header entry, checked; the data section lies between ``data_start`` and ``size``."""
    where = f"{path.name}: tensor '{name[:80]}'"
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in WIDTH or not _sizes(shape):
        raise DecodeError(f"{where}: expected a known dtype and a shape, found {str(entry)[:80]}")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data_start:
        raise DecodeError(f"{where}: expected data_offsets inside the file, found {str(offsets)[:80]}")
    nbytes = WIDTH[dtype]
    for n in shape:
        nbytes *= n
    if nbytes != offsets[1] - offsets[0]:
        raise DecodeError(f"{where}: its shape needs {nbytes} bytes, found {offsets[1] - offsets[0]} in the header")
    return Stored(path, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < 2**63 for n in value)


class Folder:
    """An artifact: ``layers`` (name to codec text), ``shapes`` (name to ``(rows, in)``), ``tensors`` (by full name)."""

    def __init__(self, path: Path) -> None:
        quantization = read_json(path / "config.json").get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "tersor":
            raise DecodeError(f"{path / 'config.json'} has no quantization_config of tersor")
        if quantization.get("format") != 1:
            raise DecodeError(f"config.json: expected format 1, found {str(quantization.get('format'))[:80]}")
        layers, shapes = quantization.get("layers"), read_json(path / "tersor.json").get("shapes")
        if not isinstance(layers, dict) or not all(isinstance(text, str) for text in layers.values()):
            raise DecodeError("config.json: expected quantization_config.layers to map names to codecs")
        if not isinstance(shapes, dict) or not all(
            _sizes(shapes.get(name)) and len(shapes[name]) == 2 and 0 not in shapes[name] for name in layers
        ):
            raise DecodeError("tersor.json: expected 'shapes' to give two positive numbers for every layer")
        self.layers: dict[str, str] = layers
        self.shapes: dict[str, tuple[int, int]] = {name: (shapes[name][0], shapes[name][1]) for name in layers}
        self.tensors: dict[str, Stored] = {}
        for file in _weight_files(path):
            self.tensors.update(read_header(file))

    def decode(self, layer: str) -> Array:
        """The float32 weight ``(rows, in)`` of a layer."""
        try:
            return self._decode(layer)
        except ValueError as error:
            raise DecodeError(f"layer '{layer}': {error}") from error

    def _decode(self, layer: str) -> Array:
        codec = parse_codec(self.layers[layer])
        rows, columns = self.shapes[layer]
        found: dict[str, Stored] = {}
        for part, (dtype, shape) in parts_of(codec, rows, columns).items():
            stored = self.tensors.get(f"{layer}.{part}")
            if stored is None or (stored.dtype, stored.shape) != (dtype, shape):
                have = "none" if stored is None else f"{stored.dtype} {list(stored.shape)}"
                raise DecodeError(f"tensor '{layer}.{part}': expected {dtype} {list(shape)}, found {have}")
            found[part] = stored
        return decode_weight(
            codec, rows, columns, lambda part, start, stop: (found[part].dtype, read_rows(found[part], start, stop))
        )

    def kept(self, name: str) -> Array:
        """A tensor stored as it is; bfloat16 is widened to float32, 8-bit floats are given as their bytes."""
        stored = self.tensors[name]
        raw = np.fromfile(stored.path, "u1", stored.nbytes, offset=stored.start)
        values: Array = raw.view(NUMPY[stored.dtype]).reshape(stored.shape)
        return to_float32(values, "BF16") if stored.dtype == "BF16" else values

    def kept_names(self) -> list[str]:
        """Tensors that belong to no layer."""
        parts = {
            f"{layer}.{part}"
            for layer, text in self.layers.items()
            for part in parts_of(parse_codec(text), *self.shapes[layer])
        }
        return [name for name in self.tensors if name not in parts]


def _weight_files(path: Path) -> list[Path]:
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    mapping = read_json(path / "model.safetensors.index.json").get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise DecodeError("model.safetensors.index.json: expected weight_map to map tensor names to files")
    files = sorted(set(mapping.values()))
    for file in files:
        if Path(file).name != file or not (path / file).is_file():
            raise DecodeError(f"{file[:80]}: expected this weight file, which the index names, found none")
    return [path / file for file in files]


def _tiles(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, TILE // columns)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def read_rows(stored: Stored, start: int, stop: int) -> Array:
    """Rows ``start`` to ``stop`` of a stored tensor: entries of its first axis."""
    row_bytes = math.prod(stored.shape[1:]) * WIDTH[stored.dtype]
    raw = np.fromfile(stored.path, "u1", (stop - start) * row_bytes, offset=stored.start + start * row_bytes)
    values: Array = raw.view(NUMPY[stored.dtype]).reshape(stop - start, *stored.shape[1:])
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 with one sentence on standard error."""
    parser = argparse.ArgumentParser(description="Decode a tersor artifact with NumPy alone.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("layer", nargs="?", help="an encoded layer, or a kept tensor")
    parser.add_argument("-o", "--out", type=Path, help="where to write the decoded array (.npy)")
    parser.add_argument("--list", action="store_true", help="list layers with codec and shape, and kept tensors")
    options = parser.parse_args(arguments)
    if not options.list and (options.layer is None or options.out is None):
        parser.error("give a LAYER and -o OUT.npy, or --list")
    try:
        folder = Folder(options.folder)
        if options.list:
            for name, text in folder.layers.items():
                sys.stdout.write(f"{name}\t{text}\t{list(folder.shapes[name])}\n")
            for name in folder.kept_names():
                sys.stdout.write(f"{name}\tkept {folder.tensors[name].dtype}\t{list(folder.tensors[name].shape)}\n")
        elif options.layer in folder.layers:
            np.save(options.out, folder.decode(options.layer))
        elif options.layer in folder.tensors:
            np.save(options.out, folder.kept(options.layer))
        else:
            raise DecodeError(f"{options.folder} has no layer or tensor '{options.layer}'; see --list")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
