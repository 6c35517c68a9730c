"""GGUF files, dequantized into a model folder one tensor at a time.

The package ``gguf`` knows the types; transformers knows which parameter each tensor is, and what llama.cpp's converter
did to it (rows permuted, one added to norms, experts stacked). Here no more than one parameter is in memory at a time.
Every tensor is written: those that the model has no place for keep their GGUF names, so that they are accounted for.

Numbers that the file holds as such keep their type; small float32 tensors among others of 16 bits (norms) are stored in
16 bits where that loses nothing. Blocks are dequantized in float32 and rounded once: to bfloat16, or to float16 where
the bulk of the file has five bits or more, whose values bfloat16 would blur.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tersor.anatomy.headers import SINGLE, Item, header
from tersor.errors import BadInput, CorruptArtifact, UnknownArchitecture

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FINE = ("Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F16")
"""Types of five bits a weight and more, and float16 itself."""
_STRETCH = 1 << 22
"""Weights that are dequantized together."""
_ROPE = "rope_freqs.weight"
_ROPE_SHAPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1 and its successors have in common; a GGUF holds only what comes of it."""
_READ_ERRORS = (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError, struct.error)


def open_reader(file: Path) -> Any:
    """The package's reader of ``file``; tensors are memory-mapped. Raises CorruptArtifact when it is no whole GGUF."""
    from gguf import GGUFReader

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise CorruptArtifact(f"{file} is not a GGUF file: it does not begin with the letters GGUF.")
    try:
        return GGUFReader(file)
    except _READ_ERRORS as error:
        raise CorruptArtifact(f"{file} is truncated or malformed ({error}); copy or download it again.") from error


def lossy_note(reader: Any) -> str | None:
    """What the bulk of the weights was rounded to; None where the file holds only numbers as such."""
    bulk = _bulk(reader, without=_PLAIN)
    return None if bulk is None else f"GGUF {bulk}"


def check_types(reader: Any, file: Path) -> None:
    """Raise BadInput for a type of tensor that the package ``gguf`` cannot dequantize."""
    from gguf import dequantize

    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.tensor_type)
        except NotImplementedError:
            raise BadInput(
                f"Tensor {tensor.name} in {file} has the type {tensor.tensor_type.name}, which the installed package "
                "gguf cannot dequantize; upgrade it, or give a file of another type."
            ) from None


def write_folder(reader: Any, file: Path, folder: Path) -> bool:
    """Write configuration and weights of ``file`` into ``folder``; False where it must be left to transformers itself.

    Raises UnknownArchitecture when transformers cannot make a model of it.
    """
    processor, mapping, model = _understood(reader, file)
    if processor is None:
        return False
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    owners: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        target = mapping.get(tensor.name) or mapping.get(tensor.name.removesuffix(".weight"), tensor.name)
        owners.setdefault(target if target in expected else tensor.name, []).append(tensor)
    config = model.config
    if _ROPE in owners:
        _set_rope(config, owners[_ROPE][0], file)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    sizes = {name: sum(int(tensor.n_elements) for tensor in parts) for name, parts in owners.items()}
    for name, shape in expected.items():
        if name not in sizes and name not in tied:
            return False
        if name in sizes and sizes[name] != int(np.prod(shape, dtype=np.int64)):
            raise UnknownArchitecture(
                f"The parameter {name} should have the shape {shape}, and {file} gives {sizes[name]} numbers for it; "
                "what transformers makes of the file's settings does not fit its weights: give the original model."
            )
    bulk = _bulk(reader, without=("F32",))
    half = torch.float32 if bulk is None else torch.float16 if bulk in _FINE else torch.bfloat16
    config.dtype, config.architectures = half, [type(model).__name__]

    def make(name: str) -> Tensor:
        return _assembled(name, owners[name], processor, mapping, expected, file)

    parameters = [
        Item(name, _type(name, parts, half, make), expected.get(name) or _shape(parts[0]))
        for name, parts in owners.items()
    ]
    _write(folder / SINGLE, parameters, make)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    return True


def _understood(reader: Any, file: Path) -> tuple[Any, Mapping[str, str], Any]:
    """transformers' processor, names of tensors and empty model; None for all where it has another way of reading."""
    try:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
    except ImportError:
        return None, {}, None
    architecture = bytes(_value(reader, "general.architecture")).decode()
    if _has_way_of_its_own(architecture):
        return None, {}, None
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
        return processor, get_gguf_hf_weights_map(model, processor), model
    except NotImplementedError:
        return None, {}, None
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, AssertionError) as error:
        raise UnknownArchitecture(f"transformers cannot read the GGUF file {file}: {error}") from error


def _has_way_of_its_own(architecture: str) -> bool:
    """Whether transformers reads an architecture by rules other than its processors of tensors."""
    try:
        from transformers.integrations.gguf.utils import is_gguf_arch_supported
    except ImportError:
        return False
    return bool(is_gguf_arch_supported(architecture))


