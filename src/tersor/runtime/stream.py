"""A model run one block at a time: weights come when they are needed and go when they are not.

The model's own forward code does everything that is not a block: it is run with stand-ins for the blocks, which note
what each block is handed (positions, masks) and let pass what they are given. So embedding scales, position
embeddings, sliding windows, final norms and soft-capped logits are the model's own, whatever its class.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tersor.anatomy.structure import fill_buffers
from tersor.contracts import Anatomy
from tersor.errors import UnknownArchitecture
from tersor.runtime.calls import BlockCall, Extra, Recorder, Returns, same_context
from tersor.runtime.residence import Load, Residence

_SHAPES_KEPT = 4
"""Shapes of batches whose masks and positions are remembered."""

_RETURNS: tuple[Returns, ...] = (None, 1, 2, 3, 4)
_MISUSE = (TypeError, ValueError, IndexError, RuntimeError, AttributeError, KeyError)
"""What a model raises that is handed a tensor where its blocks return a tuple, or the other way round."""


class BlockStream:
    """Embedding, blocks and head of a model as separate steps: ``head(run(block n, ... run(block 0, embed(ids))))``.

    ``model``: from :func:`tersor.anatomy.skeleton`; it is copied and never changed, so several streams may share it.
    ``load``: gives tensors by parameter name, as ``anatomy`` names layers and kept tensors; the same class streams a
    source or a compressed artifact. ``dtype``: what weights and hidden states are in. Sequences of one batch have the
    same length; nothing is masked but what the model masks. No call touches the random state.

    :meth:`embed`, :meth:`run` and :meth:`head` may be called from several threads. Raises UnknownArchitecture when
    blocks are handed something that depends on the text, or the hidden state is changed between blocks.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, load: Load, *, dtype: torch.dtype) -> None:
        self._dtype = dtype
        names = [*(layer.parameter for layer in anatomy.layers), *anatomy.kept]
        body = copy.deepcopy(model)
        fill_buffers(body, dtype)
        self._blocks = [body.get_submodule(path) for path in anatomy.blocks]
        self._paths = anatomy.blocks
        self._body = Residence(body, load, names, dtype)
        self._recorder = Recorder()
        self._front_model = _trunk(body, self._blocks, self._recorder.visit)
        self._back_model = _trunk(body, self._blocks, self._pass_back)
        self._front = Residence(self._front_model, load, names, dtype)
        self._back = Residence(self._back_model, load, names, dtype)
        outside = self._body.names_outside(anatomy.blocks)
        ends = {layer.name: layer.parameter for layer in anatomy.layers if layer.block is None}
        embedding, head = ends.get(anatomy.embedding or ""), ends.get(anatomy.head or "")
        self._front_names = [name for name in outside if name != head or head == embedding]
        self._back_names = [name for name in outside if name != embedding or head == embedding]
        self._stub_embedding()
        self._calls: OrderedDict[tuple[int, int], list[BlockCall]] = OrderedDict()
        self._returns: Returns = None
        self._probed = False
        self._lock = threading.RLock()
        self._local = threading.local()

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids ``(B, T)`` int64 to what the first block is given, ``(B, T, d)``. Lets gradients through."""
        with self.embed_module(), self._lock:
            self._probe()
            shape = (ids.shape[0], ids.shape[1])
            hidden, calls = self._front_run(ids, self._returns, upto=1 if shape in self._calls else len(self._blocks))
            self._remember(shape, calls)
            return hidden

    def run(self, module: nn.Module, k: int, hidden: Tensor) -> Tensor:
        """Hidden states ``(B, T, d)`` through ``module``, which is block ``k`` (or a replacement for it)."""
        args, kwargs = self._call(k, hidden.shape[0], hidden.shape[1]).with_hidden(hidden)
        output = module(*args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states ``(B, T, d)`` after the last block to logits ``(B, T, V)`` float32. Lets gradients through."""
        with self.head_module():
            with self._lock:
                self._probe()
            for returns in _RETURNS if len(self._blocks) == 1 else (self._returns,):
                logits = self._finish(hidden, returns)
                if logits is not None:
                    return logits.float()
        raise UnknownArchitecture(f"{type(self._back_model).__name__} did not turn hidden states into logits.")

    @contextmanager
    def block(self, k: int) -> Iterator[nn.Module]:
        """Block ``k`` with its weights. They go when the last of those who asked for it is done."""
        with self._body.holding(self._body.names_under(self._paths[k])):
            yield self._blocks[k]

    @contextmanager
    def embed_module(self) -> Iterator[nn.Module]:
        """The model with all that precedes the blocks; while it is open, :meth:`embed` loads nothing anew."""
        with self._front.holding(self._front_names):
            yield self._front_model

    @contextmanager
    def head_module(self) -> Iterator[nn.Module]:
        """The model with final norm and head; while it is open, :meth:`head` loads nothing anew.

        Its modules have the names they have in the whole model, for hooks.
        """
        with self._back.holding(self._back_names):
            yield self._back_model

    def close(self) -> None:
        """Let go of all weights and remembered masks."""
        for residence in (self._body, self._front, self._back):
            residence.close()
        with self._lock:
            self._calls.clear()

    def _call(self, k: int, batch: int, length: int) -> BlockCall:
        """What block ``k`` is handed besides the hidden states, for batches of this shape."""
        shape = (batch, length)
        with self._lock:
            if shape not in self._calls:
                with self.embed_module(), torch.no_grad():
                    self._probe()
                    ids = torch.ones(shape, dtype=torch.int64)
                    self._remember(shape, self._front_run(ids, self._returns, upto=len(self._blocks))[1])
            self._calls.move_to_end(shape)
            return self._calls[shape][k]

    def _remember(self, shape: tuple[int, int], calls: list[BlockCall]) -> None:
        if len(calls) == len(self._blocks):
            self._calls.setdefault(shape, calls)
            if len(self._calls) > _SHAPES_KEPT:
                self._calls.popitem(last=False)

    def _probe(self) -> None:
        """Find out, once, whether blocks return tensors or tuples, and that what they are handed knows no text.

        Caller holds the lock.
        """
        if self._probed:
            return
        texts = [torch.full((2, 3), token, dtype=torch.int64) for token in (1, 2)]
        name, reasons = type(self._front_model).__name__, []
        for returns in _RETURNS:
            try:
                with self.embed_module(), torch.no_grad():
                    first, second = (
                        self._front_run(text, returns, upto=len(self._blocks), careful=True)[1] for text in texts
                    )
            except _MISUSE as error:
                reasons.append(str(error))
                continue
            for k, (a, b) in enumerate(zip(first, second, strict=True)):
                different = same_context(a, b)
                if different is not None:
                    raise UnknownArchitecture(
                        f"The blocks of {name} cannot be run one by one: block {k} is handed {different}, "
                        "which depends on the text and not only on its length."
                    )
            self._returns, self._probed = returns, True
            return
        raise UnknownArchitecture(f"The blocks of {name} cannot be run one by one: {reasons[0]}.")

    def _front_run(
        self, ids: Tensor, returns: Returns, *, upto: int, careful: bool = False
    ) -> tuple[Tensor, list[BlockCall]]:
        """What the first block is given, and the calls of the first ``upto`` blocks."""
        with (
            torch.inference_mode(False),
            self._recorder.recording(returns, upto=upto, careful=careful) as record,
        ):
            try:
                self._front_model(input_ids=ids, use_cache=False)
            except Recorder.Reached:
                return record.first, record.calls
        raise ValueError("not all of them are called")

    def _finish(self, hidden: Tensor, returns: Returns) -> Tensor | None:
        """Logits, or None when the model cannot take what its blocks' stand-ins return."""
        self._local.hidden, self._local.returns = hidden, returns
        ids = torch.ones(hidden.shape[:2], dtype=torch.int64)
        try:
            output = self._back_model(input_ids=ids, use_cache=False)
        except _MISUSE:
            if len(self._blocks) > 1:
                raise
            return None
        finally:
            del self._local.hidden
        logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
        return logits if logits.shape[:2] == hidden.shape[:2] and logits.ndim == 3 else None

    def _pass_back(self, _k: int, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        return Extra.pack(self._local.hidden, self._local.returns)

    def _stub_embedding(self) -> None:
        """The way to the head passes the embedding, whose weights it does not need: zeros do."""
        embedding: Any = self._back_model.get_input_embeddings()  # type: ignore[operator]
        width, dtype = embedding.weight.shape[1], self._dtype
        embedding.forward = lambda ids, **_: torch.zeros((*ids.shape, width), dtype=dtype)


def _trunk(
    body: nn.Module, blocks: list[nn.Module], visit: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
) -> nn.Module:
    """A copy of the model in which blocks only call ``visit(number, args, kwargs)``; their attributes stay readable."""
    memo: dict[int, Any] = {}
    for number, block in enumerate(blocks):
        stand_in = copy.copy(block)
        for key, value in vars(block).items():
            if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                vars(stand_in)[key] = type(value)()
        stand_in.forward = _visitor(visit, number)
        memo[id(block)] = stand_in
    trunk = copy.deepcopy(body, memo)
    config: Any = trunk.config
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # stand-ins have no routers to report on
    return trunk


def _visitor(visit: Callable[[int, tuple[Any, ...], dict[str, Any]], Any], number: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: visit(number, args, kwargs)
