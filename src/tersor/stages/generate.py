"""Text from an artifact: its compiled step's, or that of transformers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from tersor.errors import BadInput
from tersor.stages.session import OnText, Style, Written, open_session


def write_text(
    path: Path,
    prompt: str,
    *,
    tokens: int,
    style: Style,
    cache_dtype: torch.dtype,
    on_text: OnText | None,
    trust_remote_code: bool,
) -> Written:
    """Continue ``prompt`` by ``tokens`` tokens; for a chat model it is a user's turn.

    ``on_text``: called with text as it comes. Torch's random state is left alone. Raises BadInput for more than the
    model has positions for.
    """
    if tokens < 1:
        raise BadInput(f"--tokens {tokens} makes no sense; give 1 or more.")
    session = open_session(path, trust_remote_code=trust_remote_code)
    ids = session.encode(prompt)
    given = len(ids)
    if not given:
        raise BadInput("The prompt is empty; give some text to continue.")
    if session.limit is not None and given + tokens > session.limit:
        raise BadInput(
            f"The prompt's {given} tokens and --tokens {tokens} are more than the {session.limit} that the model "
            f"takes; give a shorter prompt or fewer --tokens."
        )
    session.prepare(given + tokens, cache_dtype)
    written = session.write(ids, tokens=tokens, style=style, on_text=on_text)
    with contextlib.suppress(KeyboardInterrupt):  # the text is there: who breaks off now has it all the same
        session.keep()
    return written
