"""Where what was made once is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache_dir: Path | None = None) -> Path:
    """Where materialised models and sampled text are kept: ``cache_dir``, or the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tersor"
