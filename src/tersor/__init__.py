"""tersor: the best model that fits a given number of bytes, with the loss measured.

Importing it defines names and registers the quantization method ``tersor`` with transformers, so that
``AutoModelForCausalLM.from_pretrained(folder)`` loads an artifact. The verbs are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tersor.engines.transformers import register
from tersor.errors import TersorError
from tersor.version import __version__

if TYPE_CHECKING:
    from tersor.api import compress, evaluate, generate, inspect, plan

__all__ = ["TersorError", "__version__", "compress", "evaluate", "generate", "inspect", "plan"]

register()


def __getattr__(name: str) -> Any:
    if name in ("compress", "evaluate", "generate", "inspect", "plan"):
        from tersor import api

        return getattr(api, name)
    raise AttributeError(f"module 'tersor' has no attribute {name!r}")
