"""``tersor.json``: what an artifact is, where it comes from and what was measured of it.

Nothing in it is needed to *run* the model (``config.json`` and the safetensors files suffice); everything in it is
needed to trust, verify and reproduce it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from tersor.artifact.files import STATE_FOLDER, atomic_write
from tersor.artifact.header import DTYPE_NAMES, DTYPES, parse_object
from tersor.artifact.layout import compute_layout
from tersor.artifact.plan_file import from_number, plan_from_dict, plan_to_dict, to_number
from tersor.contracts import Plan, Quality, Shape
from tersor.errors import BadInput, CorruptArtifact

MANIFEST_FILE = "tersor.json"
CALIBRATION_FILE = "calibration.safetensors"
FORMAT = 1
"""Version of the artifact format, in ``config.json`` and ``tersor.json`` alike; SPEC.md says when it changes."""

_JSON_LIMIT = 256_000_000
"""Bytes of JSON that are read at most: far above any real manifest, far below what exhausts memory."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class SourceRecord:
    """Where the weights came from. ``origin``: folder or hub id as given; ``fingerprint``: of its content."""

    origin: str
    fingerprint: str


@dataclass(frozen=True)
class TextRecord:
    """The calibration text. ``origin``: as given; ``sha256``: of the token ids, see :func:`ids_sha256`."""

    origin: str
    tokens: int
    seed: int
    sha256: str


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file of the artifact."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of ``tersor.json``.

    ``versions``: of tersor, torch, transformers, by package. ``shapes``: ``(rows, in)`` of each encoded layer, copies
    stacked. ``kept``: every other tensor in the weight files, ``name -> (dtype, shape)``. ``errors``: relative error
    ``‖W − Ŵ‖ / ‖W‖`` by layer. ``files``: every file of the artifact but ``tersor.json``, by path with ``/``.
    ``facts``: anything else worth recording, as JSON data; leave out what differs from run to run if equal runs are to
    give equal bytes.
    """

    versions: Mapping[str, str]
    source: SourceRecord
    plan: Plan
    shapes: Mapping[str, Shape]
    kept: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    text: TextRecord | None = None
    quality: Quality | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> bytes:
        """The bytes of ``tersor.json``. Raises :class:`~tersor.errors.NotFinite` for an infinite measurement."""
        quality = None
        if self.quality is not None:
            quality = {
                key: to_number(key, value) if isinstance(value, float) else value
                for key, value in asdict(self.quality).items()
            }
        data = {
            "format": self.format,
            "versions": dict(self.versions),
            "source": asdict(self.source),
            "text": None if self.text is None else asdict(self.text),
            "quality": quality,
            "notes": list(self.notes),
            "facts": dict(self.facts),
            "plan": plan_to_dict(self.plan),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "kept": {
                name: {"dtype": DTYPE_NAMES[dtype], "shape": list(shape)} for name, (dtype, shape) in self.kept.items()
            },
            "errors": {name: to_number(f"error of {name}", value) for name, value in self.errors.items()},
            "files": {name: asdict(record) for name, record in self.files.items()},
        }
        return (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @staticmethod
    def from_json(raw: bytes, *, where: str = MANIFEST_FILE) -> Manifest:
        """Parse and check. Raises :class:`~tersor.errors.CorruptArtifact`, or
        :class:`~tersor.errors.BadInput` for a format that this version does not know."""
        data = parse_object(where, raw)
        check_format(where, data.get("format"))
        take = _Taker(where, data)
        source = _Taker(f"{where}: source", take("source", dict))
        try:
            plan = plan_from_dict(data.get("plan"), where=f"{where}: plan")
        except BadInput as error:
            raise CorruptArtifact(str(error)) from error
        return Manifest(
            versions=take.texts("versions"),
            source=SourceRecord(source("origin", str), source("fingerprint", str)),
            plan=plan,
            shapes={name: _shape(take, name, shape) for name, shape in take("shapes", dict).items()},
            kept={name: _kept(take, name, entry) for name, entry in take("kept", dict).items()},
            text=_text_record(take),
            quality=_quality(take),
            errors=take.numbers("errors"),
            notes=tuple(str(note) for note in take("notes", list)),
            files={name: _file_record(take, name, entry) for name, entry in take("files", dict).items()},
            facts=take("facts", dict),
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``tersor.json`` atomically."""
    atomic_write(folder / MANIFEST_FILE, manifest.to_json())


def read_manifest(folder: Path) -> Manifest:
    """Read ``folder/tersor.json``. Raises :class:`~tersor.errors.CorruptArtifact` or ``BadInput``."""
    return Manifest.from_json(read_json_bytes(folder / MANIFEST_FILE))


def read_json_bytes(path: Path) -> bytes:
    """A JSON file's bytes, bounded. Raises :class:`~tersor.errors.BadInput` when it is not there."""
    if not path.is_file():
        raise BadInput(f"{path} is missing, so {path.parent} is not a tersor artifact; check the path")
    size = path.stat().st_size
    if size > _JSON_LIMIT:
        raise CorruptArtifact(f"{path.name}: expected at most {_JSON_LIMIT} bytes of JSON, found {size}")
    return path.read_bytes()


