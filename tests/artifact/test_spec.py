"""The worked examples of SPEC.md, run: with the NumPy decoder and with the package's codecs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import tersor.artifact.layout as layout_module
from tersor.artifact.decoder_numpy import NUMPY, decode_weight, parse_codec, parts_of, read_header
from tersor.artifact.header import DTYPE_NAMES
from tersor.artifact.layout import compute_layout
from tersor.codecs import parse

SPEC = (Path(layout_module.__file__).parent / "SPEC.md").read_text()
EXAMPLES = [json.loads(block) for block in re.findall(r"```json example\n(.*?)```", SPEC, re.S)]


def test_there_is_an_example_for_every_kind_of_codec() -> None:
    kinds = {(parse_codec(example["codec"]).kind, parse_codec(example["codec"]).scales) for example in EXAMPLES}
    assert {kind for kind, _ in kinds} == {"int", "fp", "lut", "bf16", "fp16", "rows", "other"}
    assert {scales for _, scales in kinds} == {"fp16", "bf16", "s8"}


@pytest.mark.parametrize("example", EXAMPLES, ids=[example["codec"] for example in EXAMPLES])
def test_example(example: dict[str, Any]) -> None:
    rows, columns = example["shape"]
    expected = np.array(example["weight"], np.float32)
    declared = {name: (dtype, tuple(shape)) for name, (dtype, shape, _) in example["parts"].items()}
    assert declared == parts_of(parse_codec(example["codec"]), rows, columns)
    codec = parse(example["codec"])
    assert str(codec) == example["codec"]
    assert declared == {part.name: (DTYPE_NAMES[part.dtype], part.shape) for part in codec.parts((rows, columns))}
    arrays, tensors = {}, {}
    for name, (dtype, shape, text) in example["parts"].items():
        raw = np.frombuffer(bytes.fromhex(text), np.uint8)
        arrays[name] = (dtype, raw.view(NUMPY[dtype]).reshape(shape))
        torch_dtype = {name: dtype for dtype, name in DTYPE_NAMES.items()}[dtype]
        tensors[name] = torch.from_numpy(raw.copy()).view(torch_dtype).reshape(shape)
    by_numpy = decode_weight(
        parse_codec(example["codec"]), rows, columns, lambda part, a, b: (arrays[part][0], arrays[part][1][a:b])
    )
    assert by_numpy.tobytes() == expected.tobytes()
    assert codec.decode(tensors, (rows, columns)).numpy().tobytes() == expected.tobytes()


def test_whole_file_example(tmp_path: Path) -> None:
    block = re.search(r"```hex file\n(.*?)```", SPEC, re.S)
    assert block is not None
    raw = b"".join(bytes.fromhex(line[6:53]) for line in block[1].splitlines())
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    layout = compute_layout({"a.codes": (torch.uint8, (2, 3)), "a.scale": (torch.float16, (2, 1))})
    assert len(raw) == layout.total_bytes
    assert raw.startswith(layout.shards[0].header)
    tensors = safetensors.torch.load_file(path)
    assert set(read_header(path)) == set(tensors) == {"a.codes", "a.scale"}
    weight = parse("int8:row").decode({name[2:]: tensor for name, tensor in tensors.items()}, (2, 3))
    torch.testing.assert_close(weight, torch.tensor([[-63.75, -0.25, 63.75], [1.0, -253.0, -251.0]]), rtol=0, atol=0)


def test_packing_example() -> None:
    assert "the bytes\n`d1 58 1f`" in SPEC
    number = sum(code << (3 * j) for j, code in enumerate([1, 2, 3, 4, 5, 6, 7, 0]))
    assert number.to_bytes(3, "little").hex(" ") == "d1 58 1f"
