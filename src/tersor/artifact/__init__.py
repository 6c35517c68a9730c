"""What is on disk: layout, writing, reading, verification. The format is specified in ``SPEC.md`` beside this file.

``decoder_numpy.py`` is not imported here: it stands alone and shares no code with the rest.
"""

from tersor.artifact.files import STATE_FOLDER, atomic_write, partial_path, publish
from tersor.artifact.layout import (
    MAX_SHARD_SIZE,
    Entry,
    Layout,
    Shard,
    compute_layout,
    fixed_cost,
    header_cost,
    most_shards,
    tensor_header_cost,
)
from tersor.artifact.manifest import (
    FORMAT,
    FileRecord,
    Manifest,
    SourceRecord,
    TextRecord,
    hash_files,
    ids_sha256,
    quantization_config,
    read_manifest,
    write_calibration,
    write_manifest,
)
from tersor.artifact.plan_file import plan_from_json, plan_to_json, validate_plan
from tersor.artifact.reader import Artifact, open_artifact
from tersor.artifact.writer import ArtifactWriter

__all__ = [
    "FORMAT",
    "MAX_SHARD_SIZE",
    "STATE_FOLDER",
    "Artifact",
    "ArtifactWriter",
    "Entry",
    "FileRecord",
    "Layout",
    "Manifest",
    "Shard",
    "SourceRecord",
    "TextRecord",
    "atomic_write",
    "compute_layout",
    "fixed_cost",
    "hash_files",
    "header_cost",
    "ids_sha256",
    "most_shards",
    "open_artifact",
    "partial_path",
    "plan_from_json",
    "plan_to_json",
    "publish",
    "quantization_config",
    "read_manifest",
    "tensor_header_cost",
    "validate_plan",
    "write_calibration",
    "write_manifest",
]
