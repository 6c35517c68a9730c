"""Models that need code which comes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tersor.errors import BadInput


def refuse_foreign_code(path: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Raises BadInput where the artifact's model needs code that comes with it, and nobody said to trust that."""
    if trust_remote_code or "auto_map" not in config:
        return
    # Imported when it is needed: it takes a second.
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise BadInput(
            f"{path} brings code of its own, which its model needs: look at it, and pass --trust-remote-code if you "
            f"trust it."
        )
