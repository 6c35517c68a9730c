"""The verbs that write text with an artifact. They are part of :mod:`tersor.api`, and apart from the rest because that
takes seconds to import and memory that a running model has better uses for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tersor.errors import BadInput
from tersor.stages.chat import Chat, open_chat
from tersor.stages.generate import write_text
from tersor.stages.session import Style, Written


def write(
    model: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    cache: str = "float16",
    on_text: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> Written:
    """Continue a prompt with an artifact, by a compiled step where that reproduces the model, and say how fast it went.

    ``cache``: the type of keys and values that the step keeps, float16 or float32. Where there is no step, transformers
    writes the text and ``fallback`` says why.
    """
    return write_text(
        Path(model),
        prompt,
        tokens=tokens,
        style=Style(temperature, seed),
        cache_dtype=_cache_type(cache),
        on_text=on_text,
        trust_remote_code=trust_remote_code,
    )


def chat(
    model: str | Path,
    *,
    tokens: int = 512,
    context: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    cache: str = "float16",
    trust_remote_code: bool = False,
) -> Chat:
    """Load an artifact to talk with, turn by turn, by :meth:`~tersor.stages.chat.Chat.say`.

    ``tokens``: the most of an answer. ``context``: of the whole conversation (default: what the model takes, up to
    8192). Others: see :func:`write`.
    """
    return open_chat(
        Path(model),
        tokens=tokens,
        context=context,
        style=Style(temperature, seed),
        cache_dtype=_cache_type(cache),
        trust_remote_code=trust_remote_code,
    )


def _cache_type(name: str) -> torch.dtype:
    types = {"float16": torch.float16, "float32": torch.float32}
    if name not in types:
        raise BadInput(f"--cache {name!r} is unknown; write float16 or float32.")
    return types[name]
