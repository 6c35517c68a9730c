"""What a run keeps while it works, so that a killed run continues where it stopped.

Everything lives in the state folder of ``<output>.partial`` and is removed when the artifact is published. A file is
there wholly or not at all, so 'does it exist' is the whole question when resuming.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from tersor.artifact import STATE_FOLDER, atomic_write
from tersor.artifact.files import disk_full
from tersor.errors import CannotResume

_RUN_FILE = "run.json"


class Work:
    """The state folder of one run: small JSON records, tensors, hidden states, and a log of events."""

    def __init__(self, partial: Path) -> None:
        self.folder = partial / STATE_FOLDER / "work"

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Claim the folder for the run that ``identity`` describes, or check that it is this very run's.

        Raises CannotResume naming what differs.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _RUN_FILE
        if not path.exists():
            self.save(_RUN_FILE, identity)
            return
        before = json.loads(path.read_text())
        now = json.loads(json.dumps(identity))
        differ = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if differ:
            detail = "; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in differ)
            raise CannotResume(
                f"An interrupted run in {self.folder.parent.parent} differs in {', '.join(differ)} ({detail}): repeat "
                f"the first command to continue it, or add --restart to throw it away."
            )

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def save(self, name: str, data: Any) -> None:
        """Write JSON data under ``name``, durable when this returns."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, (json.dumps(data, indent=1) + "\n").encode())

    def load(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(self.folder / name)
        return tensors

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def event(self, stage: str, what: str, **details: Any) -> None:
        """Append a line to ``events.jsonl``: what was begun and finished when. For the report and for tests."""
        line = json.dumps({"time": time.time(), "process": os.getpid(), "stage": stage, "event": what, **details})
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def hidden(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype, chunk: int) -> Hidden:
        """Hidden states called ``name``; see :class:`Hidden`."""
        return Hidden(self.folder / f"{name}.hidden", shape, dtype, chunk)


class Hidden:
    """Hidden states ``(sequences, length, width)`` on disk, written and read in chunks of ``chunk`` sequences.

    Plain reads and writes, not a memory map, so that resident memory is one chunk per worker. The file gets its name
    when :meth:`finish` is called; until then it does not count.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype, chunk: int) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self.chunk = chunk
        self._building = path.with_name(path.name + ".new")

    @property
    def chunks(self) -> int:
        return -(-self.shape[0] // self.chunk)

    @property
    def complete(self) -> bool:
        return self.path.exists()

    def sequences(self, chunk: int) -> slice:
        return slice(chunk * self.chunk, min((chunk + 1) * self.chunk, self.shape[0]))

    def write(self, chunk: int, hidden: Tensor) -> None:
        """Append chunk number ``chunk``; chunks come in order."""
        raw = hidden.detach().to(self.dtype).contiguous().view(torch.uint8).numpy()
        try:
            with self._building.open("wb" if chunk == 0 else "ab") as file:
                file.write(raw.data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise disk_full(self._building, raw.nbytes) from error
            raise

    def skip(self) -> None:
        """Count as complete without any states: nobody will read them."""
        self.path.touch()

    def finish(self) -> None:
        with self._building.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._building, self.path)

    def read(self, chunk: int) -> Tensor:
        here = self.sequences(chunk)
        _, length, width = self.shape
        count = here.stop - here.start
        row = length * width * self.dtype.itemsize
        raw = np.fromfile(self.path, dtype=np.uint8, count=count * row, offset=here.start * row)
        return torch.from_numpy(raw).view(self.dtype).reshape(count, length, width)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self._building.unlink(missing_ok=True)
