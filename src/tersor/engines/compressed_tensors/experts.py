"""Experts, which transformers stacks into one parameter, as the linear layers that files and other engines have.

A checkpoint of the kind of Mixtral or Qwen-MoE holds ``experts.3.gate_proj.weight`` and its like, one matrix each; the
model that transformers 5 makes of it holds one parameter ``experts.gate_up_proj`` with the rows of all of them. vLLM
and the library know layers by the names in the files. transformers reads packed experts too, as it stacks them, if all
are of one scheme.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tersor.contracts import Layer, Shape

_ONE = re.compile(r"(.+\.)(\d+)(\.[^.]+)\.weight")


@dataclass(frozen=True)
class Piece:
    """A matrix of a layer that files hold under a name of its own. ``module``: that name; ``rows``: of the stack."""

    module: str
    rows: slice
    shape: Shape


def pieces_of(layer: Layer, names: Sequence[str]) -> tuple[Piece, ...] | None:
    """The matrices of a layer of experts; ``names``: the tensors in the source that its parameter is made of.

    An expert's matrices (gate and up) lie one below the other, in the order in which ``names`` has them first. None
    where the files do not hold one matrix an expert and kind.
    """
    found = {name: _ONE.fullmatch(name) for name in names}
    kinds = list(dict.fromkeys((match[1], match[3]) for match in found.values() if match))
    if None in found.values() or not kinds or layer.transposed or layer.shape[0] % len(kinds):
        return None
    rows = layer.shape[0] // len(kinds)
    made = []
    for expert in range(layer.copies):
        for number, (before, after) in enumerate(kinds):
            start = expert * layer.shape[0] + number * rows
            made.append(Piece(f"{before}{expert}{after}", slice(start, start + rows), (rows, layer.shape[1])))
    return tuple(made) if {f"{piece.module}.weight" for piece in made} == set(names) else None


def patterns_of(pieces: Sequence[Piece]) -> list[str]:
    """Targets for all experts alike, whatever their block and number."""
    words = (piece.module.split(".") for piece in pieces)
    made = (r"\.".join(r"\d+" if word.isdigit() else re.escape(word) for word in path) for path in words)
    return [f"re:{pattern}$" for pattern in dict.fromkeys(made)]
