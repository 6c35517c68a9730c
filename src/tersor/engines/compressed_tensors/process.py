"""Stock transformers, with the library compressed-tensors, in a fresh process that has never seen tersor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from tersor.errors import EngineFailed

_SCRIPT = Path(__file__).with_name("serve.py")


@contextmanager
def run(path: Path, _length: int, threads: int) -> Iterator[Served]:
    """A folder as transformers computes it in float32. Raises EngineFailed when it is refused."""
    # -I: neither this folder nor PYTHONPATH is searched, so that only what is installed is found.
    command = [sys.executable, "-I", str(_SCRIPT), str(path.absolute()), str(threads)]
    quiet = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, env=quiet)
        try:
            yield Served(path, child, said)
        finally:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdout.close()
            with suppress(BrokenPipeError):  # it died, which whoever asked it has been told
                child.stdin.close()
            child.terminate()
            child.wait()


class Served:
    """The model in the other process."""

    def __init__(self, path: Path, child: subprocess.Popen[bytes], said: IO[bytes]) -> None:
        self._path, self._child, self._said = path, child, said

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits ``(len(ids), tokens)`` float32 after each token of one sequence."""
        asked, answers = self._child.stdin, self._child.stdout
        assert asked is not None
        assert answers is not None
        try:
            asked.write(json.dumps([int(token) for token in ids]).encode() + b"\n")
            asked.flush()
            count = int.from_bytes(self._exactly(answers, 8), "little")
            raw = self._exactly(answers, 4 * count)
        except BrokenPipeError:
            raise self._failed() from None
        found = torch.from_numpy(np.frombuffer(raw, dtype="<f4").copy())
        return found.reshape(len(ids), -1)

    def _exactly(self, answers: IO[bytes], count: int) -> bytes:
        raw = answers.read(count)
        if len(raw) < count:
            raise self._failed()
        return raw

    def _failed(self) -> EngineFailed:
        self._child.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().decode("utf-8", "replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it said nothing"
        return EngineFailed(f"transformers with compressed-tensors cannot run {self._path}: {last}")
