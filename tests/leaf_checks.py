"""What the tests of single leaf codecs share."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Gram, LeafCodec
from tersor.solvers import Encoder, ErrorFeedback, Nearest

NAMES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}


def leaf(text: str) -> LeafCodec:
    codec = parse(text)
    assert isinstance(codec, LeafCodec)
    return codec


def gaussian(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated_gram(columns: int, seed: int = 2) -> Gram:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(2, 0.05, columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ mix
    return Gram(x.T @ x / len(x), len(x))


def squared_error(text: str, weight: Tensor) -> float:
    """Mean squared error of rounding to nearest."""
    _, values = Encoder(Nearest())(weight, leaf(text), None)
    return float((weight - values).square().mean())


def check_numpy_decoder(module: ModuleType, text: str, rows: int, columns: int) -> None:
    """The NumPy decoder declares the same parts and decodes the same bits as torch, on the path of the encoder."""
    codec = leaf(text)
    weight = gaussian(rows, columns) * 0.02
    tensors, values = Encoder(ErrorFeedback())(weight, codec, correlated_gram(columns))
    declared = {part.name: (NAMES[part.dtype], part.shape) for part in codec.parts((rows, columns))}
    assert module.parts(text, rows, columns) == declared
    assert {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()} == declared
    assert codec.bits((rows, columns)) == 8 * sum(tensor.nbytes for tensor in tensors.values())
    arrays = {
        name: (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in tensors.items()
    }
    decoded = module.decode(text, arrays, rows, columns)
    assert decoded.dtype == np.float32
    assert torch.equal(torch.from_numpy(decoded), values)
    assert torch.equal(codec.decode(tensors, (rows, columns)), values)
    some = codec.decode_rows(tensors, (rows, columns), torch.tensor([rows - 1, 0]))
    assert torch.equal(some, values[[rows - 1, 0]])
