"""A conversation with an artifact, of which only what is new is run at every turn."""

from __future__ import annotations

from pathlib import Path

import torch

from tersor.errors import BadInput
from tersor.stages.session import OnText, Session, Style, Written, open_session

CONTEXT = 8192
"""Tokens that a conversation may have, where the model takes as many and nothing else is asked for."""


class Chat:
    """Turns of a user and a model.

    ``context``: tokens that there is room for. ``full``: whether the last answer was cut short by that.
    ``fallback``: as in Written.
    """

    def __init__(self, session: Session, *, context: int, tokens: int, style: Style) -> None:
        self._session, self._tokens, self._style = session, tokens, style
        self.context = context
        self.fallback = session.fallback
        self.forget()

    def forget(self) -> None:
        """Begin a new conversation."""
        self._messages: list[dict[str, str]] = []
        self._text, self._ids = "", list[int]()
        self.full = False

    def say(self, message: str, on_text: OnText | None = None) -> Written:
        """The model's answer to a message; ``on_text`` is called with it as it comes.

        Raises BadInput where the conversation has become too long for the context, and goes on without this message. An
        answer that is broken off (by an exception in ``on_text``, or by Ctrl-C) counts as not given.
        """
        messages = [*self._messages, {"role": "user", "content": message}]
        text = self._session.render(messages)
        ids = self._encode(text)
        room = self.context - len(ids)
        if room < 1:
            raise BadInput(
                f"The conversation has become {len(ids)} tokens long, and there is room for {self.context}; /new "
                f"begins a new one."
            )
        tokens = min(self._tokens, room)
        written = self._session.write(ids, tokens=tokens, style=self._style, on_text=on_text)
        self.full = not written.ended and tokens < self._tokens
        self._messages = [*messages, {"role": "assistant", "content": written.text}]
        self._text = text + written.text
        # The template has the token that ends a turn too.
        self._ids = [*ids, *(written.ids[:-1] if written.ended else written.ids)]
        self._session.keep()
        return written

    def _encode(self, text: str) -> list[int]:
        """Tokens of the conversation, which has the text ``text``.

        An answer keeps the tokens that it was written in, although its text might be cut into others; but where the
        template changes earlier turns, all is cut anew.
        """
        for known in (self._text, self._text.rstrip()):
            if known and text.startswith(known):
                return [*self._ids, *self._session.tokenize(text[len(known) :])]
        return self._session.tokenize(text)


def open_chat(
    path: Path,
    *,
    tokens: int,
    context: int | None,
    style: Style,
    cache_dtype: torch.dtype,
    trust_remote_code: bool,
) -> Chat:
    """Load an artifact to talk with. ``tokens``: the most of an answer. Raises BadInput for what makes no sense."""
    if tokens < 1:
        raise BadInput(f"--tokens {tokens} makes no sense; give 1 or more.")
    session = open_session(path, trust_remote_code=trust_remote_code)
    if not session.tokenizer.chat_template:
        raise BadInput(f"{path} has no chat template: it continues texts, with `tersor run`, and cannot chat.")
    limit = CONTEXT if session.limit is None else session.limit
    context = min(limit, CONTEXT) if context is None else context
    if not 1 <= context <= limit:
        raise BadInput(f"--context {context} makes no sense; this model takes 1 to {limit} tokens.")
    session.prepare(context, cache_dtype)
    return Chat(session, context=context, tokens=tokens, style=style)
