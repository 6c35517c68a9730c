"""The NumPy decoder: alone, and bit for bit what the package's codecs say."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor.artifact.layout as layout_module
from tersor.artifact import decoder_numpy, open_artifact
from tersor.artifact.decoder_numpy import NUMPY, DecodeError, decode_weight, float_table, parse_codec, parts_of, unpack
from tersor.artifact.header import DTYPE_NAMES
from tersor.codecs import parse

SCRIPT = Path(layout_module.__file__).parent / "decoder_numpy.py"

groups = st.sampled_from(["g1", "g3", "g4", "g6", "g12", "row"])
scale_forms = st.sampled_from(["", ":bf16", ":s8"])
floats = st.sampled_from(["4:e1m2", "4:e2m1", "4:e3m0", "6:e2m3", "6:e3m2", "6:e4m1", "8:e2m5", "8:e4m3", "8:e5m2"])
leaves = st.one_of(
    st.tuples(st.integers(1, 8), groups, st.sampled_from(["", ":asym"]), scale_forms).map(
        lambda t: f"int{t[0]}:{t[1]}{t[2]}{t[3]}"
    ),
    st.tuples(floats, groups, scale_forms).map(lambda t: f"fp{t[0]}:{t[1]}{t[2]}"),
    st.tuples(st.integers(2, 4), groups).map(lambda t: f"lut{t[0]}:{t[1]}"),
    st.sampled_from(["bf16", "fp16"]),
)


@st.composite
def stretches(draw: st.DrawFn) -> tuple[str, tuple[int, int]]:
    """A ``rows(...)`` codec of one to four stretches, and a shape for it."""
    inner = draw(st.lists(leaves, min_size=1, max_size=4))
    stops = list(itertools.accumulate(draw(st.lists(st.integers(1, 4), min_size=len(inner), max_size=len(inner)))))
    text = ",".join(f"{stop}:{leaf}" for stop, leaf in zip(stops, inner, strict=True))
    return f"rows({text})", (stops[-1], 24)


whole = st.tuples(leaves, st.integers(1, 5)).map(lambda t: (t[0], (t[1], 19 if t[0].endswith("row") else 24)))


def random_parts(text: str, shape: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Valid stored tensors with random contents: any finite scale (subnormal and negative ones too), any valid code."""
    if text.startswith("rows("):
        return {
            stretch.prefix + name: tensor
            for i, stretch in enumerate(parse(text).stretches(shape[0]))
            for name, tensor in random_parts(
                str(stretch.codec), (stretch.stop - stretch.start, shape[1]), seed + i
            ).items()
        }
    rng = np.random.default_rng(seed)
    codec, (rows, columns) = parse_codec(text), shape
    usable = np.arange(2 ** min(codec.bits, 8))
    if codec.kind == "fp":
        usable = usable[~np.isnan(float_table(codec.bits, codec.exponent))]
    tensors = {}
    for part in parse(text).parts(shape):
        if part.name in ("codes", "zero"):
            count = columns if part.name == "codes" else columns // (codec.group or columns)
            codes = rng.choice(usable if part.name == "codes" else np.arange(2**codec.bits), (rows, count))
            bits = (codes[:, :, None] >> np.arange(codec.bits)) & 1
            stream = np.packbits(bits.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little")
            tensors[part.name] = torch.from_numpy(stream)
        elif part.dtype == torch.uint8:
            tensors[part.name] = torch.from_numpy(rng.integers(0, 256, part.shape, np.uint8))
        else:
            raw = rng.integers(0, 2**16, part.shape, np.uint16)
            top = 0x7C00 if part.dtype == torch.float16 else 0x7F80
            raw[(raw & top) == top] ^= 0x4000  # no infinities or NaN
            tensor = torch.from_numpy(raw.view(np.int16)).view(part.dtype)
            if part.name == "table":
                tensor = tensor.reshape(rows, -1, 2**codec.bits).sort(dim=2).values.flatten(1)
            tensors[part.name] = tensor
    return tensors


@settings(max_examples=250, deadline=None)
@given(case=whole | stretches(), seed=st.integers(0, 2**32 - 1))
def test_bit_for_bit_what_the_codecs_decode(case: tuple[str, tuple[int, int]], seed: int) -> None:
    text, shape = case
    tensors = random_parts(text, shape, seed)
    declared = parts_of(parse_codec(text), *shape)
    assert declared == {part.name: (DTYPE_NAMES[part.dtype], part.shape) for part in parse(text).parts(shape)}
    arrays = {}
    for name, tensor in tensors.items():
        dtype = DTYPE_NAMES[tensor.dtype]
        raw = tensor.contiguous().view(torch.uint8).numpy()
        arrays[name] = (dtype, raw.reshape(-1).view(NUMPY[dtype]).reshape(tensor.shape))
    with np.errstate(over="ignore", under="ignore"):
        by_numpy = decode_weight(parse_codec(text), *shape, lambda part, a, b: (arrays[part][0], arrays[part][1][a:b]))
    by_torch = parse(text).decode(tensors, shape)
    assert by_numpy.dtype == np.float32
    assert by_numpy.tobytes() == by_torch.contiguous().numpy().tobytes()


@given(bits=st.integers(1, 8), rows=st.integers(1, 3), count=st.integers(1, 40), seed=st.integers(0, 99))
def test_unpack_inverts_packing_bit_by_bit(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count))
    stream = np.zeros((rows, (count * bits + 7) // 8), np.uint8)
    for r in range(rows):
        for j in range(count):
            for k in range(bits):
                at = j * bits + k
                stream[r, at // 8] |= ((int(codes[r, j]) >> k) & 1) << (at % 8)
    np.testing.assert_array_equal(unpack(stream, bits, count), codes)


def test_tiles_make_the_same_weight(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: decoder_numpy.Folder(small).decode(name) for name in ("embed", "head", "proj")}
    monkeypatch.setattr(decoder_numpy, "TILE", 9)
    for name, weight in whole.items():
        assert decoder_numpy.Folder(small).decode(name).tobytes() == weight.tobytes()


def test_stands_alone(small: Path, tmp_path: Path) -> None:
    """In a process of its own, without the package on the path and with nothing loaded but NumPy."""
    out = tmp_path / "w.npy"
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: status = end.code\n"
        "assert not {'torch', 'tersor', 'safetensors', 'transformers'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    command = [sys.executable, "-I", "-c", code, str(SCRIPT), str(small)]
    subprocess.run([*command, "embed", "-o", str(out)], check=True, timeout=60)
    assert np.load(out).tobytes() == open_artifact(small).decode("embed").numpy().tobytes()


def test_command_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decoder_numpy.main([str(small), "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "embed\tint4:g4:asym\t[5, 8]",
        "head\tfp4:e2m1:g4\t[3, 8]",
        "proj\tfp16\t[2, 2]",
        "steps\tkept I64\t[]",
        "norm.weight\tkept BF16\t[3]",
    ]
    assert decoder_numpy.main([str(small), "norm.weight", "-o", str(tmp_path / "n.npy")]) == 0
    assert np.load(tmp_path / "n.npy").tolist() == [1.0, 0.5, -2.0]
    assert decoder_numpy.main([str(small), "nope", "-o", str(tmp_path / "x.npy")]) == 2
    assert "no layer or tensor 'nope'" in capsys.readouterr().err
    assert decoder_numpy.main([str(tmp_path / "nowhere"), "--list"]) == 2
    error = capsys.readouterr().err
    assert "config.json is missing" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.npy").exists()
    with pytest.raises(SystemExit):
        decoder_numpy.main([str(small), "embed"])


@pytest.mark.parametrize(
    "text",
    [
        *("int0:row", "int9:row", "int4", "int4:g0", "int4:g4:g4", "int4:g4:asym:asym", "int4:g4:bf16:s8"),
        *("fp4:row", "fp4:e2m2:row", "fp5:e2m2:row", "fp8:e0m7:row", "fp8:e6m1:row", "fp4:e2m1:row:asym", "lut5:row"),
        *("lut3:g4:s8", "lut3:g0", "lut3", "bf16:row", "", "int4:g4:", "int44:row", "int4:e2m1:row"),
        *("rows(", "rows()", "rows(bf16)", "rows(4:bf16", "rows(4:bf16,)", "rows(0:bf16)", "rows(4:bf16,4:fp16)"),
        *("rows(-4:bf16)", "rows(4:int9:row)", "rows(9:bf16,4:fp16)", "rows(9999999999:bf16)", "rows(4:bf16))"),
        *("rows(4:rows(4:bf16))", "rows(4:rows(2:bf16,4:fp16))", "rows(1:" * 9999 + "bf16" + ")" * 9999),
    ],
)
def test_codec_texts_that_are_none(text: str) -> None:
    with pytest.raises(DecodeError, match="codec"):
        parse_codec(text)


def test_stretches_in_a_folder(tmp_path: Path, maker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "rows(1:int6:g4:asym,4:lut2:row,9:bf16)"
    maker.build(tmp_path / "a", {"embed": (text, (9, 8))}, maker.small_kept())
    folder = decoder_numpy.Folder(tmp_path / "a")
    weight = folder.decode("embed")
    assert weight.tobytes() == open_artifact(tmp_path / "a").decode("embed").numpy().tobytes()
    assert sorted(folder.kept_names()) == ["norm.weight", "steps"]
    monkeypatch.setattr(decoder_numpy, "TILE", 17)
    assert folder.decode("embed").tobytes() == weight.tobytes()
    for other, words in ((text.replace("9:", "10:"), "end at row 9"), (text.replace("4:l", "5:l"), r"embed\.s1_codes")):
        maker.edit_json(
            tmp_path / "a" / "config.json", lambda c, to=other: c["quantization_config"]["layers"].update(embed=to)
        )
        with pytest.raises(DecodeError, match=f"layer 'embed': .*{words}"):
            decoder_numpy.Folder(tmp_path / "a").decode("embed")


def refusal(path: Path) -> str:
    """What is said when everything is decoded, or nothing."""
    try:
        folder = decoder_numpy.Folder(path)
        for layer in folder.layers:
            folder.decode(layer)
    except DecodeError as error:
        return str(error)
    return ""


def test_damaged_files_end_in_one_sentence(small: Path, maker: ModuleType) -> None:
    rng = np.random.default_rng(0)
    for name in ("model.safetensors", "config.json", "tersor.json"):
        raw = (small / name).read_bytes()
        for _ in range(150):
            changed = bytearray(raw)
            changed[rng.integers(len(raw))] = rng.integers(256)
            cut: Any = changed if rng.random() < 0.7 else changed[: rng.integers(len(raw))]
            (small / name).write_bytes(cut)
            assert "\n" not in refusal(small)
        (small / name).write_bytes(raw)
