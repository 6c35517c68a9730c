"""Text sampled from the model itself, for calibration where the user gives none.

Off-domain text can calibrate worse than none; what a model writes unprompted is always of its own domain. As in
data-free quantization-aware training (arXiv:2305.17888, section 3.1) a sequence begins with a random token and goes on
at temperature 1, here without the greedy first steps and without any truncation of the distribution.

When the model ends a text, the sequence goes on with a new random first token behind the end-of-text token, and
the attention cache is kept: that is how the texts of a file are packed, sequences stay of equal length, and the
model is never asked to continue after an end, where many only repeat themselves. For a model with a chat template a
share of the sequences begins as a conversation instead: the template's words before the user's turn, then the model
writes the turns of both sides in alternation, and whenever it ends one, the template's words between turns are put
there (the model's own user turns: arXiv:2406.08464).

Sub-batches have a fixed size and a generator each, so the number of workers changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tersor.errors import BadInput, NotFinite
from tersor.statistics.decoding import Step, decoder
from tersor.statistics.text import TokenBatch, marks_of

ORIGIN = "text sampled from the model itself"
METHOD = 1
"""Part of every cache key: raised when the same model and seed would give other text."""
ENTRIES = 1 << 19
"""Logits that are turned into probabilities at one time: few enough to stay in the cache between passes."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ChatTurns:
    """Token ids around the turns of a conversation, from a chat template.

    ``opening``: before the user's first turn. ``reply``: between a user's turn and the model's. ``turn``: between the
    model's and the next of the user. ``ends``: the special tokens that ``reply`` and ``turn`` begin with.
    """

    opening: tuple[int, ...]
    reply: tuple[int, ...]
    turn: tuple[int, ...]
    ends: frozenset[int]


def chat_turns(tokenizer: Any) -> ChatTurns | None:
    """The template's words around turns; None where there is no template or it does not show the turns unchanged."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    first, answer, second = "qzxvkw", "wqjzvx", "xkvqwj"
    turns = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": second},
    ]
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):
        return None
    if not (first in whole and answer in whole and second in whole and first in asked):
        return None
    texts = (
        whole[: whole.index(first)],
        asked[asked.index(first) + len(first) :],
        whole[whole.index(answer) + len(answer) : whole.index(second)],
    )
    opening, reply, turn = (tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    if not (opening and reply and turn):
        return None
    return ChatTurns(opening, reply, turn, frozenset({reply[0], turn[0]} & _special(tokenizer)))


def _special(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


@dataclass(frozen=True)
class _Frame:
    """What stands around sampled text. ``first``: ids that a text may begin with; ``limit``: ids are below it."""

    first: Sequence[int]
    before: tuple[int, ...]
    ends: frozenset[int]
    limit: int
    chat: ChatTurns | None


def _frame(model: Any, tokenizer: Any | None, chat: bool) -> _Frame:
    config = model.config.get_text_config(decoder=True)
    ends: set[int] = set()
    for where in (config, getattr(model, "generation_config", None)):
        found = getattr(where, "eos_token_id", None)
        ends.update(found if isinstance(found, (list, tuple)) else [] if found is None else [found])
    if tokenizer is None:
        marks = {getattr(config, name, None) for name in ("bos_token_id", "pad_token_id")}
        first = [token for token in range(config.vocab_size) if token not in ends and token not in marks]
        return _Frame(first, (), frozenset(ends), config.vocab_size, None)
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    # The embedding may have been padded beyond the last token; those rows were never trained.
    limit = min(config.vocab_size, len(tokenizer))
    special = _special(tokenizer)
    first = [token for token in range(limit) if token not in special]
    before = marks_of(tokenizer).before
    return _Frame(first, before, frozenset(ends), limit, chat_turns(tokenizer) if chat else None)


@dataclass
class _Row:
    """One sequence being written: tokens that come next whatever the model says, and whose turn it is."""

    frame: _Frame
    generator: torch.Generator
    chat: bool
    forced: deque[int] = field(default_factory=deque)
    users_turn: bool = True

    def begin(self) -> None:
        if self.chat and self.frame.chat is not None:
            self.forced.extend(self.frame.chat.opening)
            return
        drawn = int(torch.randint(len(self.frame.first), (), generator=self.generator))
        self.forced.extend((*self.frame.before, self.frame.first[drawn]))

    def next(self, sampled: int) -> int:
        """The token that is written where the model has chosen ``sampled``."""
        if not self.forced:
            if not self._ended(sampled):
                return sampled
            if self.chat and self.frame.chat is not None:
                self.forced.extend(self.frame.chat.reply if self.users_turn else self.frame.chat.turn)
                self.users_turn = not self.users_turn
            else:
                self.forced.append(sampled)
                self.begin()
        return self.forced.popleft()

    def _ended(self, token: int) -> bool:
        chat = self.frame.chat
        return token in self.frame.ends or (self.chat and chat is not None and token in chat.ends)


def sample_text(
    model: Any,
    tokenizer: Any | None = None,
    *,
    sequences: int,
    length: int,
    seed: int,
    workers: int = 1,
    batch: int = 64,
    chat_share: float = 0.5,
    progress: Progress | None = None,
) -> TokenBatch:
    """``sequences`` sequences of ``length`` tokens, sampled at temperature 1 from the whole vocabulary.

    ``model``: a causal language model of transformers on the CPU, in evaluation mode; its attention implementation is
    exchanged meanwhile. ``tokenizer``: says which tokens are special and where the vocabulary ends, which token
    begins a text, and how conversations look; without it, only the ids in the configuration are known to be special.
    ``batch``: sequences in a sub-batch at most; the bytes depend on it, and speed and memory for keys and values grow
    with it. ``workers``: sub-batches at a time. The caller sets torch to one thread, or the bytes depend on how many
    it uses.
    ``chat_share``: share of sequences that are conversations, where the tokenizer has a chat template.
    ``progress``: called with tokens done and in all, from any thread, one call at a time.

    Raises NotFinite when logits have NaN or are infinite, BadInput when the model cannot be stepped through.
    """
    if sequences < 1 or length < 2 or batch < 1:
        raise BadInput(
            f"Asked for {sequences} sequences of {length} tokens, {batch} at a time; expected at least 1, 2 and 1."
        )
    frame = _frame(model, tokenizer, chat_share > 0)
    tick = _ticker(sequences * length, progress)
    stop = threading.Event()
    size = _sub_batch(sequences, batch)

    def work(index: int, new_step: Callable[[], Step]) -> Tensor:
        generator = _generator(seed, index)
        # Conversations are spread evenly, so that any run of sequences holds its share of them.
        rows = [
            _Row(frame, generator, chat=frame.chat is not None and int((n + 1) * chat_share) > int(n * chat_share))
            for n in range(index * size, min((index + 1) * size, sequences))
        ]
        return _write(rows, new_step(), length=length, limit=frame.limit, generator=generator, tick=tick, stop=stop)

    with decoder(model, length=length) as new_step, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, index, new_step) for index in range(-(-sequences // size))]
        try:
            ids = torch.cat([future.result() for future in futures])
        finally:
            # After an error or an interrupt the sub-batches under way end at their next token.
            stop.set()
            for future in futures:
                future.cancel()
    return TokenBatch(ids, ORIGIN, seed)


def _sub_batch(sequences: int, most: int) -> int:
    """Sequences in each sub-batch: an even number of them of about equal size, so that two cores end together.

    >>> _sub_batch(160, 64)   # four of 40, not two of 64 and one of 32
    40
    """
    count = -(-sequences // most)
    return -(-sequences // (count + count % 2))


def _write(
    rows: Sequence[_Row],
    step: Step,
    *,
    length: int,
    limit: int,
    generator: torch.Generator,
    tick: Callable[[int], None],
    stop: threading.Event,
) -> Tensor:
    """The sequences ``(rows, length)`` of one sub-batch."""
    ids = torch.empty(len(rows), length, dtype=torch.int64)
    sampled = [0] * len(rows)
    for row in rows:
        row.begin()
    with torch.inference_mode():
        for at in range(length):
            if stop.is_set():
                raise CancelledError
            ids[:, at] = torch.tensor([row.next(token) for row, token in zip(rows, sampled, strict=True)])
            if at + 1 < length:
                sampled = draw(step(ids[:, at : at + 1])[:, :limit], generator).tolist()
            tick(len(rows))
    return ids


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token ``(n,)`` int64 for each row of ``logits (n, vocabulary)``, with its softmax probability.

    By inverting the cumulative distribution in float32: one random number a row. (Exponential noise for every entry
    costs three times the product with the head that made the logits; ``torch.multinomial`` more.)
    Raises NotFinite.
    """
    uniform = torch.rand(logits.shape[0], 1, generator=generator)
    rows = max(1, ENTRIES // logits.shape[1])
    return torch.cat([_invert(logits[at : at + rows], uniform[at : at + rows]) for at in range(0, len(uniform), rows)])


def _invert(logits: Tensor, uniform: Tensor) -> Tensor:
    """The tokens at which the cumulative distributions of ``logits (n, vocabulary)`` pass ``uniform (n, 1)``."""
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).cumsum_(-1)
    total = weights[:, -1:]
    if not torch.isfinite(total).all():
        raise NotFinite(
            "The model's logits have NaN or Inf, though its weights have none: its activations overflow; check the "
            "source model (its final norm and head first), or run with --dtype float32 and --text."
        )
    # Strictly below the total, so that a last token of probability zero is never drawn.
    point = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(weights, point, right=True).squeeze(-1)


