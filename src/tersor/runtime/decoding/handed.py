"""What a model hands to its layers besides hidden states: angles of rotary embeddings, and which positions are seen.

Both are taken from the model itself, run with stand-ins for its layers, so that every way of scaling angles and every
pattern of windows is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.errors import UnknownArchitecture
from tersor.runtime.decoding.structure import MISUSE, Structure

_FEW = 8


@dataclass(frozen=True)
class Handed:
    """For one layer: cosines and sines ``(context, rotary)`` float32, and the window (0: none)."""

    cosine: Tensor
    sine: Tensor
    window: int
    neighbours: bool


class _Reached(Exception):
    """Raised in place of the last layer: no error, the run has shown all it can."""


def find_handed(structure: Structure, config: Any, context: int) -> list[Handed]:
    """What each layer is handed in a text of up to ``context`` tokens. Raises UnknownArchitecture, saying why."""
    # A mask that is ready, so that none of context x context is made.
    ready = torch.zeros(1, 1, 1, 1)
    angles = _angles(_run(structure, context, attention_mask=ready), context)
    for layer, (cosine, _) in zip(structure.layers, angles, strict=True):
        if layer.attention.rotates and cosine.shape[1] > layer.attention.dim:
            raise UnknownArchitecture(
                f"its angles of positions are {cosine.shape[1]} a token, and a head has {layer.attention.dim} numbers"
            )
    if context > _FEW:
        few = _angles(_run(structure, _FEW, attention_mask=ready), _FEW)
        for (cosine, sine), (other, another) in zip(angles, few, strict=True):
            if not (torch.equal(cosine[:_FEW], other) and torch.equal(sine[:_FEW], another)):
                raise UnknownArchitecture(
                    f"its angles of positions are others in texts of {context} tokens than in shorter ones"
                )
    length = min(context, max(_FEW, *_widths(config)) + 3)
    windows = [_window(call.get("attention_mask"), length) for call in _run(structure, length)]
    shared: list[Tensor] = []
    return [
        Handed(_kept(cosine, shared), _kept(sine, shared), window, _neighbours(cosine))
        for (cosine, sine), window in zip(angles, windows, strict=True)
    ]


def _widths(config: Any) -> Sequence[int]:
    """Every number in a configuration that may say how far a layer sees."""
    found = [value for name, value in config.to_dict().items() if "window" in str(name) or "chunk" in str(name)]
    return [0, 0, *(value for value in found if isinstance(value, int) and value > 0)]


def _run(structure: Structure, length: int, **given: Any) -> list[Mapping[str, Any]]:
    """The keywords of the call of each layer, in a run with so many tokens."""
    calls: list[Mapping[str, Any]] = []
    before = [vars(block).get("forward") for block in structure.blocks]
    # In float32 also where the model is of 16 bits: it gives angles in the type of what it is given.
    hidden = torch.zeros(1, 1, structure.width).expand(1, length, structure.width)
    try:
        for number, block in enumerate(structure.blocks):
            block.forward = _stand_in(calls, number, len(structure.blocks))  # type: ignore[method-assign]
        with torch.no_grad():
            structure.base(inputs_embeds=hidden, use_cache=False, **given)
    except _Reached:
        return calls
    except MISUSE as error:
        raise UnknownArchitecture(f"it cannot be run without its layers ({error})") from error
    finally:
        for block, forward in zip(structure.blocks, before, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward  # type: ignore[method-assign]
    raise UnknownArchitecture("it does not call its layers one after the other")


def _stand_in(calls: list[Mapping[str, Any]], number: int, count: int) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *_args: Any, **kwargs: Any) -> Tensor:
        if number != len(calls):
            raise ValueError("layers are not called each once and in order")
        calls.append(kwargs)
        if number + 1 == count:
            raise _Reached
        return hidden_states

    return forward


def _angles(calls: Sequence[Mapping[str, Any]], length: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for call in calls:
        pair = call.get("position_embeddings")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(x, Tensor) for x in pair):
            raise UnknownArchitecture("its layers are not handed cosines and sines of positions")
        cosine, sine = (x.detach().float() for x in pair)
        if cosine.ndim != 3 or cosine.shape[:2] != (1, length) or cosine.shape != sine.shape or cosine.shape[2] % 2:
            raise UnknownArchitecture(f"its cosines of positions have the shape {tuple(cosine.shape)}")
        found.append((cosine[0].contiguous(), sine[0].contiguous()))
    return found


def _neighbours(cosine: Tensor) -> bool:
    """Whether equal angles lie side by side; in the other layout the second half repeats the first."""
    half = cosine.shape[1] // 2
    if torch.equal(cosine[:, :half], cosine[:, half:]):
        return False
    if torch.equal(cosine[:, 0::2], cosine[:, 1::2]):
        return True
    raise UnknownArchitecture("its angles of positions are not laid out in pairs")


def _kept(table: Tensor, shared: list[Tensor]) -> Tensor:
    """The same tensor for all layers with equal angles."""
    for other in shared:
        if torch.equal(other, table):
            return other
    shared.append(table)
    return table


def _window(mask: Any, length: int) -> int:
    """How many positions the last of ``length`` sees (0: all); the mask must be causal, with a window or without."""
    if mask is None:
        return 0
    if not isinstance(mask, Tensor) or mask.shape[-2:] != (length, length) or mask.numel() != length * length:
        raise UnknownArchitecture("the mask of its attention has an unknown form")
    seen = mask if mask.dtype == torch.bool else mask == 0
    seen = seen.reshape(length, length)
    width = int(seen[-1].sum())
    expected = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - width)
    if not torch.equal(seen, expected):
        raise UnknownArchitecture("its attention does not see the last positions, all or a window of them")
    return 0 if width == length else width
