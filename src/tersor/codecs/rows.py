"""Different codecs for different stretches of rows: what an embedding wants.

The vocabularies of byte-pair and unigram tokenizers are sorted by how common a token was when they were made, so the
first rows of an embedding (and of the head) carry most of the loss and the last half next to none. Stretches of rows
need no index, and being a property of the tokenizer they are not fitted to the calibration text.

>>> from tersor.codecs import parse
>>> codec = parse("rows(1024:int6:g32:s8,8192:int3:g32:s8)")
>>> codec.bits((8192, 64)) == parse("int6:g32:s8").bits((1024, 64)) + parse("int3:g32:s8").bits((7168, 64))
True
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tersor.codecs.inner import under
from tersor.codecs.text import Words, parse, reads
from tersor.contracts import Codec, Part, Shape, Stretch
from tersor.errors import BadInput, ShapeMismatch


@dataclass(frozen=True)
class RowStretches(Codec):
    """Rows up to ``stops[0]`` in ``codecs[0]``, from there to ``stops[1]`` in ``codecs[1]``, and so on.

    The last stop is the number of rows of the layer. Parts of stretch ``i`` are called ``s<i>_<part>``.
    """

    stops: tuple[int, ...]
    codecs: tuple[Codec, ...]

    def __post_init__(self) -> None:
        if len(self.stops) != len(self.codecs) or not self.stops:
            raise BadInput("A rows(...) codec needs one stop for each of its codecs, and at least one.")
        if any(low >= high for low, high in zip((0, *self.stops), self.stops, strict=False)):
            raise BadInput(
                f"The stops of {self} must ascend, beginning above 0; found {', '.join(map(str, self.stops))}."
            )
        if any(isinstance(codec, RowStretches) for codec in self.codecs):
            raise BadInput(f"{self} nests rows(...) in rows(...); write its stretches side by side.")

    def __str__(self) -> str:
        inner = ",".join(f"{stop}:{codec}" for stop, codec in zip(self.stops, self.codecs, strict=True))
        return f"rows({inner})"

    def stretches(self, rows: int) -> tuple[Stretch, ...]:
        if self.stops[-1] != rows:
            raise ShapeMismatch(
                f"Codec {self} is for a layer of {self.stops[-1]} rows, and this one has {rows}; its last stop must be "
                f"{rows}."
            )
        starts = (0, *self.stops[:-1])
        return tuple(
            Stretch(start, stop, codec, f"s{index}_")
            for index, (start, stop, codec) in enumerate(zip(starts, self.stops, self.codecs, strict=True))
        )

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        return tuple(
            replace(part, name=stretch.prefix + part.name)
            for stretch in self.stretches(shape[0])
            for part in stretch.codec.parts((stretch.stop - stretch.start, shape[1]))
        )

    def decode(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        return torch.cat(
            [
                stretch.codec.decode(under(tensors, stretch.prefix), (stretch.stop - stretch.start, shape[1]))
                for stretch in self.stretches(shape[0])
            ]
        )

    def decode_rows(self, tensors: Mapping[str, Tensor], shape: Shape, rows: slice | Tensor) -> Tensor:
        in_features = shape[1]
        stretches = self.stretches(self.stops[-1])
        device = next(iter(tensors.values())).device
        if isinstance(rows, slice):
            first, end, step = rows.indices(self.stops[-1])
            if step == 1:
                pieces = [
                    stretch.codec.decode_rows(
                        under(tensors, stretch.prefix),
                        (stretch.stop - stretch.start, in_features),
                        slice(max(first, stretch.start) - stretch.start, min(end, stretch.stop) - stretch.start),
                    )
                    for stretch in stretches
                    if max(first, stretch.start) < min(end, stretch.stop)
                ]
                return torch.cat(pieces) if pieces else torch.empty(0, in_features, dtype=torch.float32, device=device)
            rows = torch.tensor(range(first, end, step), dtype=torch.int64, device=device)
        result = torch.empty(len(rows), in_features, dtype=torch.float32, device=device)
        found = 0
        for stretch in stretches:
            mine = ((rows >= stretch.start) & (rows < stretch.stop)).nonzero()[:, 0]
            if len(mine):
                picks = rows[mine] - stretch.start
                result[mine] = stretch.codec.decode_rows(
                    under(tensors, stretch.prefix), (stretch.stop - stretch.start, in_features), picks
                )
                found += len(mine)
        if found < len(rows):
            raise IndexError(f"row numbers must lie from 0 to {self.stops[-1] - 1}, and {len(rows) - found} do not")
        return result


@reads("rows", form="rows(<stop>:<codec>,…)", heads=("rows",))
def _read(words: Words) -> RowStretches:
    pairs = [piece.split(":", 1) for piece in words.arguments]
    if not pairs or words.options or any(len(pair) != 2 or not re.fullmatch(r"\d{1,9}", pair[0]) for pair in pairs):
        raise words.refuse("write rows(<stop>:<codec>,…), such as rows(100:int4:g64,900:int2:g64).")
    if any(codec.lstrip().startswith("rows(") for _, codec in pairs):
        raise BadInput(f"Codec {words.text!r:.200} nests rows(...) in rows(...); write its stretches side by side.")
    return RowStretches(tuple(int(stop) for stop, _ in pairs), tuple(parse(codec) for _, codec in pairs))
