"""Step by step decoding with a cache of keys and values, made fast for many sequences on a CPU.

Any causal model of transformers can be stepped through the cache it makes for itself. For models whose every layer is
plain attention there is a faster way, used when it reproduces the first one's logits: keys and values lie in buffers
that grow by blocks, where the usual cache copies itself for every token; and one query per sequence is put against all
its keys as a batched matrix product, where the flash kernel, made for long queries, repacks keys and values for each
query head. On a 135 M Llama in bfloat16, 32 sequences of 512 tokens, attention took 16 ms a layer and step in the
flash kernel, 1 ms so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tersor.errors import BadInput

BLOCK = 64
"""Tokens by which buffers grow. All sequences pay for the unused rest of the last block."""
ATTENTION = "tersor_decode"
"""Name under which the attention function is registered with transformers."""
AGREEMENT = 0.1
"""Mean difference of logits, in standard deviations of the logits, up to which the fast way counts as the same.
Rounding in bfloat16 gives about 0.03; a wrong mask or position about 1."""

Step: TypeAlias = Callable[[Tensor], Tensor]
"""The next tokens ``(sequences, 1)`` int64 to logits ``(sequences, vocabulary)``; remembers what came before."""


class _RefusedError(Exception):
    """The model's attention has an ingredient that the fast way does not compute."""


class _BlockLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values ``(sequences, heads, capacity, head dim)``, filled from the left; the rest is zero.

    What it hands to the attention are views of the filled part that carry the whole buffer as ``whole``: products
    with a contiguous buffer are twice as fast as with a part of it, which would be copied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (_more(key_states.narrow(2, 0, 0)), _more(value_states.narrow(2, 0, 0)))
        if self.filled == self.keys.shape[2]:
            self.keys, self.values = _more(self.keys), _more(self.values)
        self.keys[:, :, self.filled : self.filled + 1] = key_states
        self.values[:, :, self.filled : self.filled + 1] = value_states
        self.filled += 1
        return _part(self.keys, self.filled), _part(self.values, self.filled)

    def get_seq_length(self) -> int:
        return self.filled


def _more(buffer: Tensor) -> Tensor:
    sequences, heads, _, width = buffer.shape
    return torch.cat([buffer, buffer.new_zeros(sequences, heads, BLOCK, width)], dim=2)


def _part(buffer: Tensor, filled: int) -> Tensor:
    part = buffer.narrow(2, 0, filled)
    part.whole = buffer  # type: ignore[attr-defined]
    return part


def _attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one query a sequence, ``(sequences, heads, 1, d)``, query heads grouped by key head."""
    refused = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    sequences, heads, length, width = query.shape
    if refused or attention_mask is not None or length != 1:
        raise _RefusedError(*refused)
    filled = key.shape[2]
    # A model may have transformed what the cache gave it; then it is used as it is.
    keys, values = getattr(key, "whole", key), getattr(value, "whole", value)
    if keys.shape[2] != values.shape[2]:
        keys, values = key, value
    scale = width**-0.5 if scaling is None else scaling
    grouped = (query * scale).reshape(sequences, key.shape[1], heads // key.shape[1], width)
    scores = torch.matmul(grouped, keys.transpose(2, 3))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores[..., filled:] = float("-inf")
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, values).reshape(sequences, 1, heads, value.shape[-1]), None


def _own_cache(model: Any) -> Step:
    """Steps through whatever cache the model makes."""
    cache: dict[str, Any] = {}

    def step(ids: Tensor) -> Tensor:
        output = model(input_ids=ids, use_cache=True, **cache)
        name = next((name for name in ("past_key_values", "cache_params") if output.get(name) is not None), None)
        if name is None:
            raise BadInput(
                f"{type(model).__name__} keeps no cache of earlier tokens, so sampling text from it would take too "
                f"long; give a text instead."
            )
        cache[name] = output[name]
        logits: Tensor = output.logits[:, -1]
        return logits

    return step


def _block_cache(model: Any) -> Step:
    """Steps with buffers that grow by blocks, for the attention function above."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_BlockLayer() for _ in cache.layers]

    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits

    return step


def _eligible(model: Any, length: int) -> bool:
    """Whether every layer is plain attention, called through transformers' interface, in a model of one part.

    A sliding window that holds all ``length`` tokens is plain attention too.
    """
    if not getattr(model, "_supports_attention_backend", False) or getattr(model.config, "sub_configs", None):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= length)
        for layer in layers
    )


def _logits_of(step: Step, ids: Tensor) -> Tensor:
    return torch.stack([step(ids[:, at : at + 1]).float() for at in range(ids.shape[1])])


@contextmanager
def decoder(model: Any, *, length: int) -> Iterator[Callable[[], Step]]:
    """A maker of steps, one for each batch of sequences, the fast kind where the model allows it.

    ``model``: a causal language model of transformers in evaluation mode. ``length``: tokens of a sequence at
    most. While the context is open its attention
    implementation may be another one; it is set back at the end. Steps of different batches may run on different
    threads. Raises BadInput when stepping and the model keeps no cache.
    """
    if not _eligible(model, length):
        yield lambda: _own_cache(model)
        return
    few = torch.arange(8).reshape(2, 4) % model.config.vocab_size
    with torch.inference_mode():
        expected = _logits_of(_own_cache(model), few)
    before = model.config._attn_implementation
    AttentionInterface.register(ATTENTION, _attend)
    model.set_attn_implementation(ATTENTION)
    try:
        try:
            with torch.inference_mode():
                found = _logits_of(_block_cache(model), few)
            same = bool((found - expected).abs().mean() <= AGREEMENT * expected.std() + 1e-5)
        except _RefusedError:
            same = False
        if not same:
            model.set_attn_implementation(before)
        yield lambda: _block_cache(model) if same else _own_cache(model)
    finally:
        model.set_attn_implementation(before)


def cache_bytes(model: Any, *, batch: int, length: int) -> int:
    """Bytes of keys and values for ``batch`` sequences of ``length`` tokens: what sampling needs beside the weights.

    An estimate from the configuration: 0 where it does not tell.
    """
    config = model.config
    queries = int(getattr(config, "num_attention_heads", 0))
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    width = int(getattr(config, "head_dim", None) or (config.hidden_size // queries if queries else 0))
    rounded = -(-length // BLOCK) * BLOCK
    return 2 * int(config.num_hidden_layers) * heads * width * rounded * batch * int(model.dtype.itemsize)
