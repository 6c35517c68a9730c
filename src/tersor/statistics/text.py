"""Calibration and evaluation text as token ids.

Documents are tokenised, put one after the other and cut into windows of equal length. A tokenizer that begins
documents with a token of its own (BOS) does so here too, and an end-of-text token stands between documents where the
tokenizer has one. When there is more text than asked for, the windows are drawn from all of it with a local generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from tersor.errors import BadInput
from tersor.statistics.documents import Document, Messages, is_local, origin_of, read

UNIT = 1 << 16
"""Characters that are tokenised and drawn together at most; longer documents are cut at a line end."""
CHARACTERS = 16
"""Characters of text looked at for each token asked for: about four times the need of English."""
BATCH = 64
"""Units handed to the tokenizer at once."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Sequences of token ids, and where they came from.

    ``ids``: ``(sequences, length)`` int64. ``origin``: file, data set or model. ``seed``: with which they were drawn.
    ``notes``: sentences that a user should read.
    """

    ids: Tensor
    origin: str
    seed: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64:
            raise BadInput(
                f"Token ids have shape {tuple(self.ids.shape)} and type {self.ids.dtype}; expected (sequences, length) "
                f"and torch.int64."
            )

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the shape and of the ids as little-endian 64-bit integers."""
        shape = ",".join(map(str, self.ids.shape))
        return hashlib.sha256(f"{shape}\n".encode() + self.ids.numpy().astype("<i8").tobytes()).hexdigest()

    def split_held_out(self, part: float | int) -> tuple[TokenBatch, TokenBatch]:
        """(calibration, held out): the last sequences are held out, so the same ones every time.

        ``part``: their number when an int, their share (rounded, at least one sequence) when a float. The windows of
        a text are in its order, so what is held out comes from other documents, not from between the rest.
        Raises BadInput when either side would be empty.
        """
        total = self.ids.shape[0]
        count = part if isinstance(part, int) else max(1, round(part * total))
        if not 0 < count < total:
            raise BadInput(
                f"{self.origin} has {total} sequences, of which {part} cannot be held out; at least one must stay on "
                f"either side."
            )
        return replace(self, ids=self.ids[: total - count]), replace(self, ids=self.ids[total - count :])


@dataclass(frozen=True)
class Marks:
    """Token ids that a tokenizer puts ``before`` and ``after`` a document; ``between`` ends what has no mark after."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def marks_of(tokenizer: Any) -> Marks:
    """What ``tokenizer`` adds around a document, found by tokenising a letter with and without.

    An end-of-text token that the tokenizer has but does not add is put after the document as well.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    before, after = tuple(full[:at]), tuple(full[at + len(plain) :])
    if not after and tokenizer.eos_token_id is not None:
        after = (int(tokenizer.eos_token_id),)
    return Marks(before, after)


@dataclass(frozen=True)
class _Unit:
    """A run of text to tokenise; ``bare`` when a chat template has written its special tokens already."""

    text: str
    opens: bool
    closes: bool
    bare: bool


def load_text(
    spec: str | Path | Sequence[str],
    tokenizer: Any,
    *,
    sequences: int,
    length: int,
    seed: int,
    field: str | None = None,
    split: str = "train",
    chat: bool | None = None,
) -> TokenBatch:
    """``sequences`` windows of ``length`` tokens from a text.

    ``spec``: a ``.txt``, ``.jsonl`` or ``.parquet`` file; a data set of the hub, ``name`` or ``name:config``; a folder
    that the ``datasets`` package opens; or a sequence of texts, which are themselves the documents.
    ``field``: of a record, where its text is (default: ``text``, ``messages`` or ``conversations``). ``split``: of a
    data set. ``chat``: render conversations with the tokenizer's chat template (default: where it has one; otherwise
    turns are joined as plain text); plain text stays as it is unless True, which requires conversations.

    Too little text gives fewer sequences (or one that is shorter) and a note that names the number of tokens.
    Raises BadInput when there is no text, or it cannot be read.
    """
    if sequences < 1 or length < 2:
        raise BadInput(f"Asked for {sequences} sequences of {length} tokens; expected at least 1 sequence of 2 tokens.")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise BadInput("The tokenizer has no chat template to render conversations with; leave chat away.")
    origin = origin_of(spec)
    need = sequences * length
    reserve = CHARACTERS * need
    ids, everything = _gather(spec, tokenizer, reserve=reserve, seed=seed, field=field, split=split, chat=chat)
    while ids.numel() < need and not everything:
        reserve *= 4
        ids, everything = _gather(spec, tokenizer, reserve=reserve, seed=seed, field=field, split=split, chat=chat)
    if ids.numel() < 2:
        raise BadInput(f"{origin} holds no text ({ids.numel()} tokens); give a text of at least a few thousand words.")
    windows = _windows(ids, sequences=sequences, length=length, seed=seed)
    notes = []
    if ids.numel() < need:
        notes.append(
            f"{origin} holds only {ids.numel()} tokens: {windows.shape[0]} sequence(s) of {windows.shape[1]} instead "
            f"of {sequences} of {length}; more text would give better statistics."
        )
    return TokenBatch(windows, origin, seed, tuple(notes))


