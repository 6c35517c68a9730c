"""Models that need code which comes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from tersor.errors import BadInput


def refuse_foreign_code(path: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Raises BadInput where the artifact's model needs code that comes with it, and nobody said to trust that."""
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise BadInput(
            f"{path} brings code of its own, which its model needs: look at it, and pass --trust-remote-code if you "
            f"trust it."
        )