def _generator(seed: int, index: int) -> torch.Generator:
    mixed = hashlib.sha256(f"sample:{seed}:{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") >> 1)


def _ticker(total: int, progress: Progress | None) -> Callable[[int], None]:
    lock = threading.Lock()
    done = 0

    def tick(tokens: int) -> None:
        nonlocal done
        if progress is not None:
            with lock:
                done += tokens
                progress(done, total)

    return tick


def cached_sample(folder: Path, key: Mapping[str, Any], make: Callable[[], TokenBatch]) -> TokenBatch:
    """What ``make`` gives, kept in ``folder`` under ``key`` and read from there the next time.

    ``key``: all that the sample depends on, as JSON can hold it: the model's fingerprint and the parameters. A file
    that is damaged or belongs to another key is made again. The file is complete or not there: it is renamed into
    place once written.
    """
    text = json.dumps({"method": METHOD, **key}, sort_keys=True)
    path = folder / f"sample-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    found = _read_sample(path, text)
    if found is not None:
        return found
    batch = make()
    about = {"key": text, "origin": batch.origin, "seed": batch.seed, "notes": batch.notes, "digest": batch.digest()}
    # One entry, since the order of several is not the same from one writing to the next.
    data = save({"ids": batch.ids.to(torch.int32)}, metadata={"sample": json.dumps(about)})
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
    return batch


def _read_sample(path: Path, key: str) -> TokenBatch | None:
    """The sample in ``path``, or None when there is none or it is not whole or not for this key."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["sample"])
            ids = file.get_tensor("ids").to(torch.int64)
        batch = TokenBatch(ids, about["origin"], about["seed"], tuple(about["notes"]))
        return batch if about["key"] == key and about["digest"] == batch.digest() else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, BadInput):
        return None
