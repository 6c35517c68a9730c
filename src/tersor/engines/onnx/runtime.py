"""ONNX Runtime itself, on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.engines.onnx.files import MODEL
from tersor.engines.onnx.operators import ACCURACY
from tersor.errors import EngineFailed

PACKAGE = "onnxruntime"
_ERRORS_ONLY = 3


def installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


class OnnxRuntime:
    """A session with one model, as ONNX Runtime runs it without a cache of earlier tokens."""

    def __init__(self, path: Path, session: Any) -> None:
        self._path, self._session = path, session
        self._past = {one.name: one for one in session.get_inputs() if one.name.startswith("past_key_values.")}

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits ``(len(ids), tokens)`` float32 after each token of one sequence."""
        feed = {
            "input_ids": np.asarray([ids], dtype=np.int64),
            "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        }
        for name, one in self._past.items():
            _, heads, _, width = one.shape
            feed[name] = np.zeros((1, heads, 0, width), dtype=np.float32)
        try:
            (found,) = self._session.run(["logits"], feed)
        except (RuntimeError, ValueError, TypeError) as error:
            raise EngineFailed(f"ONNX Runtime failed while running {self._path}: {_first(error)}") from error
        return torch.from_numpy(found)[0]


@contextmanager
def run(path: Path, _length: int, threads: int) -> Iterator[OnnxRuntime]:
    """The folder ``path``, opened. ``threads``: of a product. Raises EngineFailed."""
    try:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import (
            Fail,
            InvalidArgument,
            InvalidGraph,
            InvalidProtobuf,
            NoSuchFile,
            NotImplemented,
            RuntimeException,
        )
    except ImportError as error:
        raise EngineFailed(f"ONNX Runtime cannot be used here ({error}); pip install {PACKAGE}.") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _ERRORS_ONLY
    # For QDQ files, which ONNX Runtime turns into the products that other files have; its default is 4.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(ACCURACY))
    refusals = (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NoSuchFile, NotImplemented, RuntimeException)
    try:
        session = onnxruntime.InferenceSession(path / MODEL, options, providers=["CPUExecutionProvider"])
    except refusals as error:
        raise EngineFailed(f"ONNX Runtime does not open {path / MODEL}: {_first(error)}") from error
    yield OnnxRuntime(path, session)


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
