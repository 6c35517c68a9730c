"""What every peer's script shares. Runs inside the peers' environments: torch, transformers and safetensors, no tersor.

A script quantizes one model with one peer and leaves in its output folder: ``files/``, what the peer itself writes;
``dequantized.safetensors``, the weights that those files stand for, float32, under the names of the source; and
``result.json``, the bytes of the peer's weight files, bits per weight on the decoder's linear layers; times.
"""

from __future__ import annotations

import argparse
import json
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

WEIGHTS = (".safetensors", ".gguf", ".pt", ".bin")
FREE = ("g_idx", "weight_shape")
"""Stored tensors that are not counted in a peer's bits per weight: an order of columns that is not used, a shape."""


class Busy:
    """Counts the time in which at least one thread is inside. A context manager."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._inside, self._since, self._lock = 0, 0.0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._since = time.perf_counter()
            self._inside += 1

    def __exit__(self, *_raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self.seconds += time.perf_counter() - self._since


@dataclass
class Job:
    """One run of one peer. ``seconds``, ``cpu_seconds``: of the quantization alone, without loading and saving.

    ``solving``: counts, where a script says so, the time in which weights are made into codes from statistics.
    """

    model: Path
    text: Path
    out: Path
    settings: dict[str, Any]
    threads: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    solving: Busy = field(default_factory=Busy)
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> Path:
        """Folder of what the peer writes."""
        folder = self.out / "files"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what happens inside, this process and its children together."""
        began, cpu = time.perf_counter(), _cpu_seconds()
        yield
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += _cpu_seconds() - cpu

    def windows(self) -> list[Tensor]:
        """The calibration text as consecutive windows ``(1, length)`` of token ids, the same ones for every peer."""
        ids = AutoTokenizer.from_pretrained(self.model)(self.text.read_text(), return_tensors="pt")["input_ids"][0]
        length = self.settings["length"]
        count = min(self.settings["sequences"], len(ids) // length)
        return list(ids[: count * length].reshape(count, 1, length))

    def sources(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the source model."""
        for path in sorted(self.model.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, not a dict
                    yield name, file.get_tensor(name)

    def linears(self) -> dict[str, int]:
        """Name without ``.weight`` and number of weights of each linear layer of the decoder."""
        return {
            name.removesuffix(".weight"): tensor.numel()
            for name, tensor in self.sources()
            if ".layers." in name and name.endswith(".weight") and tensor.ndim == 2
        }

    def stored_bits(self) -> float:
        """Bits per weight on the linears, from what the peer's safetensors hold for them: codes, scales and zeros."""
        linears = self.linears()
        total = 0
        for path in sorted(self.files.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118, not a dict
                    if name.rsplit(".", 1)[0] in linears and name.rsplit(".", 1)[1] not in FREE:
                        total += file.get_tensor(name).nbytes
        return 8 * total / sum(linears.values())

    def finish(self, peer: str, tensors: Mapping[str, Tensor], bits: float, *, saved: bool = True) -> None:
        """Write the dequantized weights and the result. ``tensors``: by the source's names; what lacks is the source's.

        ``saved``: False where the peer writes no file that is worth counting. Raises ValueError for a missing linear.
        """
        missing = [name for name in self.linears() if f"{name}.weight" not in tensors]
        if missing:
            raise ValueError(f"{len(missing)} linear layers were not dequantized, first {missing[0]}")
        whole = {name: tensors.get(name, tensor).detach().float().contiguous() for name, tensor in self.sources()}
        save_file(whole, self.out / "dequantized.safetensors")
        weights = [path for path in sorted(self.files.rglob("*")) if path.suffix in WEIGHTS]
        result = {
            "peer": peer,
            "version": _version(peer),
            "file_bytes": sum(path.stat().st_size for path in weights) if saved else None,
            "bits_per_weight": bits,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "solving_seconds": self.solving.seconds,
            "notes": self.notes,
        }
        (self.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def main(quantize: Callable[[Job], None]) -> None:
    """Read the command line of a peer's script and run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True, help="a JSON object")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    quantize(Job(given.model, given.text, given.out, given.settings, given.threads))


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _version(peer: str) -> str:
    return peer if " " in peer else f"{peer} {version(peer)}"
