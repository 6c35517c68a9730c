"""An artifact that is what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tersor.artifact import Artifact, open_artifact


def open_whole(path: Path, progress: Callable[[str, int, int], None] | None = None) -> Artifact:
    """The artifact at ``path``, every file of it read and found to be what was written. Raises CorruptArtifact.

    ``progress``: called with "hashes", bytes read and bytes in all.
    """
    artifact = open_artifact(path)
    artifact.verify_hashes(None if progress is None else lambda done, total: progress("hashes", done, total))
    return artifact
