"""All engines that a model can be written for, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tersor.engines.compressed_tensors.engine import ENGINE as COMPRESSED_TENSORS
from tersor.engines.contract import Engine
from tersor.engines.llama_cpp.engine import ENGINE as LLAMA_CPP
from tersor.engines.onnx.engine import ONNX, ONNX_QDQ
from tersor.errors import BadInput

NATIVE = "transformers"
"""What reads artifacts as they are, with every codec."""
ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (LLAMA_CPP, COMPRESSED_TENSORS, ONNX, ONNX_QDQ)}
ALIASES = {"vllm": "compressed-tensors", "sglang": "compressed-tensors"}
"""Programs that run another engine's files."""


def find_engine(name: str) -> Engine | None:
    """The engine of that name; None for transformers. Raises BadInput for one that is not known."""
    if name == NATIVE:
        return None
    name = ALIASES.get(name, name)
    if name not in ENGINES:
        raise BadInput(f"The engine {name!r} is unknown; use {' or '.join((NATIVE, *ENGINES, *ALIASES))}.")
    return ENGINES[name]


def engine_of(path: Path) -> Engine:
    """The engine that a file or folder is for, by what it holds. Raises BadInput where there is none."""
    if not path.exists():
        raise BadInput(f"{path} does not exist; give a file of {' or '.join(ENGINES)}.")
    found = next((engine for engine in ENGINES.values() if engine.recognises(path)), None)
    if found is None:
        raise BadInput(f"{path} is for no engine that is known here; known are files of {' and '.join(ENGINES)}.")
    return found
