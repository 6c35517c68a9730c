"""Files that are either wholly there or not there at all, whatever moment the power goes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from tersor.errors import BadInput, TersorError

STATE_FOLDER = ".state"
"""Sub-folder of a ``.partial`` folder with what only a resumed run needs; :func:`publish` removes it."""


def partial_path(out: Path) -> Path:
    """Where the artifact ``out`` is built: ``<out>.partial``, on the same file system so that a rename suffices."""
    return out.with_name(out.name + ".partial")


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that, after any crash, ``path`` holds either the old content or all of ``data``.

    Raises :class:`~tersor.errors.TersorError` when the disk is full; other ``OSError`` pass through.
    """
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path, len(data)) from error
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make creations and renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def disk_full(path: Path, needed: int) -> TersorError:
    """The error for a write of ``needed`` bytes that did not fit."""
    return TersorError(
        f"{path}: writing needs {needed} bytes and the disk has {shutil.disk_usage(path.parent).free} free; "
        "free some space and run the same command again, it continues where it stopped"
    )


def publish(partial: Path, final: Path, *, replace: bool = False) -> None:
    """Turn the finished folder ``partial`` into ``final``: make everything durable, rename, drop the resume state.

    ``final`` appears complete or not at all. May be called again after a crash at any point. With ``replace`` an
    existing ``final`` is set aside as ``<final>.replaced`` first and deleted at the end.

    Raises :class:`~tersor.errors.BadInput` when ``final`` exists and ``replace`` is False.
    """
    aside = final.with_name(final.name + ".replaced")
    if partial.exists():
        for folder, _, names in os.walk(partial, topdown=False):
            for name in names:
                handle = os.open(Path(folder, name), os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            fsync_folder(Path(folder))
        if final.exists():
            if not replace:
                raise BadInput(f"{final} exists already; choose another output or remove it")
            if aside.exists():
                _remove(aside)
            os.rename(final, aside)
        os.rename(partial, final)
        fsync_folder(final.parent)
    elif not final.exists():
        raise BadInput(f"{partial} does not exist, so there is nothing to publish as {final}")
    _remove(final / STATE_FOLDER)
    if replace:
        _remove(aside)
    fsync_folder(final)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
