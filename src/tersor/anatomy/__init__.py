"""What a model is made of, found from its structure and its weight files.

Most of it needs transformers' model code, which takes seconds to import and 70 MB; whoever only reads weight files or
runs an artifact again needs none of that, so names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tersor.anatomy.folder import cache_folder
    from tersor.anatomy.residual import mark_writers
    from tersor.anatomy.shards import TensorInfo
    from tersor.anatomy.source import Source, open_source
    from tersor.anatomy.structure import analyse, skeleton
    from tersor.anatomy.weights import WeightLoader
    from tersor.anatomy.whole import load_whole

__all__ = [
    "Source",
    "TensorInfo",
    "WeightLoader",
    "analyse",
    "cache_folder",
    "load_whole",
    "mark_writers",
    "open_source",
    "skeleton",
]

_HOMES = {
    "Source": "source",
    "TensorInfo": "shards",
    "WeightLoader": "weights",
    "analyse": "structure",
    "cache_folder": "folder",
    "load_whole": "whole",
    "mark_writers": "residual",
    "open_source": "source",
    "skeleton": "structure",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
