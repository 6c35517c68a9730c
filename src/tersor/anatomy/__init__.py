"""What a model is made of, found from its structure and its weight files."""

from __future__ import annotations

from tersor.anatomy.cache import cache_folder
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
