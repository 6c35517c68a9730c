"""The program of a decoder's step, written from its structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.kernels.step import Program, make_cache
from tersor.runtime.decoding.handed import Handed
from tersor.runtime.decoding.linears import compiled_product
from tersor.runtime.decoding.structure import Attention, GatedMlp, Layer, Norm, Structure


@dataclass(frozen=True)
class Stretch:
    """Operations that are run in one call, or one linear layer that has no compiled product and is run by torch."""

    first: int
    stop: int
    host: Callable[[int], None] | None = None


@dataclass
class Step:
    """A program and its buffers.

    ``hidden (tokens, width)``: where embeddings are put. ``logits (vocabulary,)``: of the last token, after all
    stretches; those from ``head`` on are needed for nothing else. ``kinds``: what each operation is, for timings.
    """

    program: Program
    hidden: Tensor
    logits: Tensor
    head: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)


def write_step(
    structure: Structure, handed: Sequence[Handed], *, tokens: int, context: int, cache_dtype: torch.dtype
) -> Step:
    """The program of steps of up to ``tokens`` tokens in texts of up to ``context``, with its caches."""
    writer = _Writer(structure, tokens, context, cache_dtype)
    for layer, given in zip(structure.layers, handed, strict=True):
        writer.layer(layer, given)
    return writer.end(structure)


class _Writer:
    def __init__(self, structure: Structure, tokens: int, context: int, cache_dtype: torch.dtype) -> None:
        self._context, self._cache_dtype = context, cache_dtype
        heads = max(layer.attention.heads * layer.attention.dim for layer in structure.layers)
        keys = max(layer.attention.key_heads * layer.attention.dim for layer in structure.layers)
        inner = max(layer.mlp.width for layer in structure.layers)
        widths = (structure.width, structure.width, heads, heads + 2 * keys, 2 * inner, inner, structure.width)
        self._flat = [torch.zeros(tokens * width) for width in widths]
        self._tokens, self._width = tokens, structure.width
        self._program = Program(tokens, context)
        self._done = 0
        self._step = Step(self._program, self._flat[0].view(tokens, -1), torch.zeros(structure.vocabulary))

    def layer(self, layer: Layer, given: Handed) -> None:
        hidden, normed, out = (self._buffer(place, self._width) for place in (0, 1, 6))
        for before, part, after in (
            (layer.before_attention, layer.attention, layer.after_attention),
            (layer.before_mlp, layer.mlp, layer.after_mlp),
        ):
            inputs = hidden
            if before is not None:
                self._norm(hidden, normed, before)
                inputs = normed
            if isinstance(part, Attention):
                self._attention(inputs, out, part, given)
            else:
                self._mlp(inputs, out, part)
            if after is not None:
                self._norm(out, out, after)
            self._program.add(out, hidden)
            self._called("add")

    def end(self, structure: Structure) -> Step:
        """Final norm and head, for the last token alone."""
        self._close()
        step = self._step
        step.head = len(step.stretches)
        last, logits = torch.zeros(1, self._width), step.logits.view(1, -1)
        self._program.take_last(step.hidden, last)
        self._called("copy")
        self._norm(last, last, structure.norm)
        self._linears((structure.head,), last, (logits,))
        if structure.logit_cap:
            self._program.soft_cap(logits, structure.logit_cap)
            self._called("cap")
        self._close()
        return step

    def _attention(self, inputs: Tensor, out: Tensor, part: Attention, given: Handed) -> None:
        queries, keys = part.heads * part.dim, part.key_heads * part.dim
        qkv, attended = self._buffer(3, queries + 2 * keys), self._buffer(2, queries)
        q, k, v = qkv[:, :queries], qkv[:, queries : queries + keys], qkv[:, queries + keys :]
        self._linears(part.inputs, inputs, (qkv,) if len(part.inputs) == 1 else (q, k, v))
        for norm, x in ((part.query_norm, q), (part.key_norm, k)):
            if norm is not None:
                self._norm(x, x, norm)
        if part.rotates:
            for x in (q, k):
                self._program.rope(x, given.cosine, given.sine, dim=part.dim, neighbours=given.neighbours)
                self._called("rope")
        cached_keys, cached_values = make_cache(part.key_heads, self._context, part.dim, self._cache_dtype)
        self._program.attention(
            q,
            k,
            v,
            attended,
            keys=cached_keys,
            values=cached_values,
            scale=part.scale,
            window=given.window,
            cap=part.cap,
        )
        self._called("attention")
        self._linears((part.output,), attended, (out,))

    def _mlp(self, inputs: Tensor, out: Tensor, part: GatedMlp) -> None:
        both, gated = self._buffer(4, 2 * part.width), self._buffer(5, part.width)
        gate, up = both[:, : part.width], both[:, part.width :]
        self._linears(part.inputs, inputs, (both,) if len(part.inputs) == 1 else (gate, up))
        self._program.gate(gate, up, gated, part.activation)
        self._called("gate")
        self._linears((part.output,), gated, (out,))

    def _norm(self, x: Tensor, y: Tensor, norm: Norm) -> None:
        self._program.norm(x, y, norm.weight, eps=norm.eps, bias=norm.bias, centred=norm.centred)
        self._called("norm")

    def _linears(self, linears: Sequence[Any], x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Linear layers of the same inputs: those that have compiled products in one operation, the others by torch."""
        compiled, others = [], []
        for linear, y in zip(linears, outputs, strict=True):
            product = compiled_product(linear)
            if product is None:
                others.append(_on_host(linear, x, y))
            else:
                bias = linear.bias
                compiled.append((y, product, None if bias is None else bias.detach().float().contiguous()))
        if compiled:
            self._program.products(x, *compiled)
            self._called("products")
        for run in others:
            self._close()
            self._step.stretches.append(Stretch(self._done, self._done, run))

    def _called(self, kind: str) -> None:
        self._step.kinds.append(kind)

    def _close(self) -> None:
        """End the stretch of operations that one call runs."""
        if self._program.size > self._done:
            self._step.stretches.append(Stretch(self._done, self._program.size))
            self._done = self._program.size

    def _buffer(self, place: int, width: int) -> Tensor:
        return self._flat[place][: self._tokens * width].view(self._tokens, width)


def _on_host(linear: nn.Module, x: Tensor, y: Tensor) -> Callable[[int], None]:
    own = linear.weight.dtype if isinstance(linear.weight, Tensor) else torch.float32

    def run(n: int) -> None:
        n = min(n, len(x))  # one, after the last token has been taken
        y[:n] = linear(x[:n].to(own))

    return run
