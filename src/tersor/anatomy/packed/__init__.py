"""Checkpoints whose weights are packed for an engine, read as if they held ordinary weights.

A packed linear becomes one :class:`~tersor.anatomy.shards.ComputedTensor` called ``<module>.weight``, ``(out, in)``: it
is dequantized when it is asked for and never kept. So the rest of tersor sees an ordinary model, and no copy of it is
written anywhere. One file a layout; each says where the layout is defined.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tersor.anatomy.packed import autoround, awq, compressed, gptq
from tersor.anatomy.packed.module import Packed
from tersor.anatomy.shards import TensorInfo
from tersor.errors import BadInput, CorruptArtifact

Settings = Mapping[str, Any]
Reader = Callable[[Settings, Mapping[str, TensorInfo]], "dict[str, Packed]"]

_READERS: dict[str, tuple[str, Reader]] = {
    "gptq": ("GPTQ", gptq.read),
    "awq": ("AWQ", awq.read),
    "auto-round": ("AutoRound", autoround.read),
    "compressed-tensors": ("compressed-tensors", compressed.read),
    "fp8": ("FP8", compressed.read_blocks),
}
_BESIDE = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))
"""Files that older writers put beside a config.json which says nothing, and the method that each is of."""
BESIDE = tuple(name for name, _ in _BESIDE)
_KEYS = ("quantization_config", "compression_config")


def _settings(raw: Settings, folder: Path, *, packed: bool) -> Settings | None:
    """What a folder says of how it is quantized, ``quant_method`` included; None where it says nothing.

    ``raw``: its config.json. ``packed``: whether it holds packed weights; then a file beside config.json is believed.
    Raises CorruptArtifact when either says it in a way that cannot be read.
    """
    text = raw.get("text_config")
    for part in (raw, text if isinstance(text, dict) else {}):
        for key in _KEYS:
            found = part.get(key)
            if found:
                if not isinstance(found, dict):
                    raise CorruptArtifact(f"{key} in {folder / 'config.json'} is not a JSON object.")
                return found
    for name, method in _BESIDE:
        if packed and (folder / name).is_file():
            try:
                beside = json.loads((folder / name).read_text("utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise CorruptArtifact(f"{folder / name} is not JSON: {error}.") from None
            if isinstance(beside, dict):
                return {"quant_method": method, **beside}
    return None


def without_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of quantization: the one of the dequantized model."""
    plain = {key: value for key, value in raw.items() if key not in _KEYS}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in plain["text_config"].items() if key not in _KEYS}
    return plain


def unpack(
    raw: Settings, tensors: Mapping[str, TensorInfo], folder: Path
) -> tuple[Mapping[str, TensorInfo], str | None]:
    """The tensors of ``folder`` with packed ones replaced by what they stand for, and how they were packed.

    ``raw``: its config.json. Nothing but small index tensors is read. A folder that is not quantized comes back as it
    is, with None. Raises BadInput for a method or layout that is not read, CorruptArtifact for tensors that are missing
    or do not fit together, each naming the tensor.
    """
    settings = _settings(raw, folder, packed=any(name.endswith(".qweight") for name in tensors))
    if settings is None:
        return tensors, None
    method = str(settings.get("quant_method") or "an unnamed method").lower()
    if method not in _READERS:
        raise BadInput(_refusal(method, folder))
    title, read = _READERS[method]
    made = read({**settings, "dtype": raw.get("dtype") or raw.get("torch_dtype")}, tensors)
    if not made:
        raise CorruptArtifact(f"{folder} says that it is quantized with {method}, but holds no tensor packed that way.")
    return _merged(tensors, made), f"{title} {_schemes(made)}"


def _refusal(method: str, folder: Path) -> str:
    if method == "tersor":
        return f"{folder} is quantized with tersor (it was written by tersor already); give the original model instead."
    if method in ("bitsandbytes", "bnb"):
        return (
            f"{folder} is quantized with bitsandbytes, whose formats only its own package reads: give the original "
            "model, or write it once as AutoModelForCausalLM.from_pretrained(folder).dequantize().save_pretrained(new) "
            "where bitsandbytes is installed, and give that folder."
        )
    return (
        f"{folder} is quantized with {method}, which is not read (read are {', '.join(_READERS)} and GGUF); "
        "give the original model instead."
    )


def _merged(tensors: Mapping[str, TensorInfo], made: Mapping[str, Packed]) -> dict[str, TensorInfo]:
    """``tensors`` in their order, each packed module in the place of the first of its parts."""
    owner = {part.name: name for name, packed in made.items() for part in packed.tensor.stored}
    merged: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        made_here = owner.get(name)
        if made_here is None:
            if name in made:
                raise CorruptArtifact(
                    f"{info.file} holds {name} as it is, and packed too ({made[name].tensor.stored[0].name}); "
                    "one of them is wrong."
                )
            merged[name] = info
        else:
            merged.setdefault(made_here, made[made_here].tensor)
    return merged


def _schemes(made: Mapping[str, Packed]) -> str:
    """How the weights are stored, most of them first: "4-bit g128, 8-bit g32"."""
    weights: Counter[str] = Counter()
    for packed in made.values():
        weights[packed.scheme] += packed.tensor.nbytes
    names = [name for name, _ in weights.most_common()]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


__all__ = ["BESIDE", "Packed", "unpack", "without_settings"]