def _value(reader: Any, key: str) -> Any:
    found = reader.fields.get(key)
    if found is None:
        raise CorruptArtifact(f"A GGUF file needs the entry {key}, which this one does not have.")
    return found.parts[found.data[0]]


def _bulk(reader: Any, *, without: Collection[str]) -> str | None:
    """The type that holds most bytes, ``without`` some; None where there is no other."""
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        if tensor.tensor_type.name not in without:
            sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return sizes.most_common(1)[0][0] if sizes else None


def _shape(tensor: Any) -> tuple[int, ...]:
    """Axes as torch orders them: GGUF names the innermost first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def _type(name: str, parts: list[Any], half: torch.dtype, make: Callable[[str], Tensor]) -> torch.dtype:
    """The type that a parameter is written in: ``half`` if it was quantized, else its own.

    One of float32 is computed by ``make`` to see whether 16 bits hold it, unless it is large or the model is float32.
    """
    kinds = {tensor.tensor_type.name for tensor in parts}
    if kinds == {"F32"} and half != torch.float32 and sum(int(tensor.n_elements) for tensor in parts) <= _STRETCH:
        value = make(name)
        halves = (kind for kind in (half, torch.bfloat16) if torch.equal(value.to(kind).float(), value))
        return next(halves, torch.float32)
    plain = {_PLAIN[kind] for kind in kinds if kind in _PLAIN}
    if len(plain) == len(kinds) == 1:
        return plain.pop()
    return torch.float32 if plain else half


def _dequantized(tensor: Any) -> np.ndarray:
    """A tensor of the file in float32, a stretch of rows at a time."""
    from gguf import dequantize

    shape = _shape(tensor)
    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    result = np.empty((len(data), shape[-1]), dtype=np.float32)
    step = max(1, _STRETCH // max(shape[-1], 1))
    for start in range(0, len(data), step):
        result[start : start + step] = dequantize(data[start : start + step], tensor.tensor_type)
    return result.reshape(shape)


def _assembled(
    name: str, parts: list[Any], processor: Any, mapping: Mapping[str, str], expected: Mapping[str, Any], file: Path
) -> Tensor:
    """A parameter ``name`` in float32, made of its parts as transformers' ``processor`` does it."""
    if name not in expected:
        return torch.from_numpy(_dequantized(parts[0]))
    made: dict[str, Tensor] = {}
    for tensor in parts:
        done = processor.process(
            weights=_dequantized(tensor),
            name=tensor.name,
            tensor_key_mapping=mapping,
            parsed_parameters={"tensors": made},
        )
        if done.name in mapping:
            made[mapping[done.name]] = torch.from_numpy(np.ascontiguousarray(done.weights))
    if name not in made or tuple(made[name].shape) != expected[name]:
        found = tuple(made[name].shape) if name in made else None
        raise UnknownArchitecture(
            f"The parameter {name} should have the shape {expected[name]}, and {file} gives {found} ({parts[0].name}); "
            "its weights and its configuration do not belong together, or transformers reads them otherwise."
        )
    return made[name]


def _set_rope(config: Any, tensor: Any, file: Path) -> None:
    """Put the scaling of rotary frequencies, which a file holds as numbers, into the configuration.

    transformers leaves it out, and the model would be another one. Raises UnknownArchitecture when the numbers are not
    those of any Llama 3.
    """
    found = torch.from_numpy(_dequantized(tensor)).double()
    factor = round(float(found.max()), 3)
    if factor == 1.0:
        return
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = float(parameters.get("rope_theta", 10000.0))
    wave = 2 * torch.pi * theta ** (torch.arange(len(found), dtype=torch.float64) / len(found))
    low, high = (
        _ROPE_SHAPE["original_max_position_embeddings"] / _ROPE_SHAPE[f"{end}_freq_factor"] for end in ("low", "high")
    )
    smooth = (low / wave - 1) / (_ROPE_SHAPE["high_freq_factor"] - _ROPE_SHAPE["low_freq_factor"])
    between = 1 / ((1 - smooth) / factor + smooth)
    expected = torch.where(wave < high, 1.0, torch.where(wave > low, factor, between))
    if not torch.allclose(found, expected, rtol=1e-3):
        raise UnknownArchitecture(
            f"{file} scales its rotary frequencies by {_ROPE} in a way that transformers cannot express; give the "
            "original model."
        )
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **_ROPE_SHAPE}


def _write(path: Path, parameters: list[Item], make: Callable[[str], Tensor]) -> None:
    """A safetensors file whose tensors are made when their turn comes."""
    with path.open("wb") as stream:
        stream.write(header(parameters))
        for one in parameters:
            for piece in _pieces(make(one.name), one.dtype):
                stream.write(piece)


def _pieces(value: Tensor, dtype: torch.dtype) -> Iterator[bytes]:
    flat = value.reshape(-1)
    for start in range(0, len(flat), _STRETCH):
        yield flat[start : start + _STRETCH].to(dtype).view(torch.uint8).numpy().tobytes()
