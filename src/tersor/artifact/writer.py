"""Writing an artifact's weights, unit by unit, so that a killed run continues where it stopped.

The files are laid out beforehand (:mod:`tersor.artifact.layout`), preallocated, and each *unit* (usually a layer) is
written at its offsets when it is done. The order of durable steps is what makes a crash harmless:

1. fingerprint (what is being made) → 2. files at full size with their headers → for each unit: 3. its bytes, flushed
to disk → 4. one journal line with their SHA-256, flushed to disk.

A unit counts as done only when its journal line is whole *and* its bytes still have that hash; anything else is
written again, at the same place. The result therefore does not depend on how often and where a run was killed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from tersor.artifact.files import STATE_FOLDER, atomic_write, disk_full, fsync_folder
from tersor.artifact.layout import INDEX_FILE, Entry, Layout
from tersor.errors import BadInput, CannotResume, ShapeMismatch

if sys.platform != "win32":
    import fcntl

_CHUNK = 1 << 24
"""Bytes read at a time from what is on disk."""


@dataclass(frozen=True)
class _Unit:
    """A journal line. ``record``: whatever the caller wants back when a run is resumed."""

    name: str
    tensors: tuple[str, ...]
    sha256: str
    record: Mapping[str, Any]


class ArtifactWriter:
    """Writes the tensors of ``layout`` into ``folder``; see the module's description for what survives a crash.

    ``folder``: where to write, usually :func:`~tersor.artifact.files.partial_path`; created when missing, resumed when
    an earlier run with the same ``fingerprint`` and layout left it. ``fingerprint``: short texts that identify what is
    being made, such as model, plan, text and version. May be used from several threads, and as a context manager.

    Raises :class:`~tersor.errors.CannotResume`, naming the fields that differ, when the folder belongs to another run;
    :class:`~tersor.errors.BadInput` when the disk has too little space (then nothing is left behind), the folder
    holds weights of unknown origin, or another process is writing there.
    """

    def __init__(self, folder: Path, layout: Layout, fingerprint: Mapping[str, str]) -> None:
        self.folder = folder
        self.layout = layout
        self._state = folder / STATE_FOLDER
        self._fingerprint = {**fingerprint, "layout": layout.digest()}
        self._handles: dict[str, int] = {}
        self._journal = -1
        self._lock_handle = -1
        self._mutex = threading.Lock()
        self._units: dict[str, _Unit] = {}
        self._verified: set[str] = set()
        existed = folder.exists()
        try:
            self._state.mkdir(parents=True, exist_ok=True)
            fsync_folder(folder.parent)
            self._lock()
            fresh = self._check_fingerprint()
            self._allocate(fresh)
            self._open_journal()
        except BaseException:  # also for Ctrl-C: the handles and the lock must not outlive the failed object
            self.close()
            if not existed:
                _remove_if_empty(self._state, folder)
            raise

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, name: str, tensors: Mapping[str, Tensor], *, record: Mapping[str, Any] | None = None) -> None:
        """Write one unit: ``tensors`` by their full names in the layout. When this returns the unit survives a crash.

        ``record``: JSON data to keep with the unit (a measured error, say), given back by :meth:`record` on resume.

        Raises :class:`~tersor.errors.ShapeMismatch` for a tensor that the layout does not have so;
        :class:`~tersor.errors.TersorError` when the disk is full after all.
        """
        blobs = [(self._entry(key, tensor), _raw_bytes(tensor)) for key, tensor in tensors.items()]
        digest = hashlib.sha256()
        try:
            for entry, blob in blobs:
                _write_at(self._handles[entry.file], blob, entry.offset)
                digest.update(blob)
            for file in sorted({entry.file for entry, _ in blobs}):
                os.fsync(self._handles[file])
            unit = _Unit(name, tuple(tensors), digest.hexdigest(), dict(record or {}))
            self._append(unit)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(self.folder / name, sum(entry.nbytes for entry, _ in blobs)) from error
            raise
        with self._mutex:
            self._units[name] = unit
            self._verified.add(name)

    def done(self, name: str) -> bool:
        """Whether the unit is completely on disk. Bytes that an earlier run wrote are hashed, once."""
        with self._mutex:
            unit = self._units.get(name)
            if unit is None or name in self._verified:
                return unit is not None
        intact = self._hash(unit) == unit.sha256
        with self._mutex:
            if intact:
                self._verified.add(name)
            else:
                self._units.pop(name, None)
        return intact

    def record(self, name: str) -> Mapping[str, Any]:
        """What was given to :meth:`write` as ``record``. Raises ``KeyError`` for a unit that is not done."""
        return self._units[name].record

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that have been written, by their full names in the layout, as copies in memory."""
        found = {}
        for name in names:
            entry = self._place(name)
            raw = torch.empty(entry.nbytes, dtype=torch.uint8)
            start = 0
            for chunk in self._chunks(entry):
                raw[start : start + len(chunk)] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
                start += len(chunk)
            found[name] = raw.view(entry.dtype).reshape(entry.shape)
        return found

    def missing(self) -> tuple[str, ...]:
        """Tensors of the layout that are not on disk yet, in layout order; hashes what was not yet verified."""
        written: set[str] = set()
        for name in tuple(self._units):
            if self.done(name):
                written.update(self._units[name].tensors)
        return tuple(name for name in self.layout.entries if name not in written)

    def finish(self) -> None:
        """Check that every tensor is there, write the index, make all durable, close.

        The journal stays until :func:`~tersor.artifact.files.publish`, so that a crash in between loses nothing.
        Raises :class:`~tersor.errors.ShapeMismatch` naming the first missing tensor.
        """
        missing = self.missing()
        if missing:
            raise ShapeMismatch(
                f"{self.folder}: {len(missing)} of {len(self.layout.entries)} tensors were never written, "
                f"the first is '{missing[0]}'; write them before finishing"
            )
        if self.layout.index is not None:
            atomic_write(self.folder / INDEX_FILE, self.layout.index)
        for handle in self._handles.values():
            os.fsync(handle)
        fsync_folder(self.folder)
        self.close()

    def close(self) -> None:
        """Release files and lock; what was written stays and can be resumed. Harmless when repeated."""
        for handle in (*self._handles.values(), self._journal, self._lock_handle):
            if handle >= 0:
                os.close(handle)
        self._handles = {}
        self._journal = self._lock_handle = -1

    def _lock(self) -> None:
        """One writer a folder. The system drops the lock when the process ends, however it ends."""
        self._lock_handle = os.open(self._state / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        if sys.platform != "win32":
            try:
                fcntl.flock(self._lock_handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BadInput(
                    f"{self.folder}: another run is writing here; wait for it or choose another output"
                ) from error

    def _check_fingerprint(self) -> bool:
        """True when the folder is new, False when it is this very run's."""
        path = self._state / "fingerprint.json"
        if not path.exists():
            for file in self.layout.files:
                if (self.folder / file).exists():
                    raise BadInput(
                        f"{self.folder / file} exists and no record says which run wrote it; "
                        "remove it or choose another output"
                    )
            atomic_write(path, (json.dumps(self._fingerprint, indent=2, sort_keys=True) + "\n").encode())
            return True
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise CannotResume(f"{path} is not readable as JSON; remove {self.folder} and start again")
        differ = [key for key in sorted({*found, *self._fingerprint}) if found.get(key) != self._fingerprint.get(key)]
        if len(differ) > 1 and "layout" in differ:
            differ.remove("layout")  # a consequence of the others, not news
        if differ:
            detail = "; ".join(
                f"{key} was {_brief(found.get(key))}, is {_brief(self._fingerprint.get(key))}" for key in differ
            )
            raise CannotResume(
                f"{self.folder} was begun with a different {' and '.join(differ)} ({detail}); "
                "repeat the first command exactly, or remove the folder to start again"
            )
        return False

    def _allocate(self, fresh: bool) -> None:
        """Give every file its full size and its header. Repeating this changes nothing that was written."""
        try:
            held = sum(_held(self.folder / shard.name) for shard in self.layout.shards)
            needed = self.layout.total_bytes - held
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise BadInput(self._no_space(free))
            for shard in self.layout.shards:
                handle = os.open(self.folder / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
                self._handles[shard.name] = handle
                if os.fstat(handle).st_size != shard.nbytes:
                    os.ftruncate(handle, shard.nbytes)
                _reserve(handle, shard.nbytes)
                _write_at(handle, shard.header, 0)
                os.fsync(handle)
            fsync_folder(self.folder)
        except (BadInput, OSError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if fresh:
                self._discard()
            if full:
                raise BadInput(self._no_space(shutil.disk_usage(self.folder).free)) from error
            raise

    def _no_space(self, free: int) -> str:
        return (
            f"{self.folder}: the weights need {self.layout.total_bytes} bytes and the disk has {free} free; "
            "free some space, or choose another disk or a smaller budget"
        )

    def _discard(self) -> None:
        """Undo what this object created in a new folder; the constructor removes the folders if then empty."""
        for shard in self.layout.shards:
            (self.folder / shard.name).unlink(missing_ok=True)
        for name in ("fingerprint.json", "lock"):
            (self._state / name).unlink(missing_ok=True)

    def _open_journal(self) -> None:
        """Read the whole lines, cut off what follows them (a line torn by a crash), and open for appending."""
        path = self._state / "journal.jsonl"
        self._journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        raw = path.read_bytes()
        good = 0
        for line in raw.splitlines(keepends=True):
            unit = self._parse_line(line)
            if unit is None:
                break
            self._units[unit.name] = unit
            good += len(line)
        if good < len(raw):
            os.ftruncate(self._journal, good)
        os.fsync(self._journal)
        fsync_folder(self._state)

    def _parse_line(self, line: bytes) -> _Unit | None:
        if not line.endswith(b"\n"):
            return None
        try:
            data = json.loads(line)
            unit = _Unit(str(data["name"]), tuple(data["tensors"]), str(data["sha256"]), dict(data["record"]))
        except (ValueError, TypeError, KeyError):
            return None
        return unit if all(name in self.layout.entries for name in unit.tensors) else None

    def _append(self, unit: _Unit) -> None:
        data = {"name": unit.name, "sha256": unit.sha256, "tensors": list(unit.tensors), "record": unit.record}
        line = (json.dumps(data) + "\n").encode()
        with self._mutex:
            end = os.fstat(self._journal).st_size
            try:
                while line:
                    line = line[os.write(self._journal, line) :]
                os.fsync(self._journal)
            except OSError:
                os.ftruncate(self._journal, end)  # a torn line would swallow the next one
                raise

    def _entry(self, name: str, tensor: Tensor) -> Entry:
        entry = self._place(name)
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ShapeMismatch(
                f"tensor '{name}': expected {entry.dtype} {list(entry.shape)} as laid out, "
                f"found {tensor.dtype} {list(tensor.shape)}"
            )
        return entry

    def _place(self, name: str) -> Entry:
        entry = self.layout.entries.get(name)
        if entry is None:
            raise ShapeMismatch(f"tensor '{name}' has no place in the layout of {self.folder}; plan it first")
        return entry

    def _hash(self, unit: _Unit) -> str:
        digest = hashlib.sha256()
        for name in unit.tensors:
            for chunk in self._chunks(self.layout.entries[name]):
                digest.update(chunk)
        return digest.hexdigest()

    def _chunks(self, entry: Entry) -> Iterator[bytes]:
        """A tensor's bytes as they are on disk, in pieces: one ``pread`` gives at most 2 GiB."""
        for start in range(0, entry.nbytes, _CHUNK):
            size = min(_CHUNK, entry.nbytes - start)
            yield os.pread(self._handles[entry.file], size, entry.offset + start)


def _brief(value: Any) -> str:
    """A fingerprint's value for a message: of a SHA-256 the beginning is enough."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def _raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order, without a copy when it lies so already."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """``pwrite`` until all is written: one call may take less than it was given."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view = view[written:]
        offset += written


def _reserve(handle: int, size: int) -> None:
    """Claim disk blocks now rather than find the disk full after hours; a no-op where the system cannot."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _held(path: Path) -> int:
    """Bytes of disk that a file occupies already."""
    return path.stat().st_blocks * 512 if path.exists() else 0


def _remove_if_empty(*folders: Path) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
