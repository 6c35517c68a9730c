"""What all stages of a run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.anatomy import Source, WeightLoader
from tersor.codecs import parse
from tersor.codecs.inner import streamed
from tersor.contracts import Anatomy, Codec, Layer, Solver
from tersor.runtime.stream import BlockStream
from tersor.solvers import ROW_CHUNK, CoordinateDescent, ErrorFeedback, Nearest
from tersor.stages.options import Options
from tersor.stages.work import Work

Progress = Callable[[str, int, int], None]
"""Called with the stage's name, units done and units in all."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress for whoever does not want any."""


@dataclass(frozen=True)
class Context:
    """One run: the source and its anatomy, where to keep work, what was asked, how many workers.

    ``chunk``: sequences run through a block together; fixed by the options alone, never by the machine.
    """

    source: Source
    model: nn.Module
    anatomy: Anatomy
    loader: WeightLoader
    options: Options
    work: Work
    workers: int
    chunk: int
    progress: Progress = silent

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.options.dtype == "bfloat16" else torch.float32

    @property
    def width(self) -> int:
        """Width of the hidden state between blocks."""
        return int(self.source.config.get_text_config().hidden_size)

    def held_out(self, sequences: int) -> int:
        """How many of the last chunks of a text are held out of fitting: a quarter, none of a single one."""
        chunks = -(-sequences // self.chunk)
        return max(1, chunks // 4) if chunks > 1 else 0

    def check_streamed(self) -> None:
        """Raise UnknownArchitecture now, not after minutes of work, when the blocks cannot be run one by one."""
        stream = self.stream()
        try:
            with torch.no_grad():
                stream.embed(torch.ones(1, 2, dtype=torch.int64))
        finally:
            stream.close()

    def stream(self) -> BlockStream:
        """The source model, block by block, in the run's dtype."""
        return BlockStream(
            self.model, self.anatomy, lambda names: self.loader.load(names, self.dtype), dtype=self.dtype
        )

    def solver(self) -> Solver:
        solvers: Mapping[str, Solver] = {
            "coordinate": CoordinateDescent(),
            "feedback": ErrorFeedback(),
            "nearest": Nearest(),
        }
        return solvers[self.options.solver]

    def sampler(self) -> Solver:
        """The solver for rate–distortion points: coordinate descent without its sweeps.

        On real layers the sweeps lower the error by 6 to 7 % at every rate from 2 to 4 bits alike, so curves only
        shift; they would double the time that points take.
        """
        solver = self.solver()
        return solver.start if isinstance(solver, CoordinateDescent) else solver

    def weight(self, layer: Layer) -> Tensor:
        """A layer's own weights from the source, ``(copies, out, in)``, in the source's dtype."""
        return oriented(self.loader.load([layer.parameter])[layer.parameter], layer)


def as_parameter(weight: Tensor, layer: Layer) -> Tensor:
    """A layer's ``(copies · out, in)`` weight shaped as the model's parameter is."""
    if layer.copies > 1:
        weight = weight.reshape(layer.copies, *layer.shape)
    return weight.transpose(-1, -2).contiguous() if layer.transposed else weight


def oriented(parameter: Tensor, layer: Layer) -> Tensor:
    """A parameter as ``(copies, out, in)``, whichever way it is stored; a view where possible."""
    if layer.transposed:
        parameter = parameter.transpose(-1, -2)
    return parameter.reshape(layer.copies, *layer.shape)


def row_pieces(codec: Codec, layer: Layer) -> list[slice]:
    """Rows of a layer to decode at a time: all of them where it is one stream."""
    rows = layer.stored_shape[0]
    step = max(rows, 1) if streamed(codec, layer.stored_shape) else ROW_CHUNK
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def block_weights(context: Context, module: nn.Module, block: int) -> dict[Layer, Tensor]:
    """The materialised parameters of a block's layers, as they stand in the running module."""
    prefix = context.anatomy.blocks[block] + "."
    return {
        layer: module.get_parameter(layer.parameter.removeprefix(prefix)) for layer in context.anatomy.layers_of(block)
    }


def parsed(texts: tuple[str, ...]) -> dict[str, Codec]:
    """Codecs by their text. Raises BadInput for one that cannot be read."""
    return {text: parse(text) for text in texts}


Record = dict[str, Any]
