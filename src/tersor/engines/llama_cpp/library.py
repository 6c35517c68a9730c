"""llama.cpp itself, through the C interface of a wheel that has it built in.

Only functions and the first fields of structures that have been the same for years are used, and what can be checked of
that is checked when the library is opened: structures are passed on as the library filled them in.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import BadInput, EngineFailed

PACKAGES = {"xllamacpp": "xllamacpp*.so", "llama_cpp": "lib/libllama.*"}
"""Packages that bring llama.cpp, and where in them its library lies."""
_CONTEXT_DEFAULTS = (512, 2048, 512, 1)
"""What llama.cpp writes into the first four fields of its context parameters: n_ctx, n_batch, n_ubatch, n_seq_max."""


class _Parameters(ctypes.Structure):
    """Room for a structure of parameters of any version; the library reads as much of it as it knows."""

    _fields_ = [("words", ctypes.c_uint32 * 128)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (ctypes.c_void_p, (ctypes.c_char_p, _Parameters)),
    "llama_init_from_model": (ctypes.c_void_p, (ctypes.c_void_p, _Parameters)),
    "llama_model_free": (None, (ctypes.c_void_p,)),
    "llama_free": (None, (ctypes.c_void_p,)),
    "llama_model_get_vocab": (ctypes.c_void_p, (ctypes.c_void_p,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (ctypes.c_void_p,)),
    "llama_batch_init": (_Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (ctypes.c_int32, (ctypes.c_void_p, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (ctypes.c_void_p,)),
    "llama_set_n_threads": (None, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)),
    "llama_tokenize": (
        ctypes.c_int32,
        (
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        ),
    ),
}


def find_library() -> Path | None:
    """The library of the first installed package that has llama.cpp built in; None when there is none."""
    for package, pattern in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found = sorted(Path(folder).glob(pattern))
            if found:
                return found[0]
    return None


class LlamaCpp:
    """The opened library. Raises EngineFailed when it is not laid out as expected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _PROTOTYPES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise EngineFailed(f"llama.cpp in {path} cannot be used ({error}); install another version.") from error
        defaults = self._library.llama_context_default_params()
        if tuple(defaults.words[:4]) != _CONTEXT_DEFAULTS:
            raise EngineFailed(
                f"llama.cpp in {path} has context parameters that begin {tuple(defaults.words[:4])}, not "
                f"{_CONTEXT_DEFAULTS}: it is of a version that tersor does not know; install another one."
            )
        self._messages: list[str] = []
        self._log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(self._keep)
        self._library.llama_log_set(self._log, None)
        self._library.llama_backend_init()

    def _keep(self, _level: int, text: bytes, _data: Any) -> None:
        self._messages.append(text.decode("utf-8", "replace"))
        del self._messages[:-200]

    def _last_words(self) -> str:
        said = [line.strip() for line in "".join(self._messages).splitlines() if line.strip()]
        wrong = [line for line in said if "error" in line.lower() or "failed" in line.lower()]
        return wrong[0] if wrong else said[-1] if said else "it said nothing"

    @contextmanager
    def load(self, path: Path, *, length: int, threads: int | None = None) -> Iterator[LoadedModel]:
        """A GGUF file, loaded for sequences of up to ``length`` tokens. Raises EngineFailed when it is refused."""
        self._messages.clear()
        call = self._library
        model = call.llama_model_load_from_file(os.fsencode(path), call.llama_model_default_params())
        if not model:
            raise EngineFailed(f"llama.cpp refuses {path}: {self._last_words()}")
        context = None
        try:
            given = call.llama_context_default_params()
            given.words[0] = given.words[1] = given.words[2] = length
            context = call.llama_init_from_model(model, given)
            if not context:
                raise EngineFailed(f"llama.cpp cannot run {path}: {self._last_words()}")
            workers = threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            call.llama_set_n_threads(context, workers, workers)
            yield LoadedModel(self, path, model, context, length)
        finally:
            if context:
                call.llama_free(context)
            call.llama_model_free(model)


class LoadedModel:
    """A model as llama.cpp runs it."""

    def __init__(self, owner: LlamaCpp, path: Path, model: int, context: int, length: int) -> None:
        self._call = owner._library
        self._owner, self._path, self._model, self._context, self._length = owner, path, model, context, length
        self._vocabulary = self._call.llama_model_get_vocab(model)
        self.tokens = int(self._call.llama_vocab_n_tokens(self._vocabulary))

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits ``(len(ids), tokens)`` float32 after each token of one sequence, from an empty cache."""
        if not 0 < len(ids) <= self._length:
            raise BadInput(f"A sequence of {len(ids)} tokens does not fit the {self._length} that {self._path} has.")
        self._clear()
        batch = self._call.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for place, token in enumerate(ids):
                batch.token[place] = int(token)
                batch.pos[place] = place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = 1
            status = self._call.llama_decode(self._context, batch)
        finally:
            self._call.llama_batch_free(batch)
        if status:
            raise EngineFailed(f"llama.cpp failed on {self._path} with code {status}: {self._owner._last_words()}")
        found = np.ctypeslib.as_array(self._call.llama_get_logits(self._context), (len(ids), self.tokens))
        return torch.from_numpy(found.copy())

    def _clear(self) -> None:
        """Forget earlier sequences."""
        get = self._call.llama_get_memory
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
        clear = self._call.llama_memory_clear
        clear.restype, clear.argtypes = None, (ctypes.c_void_p, ctypes.c_bool)
        clear(get(self._context), True)

    def tokenize(self, text: str) -> list[int]:
        """Token numbers of ``text`` with special tokens read as such, and without any added at the beginning."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self._call.llama_tokenize(self._vocabulary, data, len(data), room, len(room), False, True)
        if count < 0:
            raise EngineFailed(f"llama.cpp cannot tokenize a text of {len(data)} bytes with {self._path}.")
        return list(room[:count])
