"""What a model hands to its blocks, noted by stand-ins for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

Returns = int | None
"""What a block returns: None for a tensor, n for a tuple of n of which the hidden states are the first."""


class Extra:
    """Stands for what a block returns besides hidden states. Nothing may come of it."""

    @staticmethod
    def pack(hidden: Tensor, returns: Returns) -> Any:
        """``hidden`` in the form in which blocks return it."""
        return hidden if returns is None else (hidden, *(Extra() for _ in range(returns - 1)))


@dataclass(frozen=True)
class BlockCall:
    """The arguments of one block; ``slot`` is where among them the hidden states are: a position or a keyword."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slot: int | str

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other hidden states."""
        if isinstance(self.slot, int):
            return (*self.args[: self.slot], hidden, *self.args[self.slot + 1 :]), dict(self.kwargs)
        return self.args, {**self.kwargs, self.slot: hidden}


@dataclass
class Record:
    """What one run has shown so far.

    ``upto``: number of blocks after which the run may end. ``careful``: check that hidden states reach the next block
    unchanged; ``last`` is what the latest block returned.
    """

    returns: Returns
    upto: int
    careful: bool
    calls: list[BlockCall] = field(default_factory=list)
    first: Tensor = field(default_factory=lambda: torch.empty(0))
    last: Tensor | None = None


class Recorder:
    """Takes the place of blocks; one run at a time."""

    class Reached(Exception):
        """Raised at the last block that is wanted: no error, the run has shown all it can."""

    def __init__(self) -> None:
        self._record: Record | None = None

    @contextmanager
    def recording(self, returns: Returns, *, upto: int, careful: bool) -> Iterator[Record]:
        """Note what blocks are handed, which are taken to return ``returns``."""
        self._record = Record(returns, upto, careful)
        try:
            yield self._record
        finally:
            self._record = None

    def visit(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the stand-in of block ``number`` does. Raises ValueError when the hidden states are not handed on."""
        record = self._record
        if record is None or number != len(record.calls):
            raise ValueError("they are not called each once and in order")
        slot = _find_hidden(args, kwargs)
        hidden: Tensor = args[slot] if isinstance(slot, int) else kwargs[slot]
        if number == 0:
            record.first = hidden
        elif record.careful and not _same(hidden, record.last):
            raise ValueError("the hidden states are changed between them")
        others, named = BlockCall(args, kwargs, slot).with_hidden(torch.empty(0))
        if any(isinstance(value, Extra) for value in (*others, *named.values())):
            raise ValueError("they hand on more than the hidden states")
        record.calls.append(
            BlockCall(_forget(others), {name: _forgotten(value) for name, value in named.items()}, slot)
        )
        if len(record.calls) == record.upto:
            raise Recorder.Reached
        if record.careful:
            record.last = hidden.clone()
        return Extra.pack(hidden, record.returns)


def same_context(a: BlockCall, b: BlockCall) -> str | None:
    """None when two calls differ in nothing but the hidden states, else what differs."""
    if a.slot != b.slot or len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys():
        return "other arguments"
    for number, (x, y) in enumerate(zip(a.args, b.args, strict=True)):
        if not _same(x, y):
            return f"argument {number}"
    return next((name for name, value in a.kwargs.items() if not _same(value, b.kwargs[name])), None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a is b or bool(a == b) or isinstance(a, torch.nn.Module))


def _find_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
    """Where the hidden states are: the first floating tensor of three dimensions."""
    entries: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for slot, value in sorted(entries, key=lambda entry: entry[0] != "hidden_states"):
        if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
            return slot
    raise ValueError("a block is handed no hidden states")


def _forget(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_forgotten(value) for value in args)


def _forgotten(value: Any) -> Any:
    """Caches are left out: they would remember one batch while the next is run."""
    return None if isinstance(value, Cache) else value