def _gather(
    spec: str | Path | Sequence[str],
    tokenizer: Any,
    *,
    reserve: int,
    seed: int,
    field: str | None,
    split: str,
    chat: bool | None,
) -> tuple[Tensor, bool]:
    """Token ids ``(n,)`` of about ``reserve`` characters drawn from the text, and whether that is all of it.

    A local text is read (and so checked) whole, but only what was drawn is kept and tokenised; of a hub data set the
    beginning is taken, since the rest would have to be fetched.
    """

    def units() -> Iterator[_Unit]:
        return _units(read(spec, field=field, split=split), tokenizer, chat)

    streamed = isinstance(spec, (str, Path)) and not is_local(spec)
    kept: list[_Unit] = []
    sizes: list[int] = []
    total = 0
    for unit in units():
        if total < reserve:
            kept.append(unit)
        elif streamed:
            return _tokenise(kept, tokenizer), False
        sizes.append(len(unit.text))
        total += len(unit.text)
    if len(kept) == len(sizes):
        return _tokenise(kept, tokenizer), True
    kept.clear()
    chosen: set[int] = set()
    room = reserve
    for index in torch.randperm(len(sizes), generator=_generator(seed, "documents")).tolist():
        if room <= 0:
            break
        chosen.add(index)
        room -= sizes[index]
    return _tokenise((unit for index, unit in enumerate(units()) if index in chosen), tokenizer), False


def _units(documents: Iterable[Document], tokenizer: Any, chat: bool | None) -> Iterator[_Unit]:
    """Documents as runs of at most about :data:`UNIT` characters; short pieces of one document are joined."""
    held: list[str] = []
    size = 0
    opens = True
    for document in documents:
        text, bare = _rendered(document, tokenizer, chat)
        if document.opens:
            held, size, opens = [], 0, True
        for piece in _cut(text):
            if size and size + len(piece) > UNIT:
                yield _Unit("".join(held), opens, False, bare)
                held, size, opens = [], 0, False
            held.append(piece)
            size += len(piece)
        if document.closes and (size or not opens):
            yield _Unit("".join(held), opens, True, bare)


def _cut(text: str) -> Iterator[str]:
    """``text`` in pieces of at most UNIT characters, cut after a line end or before a space where there is one."""
    at = 0
    while len(text) - at > UNIT:
        line = text.rfind("\n", at + UNIT // 2, at + UNIT) + 1
        space = text.rfind(" ", at + UNIT // 2, at + UNIT + 1)
        end = line if line > 0 else space if space > 0 else at + UNIT
        yield text[at:end]
        at = end
    yield text[at:]


def _rendered(document: Document, tokenizer: Any, chat: bool | None) -> tuple[str, bool]:
    """The document's text, and whether it carries its special tokens already."""
    if isinstance(document.content, str):
        if chat:
            raise BadInput(
                f"{document.place} holds plain text, and conversations were asked for; give the field that holds "
                f"messages, or leave chat away."
            )
        return document.content, False
    if chat is False or not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(turn["content"] for turn in document.content), False
    return _render(document.content, document.place, tokenizer), True


def _render(messages: Messages, place: str, tokenizer: Any) -> str:
    try:
        text = tokenizer.apply_chat_template([dict(turn) for turn in messages], tokenize=False)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in messages[:6])
        raise BadInput(
            f"{place}: the tokenizer's chat template refuses the conversation ({error}); its roles are {roles}."
        ) from error
    return str(text)


def _tokenise(units: Iterable[_Unit], tokenizer: Any) -> Tensor:
    """Ids ``(n,)`` int64 of all units in order, with the marks around documents."""
    marks = marks_of(tokenizer)
    parts: list[Tensor] = []
    batch: list[_Unit] = []

    def flush() -> None:
        texts = [unit.text for unit in batch]
        found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for unit, ids in zip(batch, found, strict=True):
            before = marks.before if unit.opens and not unit.bare else ()
            after = marks.after if unit.closes and not unit.bare else ()
            if ids:
                parts.append(torch.tensor([*before, *ids, *after], dtype=torch.int64))
        batch.clear()

    for unit in units:
        batch.append(unit)
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _windows(ids: Tensor, *, sequences: int, length: int, seed: int) -> Tensor:
    """``(<= sequences, length)`` windows of ``ids (n,)`` that do not overlap, in the order of the text."""
    length = min(length, ids.numel())
    available = ids.numel() // length
    if available <= sequences:
        return ids[: available * length].reshape(available, length).clone()
    generator = _generator(seed, "windows")
    offset = int(torch.randint(ids.numel() - available * length + 1, (), generator=generator))
    chosen = torch.randperm(available, generator=generator)[:sequences].sort().values
    return ids[offset : offset + available * length].reshape(available, length)[chosen]


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for every purpose, so that draws for one do not shift those for another."""
    mixed = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