def quantization_config(layers: Mapping[str, str]) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``, from layer names and codec texts."""
    return {"quant_method": "tersor", "format": FORMAT, "layers": dict(layers)}


def check_format(where: str, found: Any) -> None:
    """Raises unless ``found`` is the format this version reads."""
    if type(found) is not int or found < 1:
        raise CorruptArtifact(f"{where}: expected format {FORMAT}, found {found!r:.80}")
    if found != FORMAT:
        raise BadInput(f"{where}: artifact format {found} is newer than the {FORMAT} this tersor reads; upgrade tersor")


def hash_files(
    folder: Path, progress: Callable[[int, int], None] | None = None, *, exclude: tuple[str, ...] = (MANIFEST_FILE,)
) -> dict[str, FileRecord]:
    """Size and SHA-256 of every file under ``folder`` (the resume state apart), by path with ``/``, sorted.

    ``progress(done, total)``: called with bytes hashed so far.
    """
    named = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    skipped = (STATE_FOLDER + "/", *exclude)
    named = {name: path for name, path in sorted(named.items()) if not name.startswith(skipped)}
    total = sum(path.stat().st_size for path in named.values())
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return {name: hash_file(path, report) for name, path in named.items()}


def hash_file(path: Path, report: Callable[[int], None] | None = None) -> FileRecord:
    """Size and SHA-256 of one file. ``report(count)``: called after each ``count`` bytes."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if report is not None:
                report(len(chunk))
    return FileRecord(size, digest.hexdigest())


def ids_sha256(ids: Tensor) -> str:
    """SHA-256 of token ids as little-endian int32, row-major; the shape does not enter."""
    return hashlib.sha256(ids.to("cpu", torch.int32).contiguous().numpy().astype("<i4").tobytes()).hexdigest()


def write_calibration(folder: Path, ids: Tensor) -> str:
    """Write the calibration token ids ``(sequences, length)`` as int32 to ``calibration.safetensors``.

    Returns :func:`ids_sha256`.
    """
    layout = compute_layout({"ids": (torch.int32, tuple(ids.shape))})
    data = ids.to("cpu", torch.int32).contiguous().numpy().astype("<i4").tobytes()
    atomic_write(folder / CALIBRATION_FILE, layout.shards[0].header + data)
    return ids_sha256(ids)


class _Taker:
    """Typed access to JSON data; every failure names the file and the field."""

    def __init__(self, where: str, data: Mapping[str, Any]) -> None:
        self.where = where
        self.data = data

    def __call__(self, key: str, kind: type) -> Any:
        value = self.data.get(key)
        # bool is an int in Python, but true is not a count.
        if not isinstance(value, kind) or (isinstance(value, int) and (isinstance(value, bool) or value < 0)):
            raise self.wrong(key, _KINDS[kind], value)
        return value

    def wrong(self, key: str, expected: str, found: Any) -> CorruptArtifact:
        return CorruptArtifact(f"{self.where}: expected '{key}' to be {expected}, found {found!r:.80}")

    def texts(self, key: str) -> dict[str, str]:
        found = self(key, dict)
        if not all(isinstance(value, str) for value in found.values()):
            raise self.wrong(key, "an object of texts", found)
        return dict(found)

    def numbers(self, key: str) -> dict[str, float]:
        result = {}
        found: dict[str, Any] = self(key, dict)
        for name, value in found.items():
            number = from_number(value)
            if number is None:
                raise self.wrong(f"{key}.{name}", "a finite number or null", value)
            result[name] = number
        return result


_KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number, not negative"}


def _shape(take: _Taker, name: str, shape: Any) -> Shape:
    if not _sizes(shape) or len(shape) != 2 or 0 in shape:
        raise take.wrong(f"shapes.{name}", "[rows, in], two positive whole numbers", shape)
    return (shape[0], shape[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _kept(take: _Taker, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
    if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(shape, list) or not _sizes(shape):
        raise take.wrong(f"kept.{name}", "a dtype and a shape", entry)
    return DTYPES[dtype], tuple(shape)


def _file_record(take: _Taker, name: str, entry: Any) -> FileRecord:
    # A manifest must not make the reader look outside its folder, on any system.
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or windows.drive or windows.root or posix.is_absolute() or ".." in windows.parts or "\0" in name:
        raise take.wrong(f"files.{name}", "a path inside the artifact", name)
    record = _Taker(f"{take.where}: files.{name}", entry if isinstance(entry, dict) else {})
    return FileRecord(record("bytes", int), record("sha256", str))


def _text_record(take: _Taker) -> TextRecord | None:
    if take.data.get("text") is None:
        return None
    text = _Taker(f"{take.where}: text", take("text", dict))
    return TextRecord(text("origin", str), text("tokens", int), text("seed", int), text("sha256", str))


def _quality(take: _Taker) -> Quality | None:
    if take.data.get("quality") is None:
        return None
    quality = _Taker(f"{take.where}: quality", take("quality", dict))
    values: dict[str, Any] = {}
    for item in fields(Quality):
        if item.name in ("tokens", "text"):
            values[item.name] = quality(item.name, int if item.name == "tokens" else str)
            continue
        values[item.name] = from_number(quality.data.get(item.name))
        if values[item.name] is None:
            raise quality.wrong(item.name, "a finite number or null", quality.data.get(item.name))
    return Quality(**values)
