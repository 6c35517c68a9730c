"""Tuning an encoded block against what the original block puts out: AutoRound (arXiv:2309.05516) and its relatives.

The loss is the mean squared error of the block's output, over states that reach the block in the compressed model.
Rounding offsets and scales go by signs of gradients, with a step that falls to zero linearly. What is kept is the best
of several iterates, each measured on all the states and as it will be stored; the first is what the codec gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.errors import BadInput
from tersor.parallel import in_order
from tersor.recovery.tunable import Tunable

Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""A block with the given weights, ``(out, in)`` each by name and in the states' dtype: states ``(B, T, d)`` to its
output ``(B, T, d)``. Differentiable in the weights; called from several threads at once."""

Decode = Callable[[str, Mapping[str, Tensor]], Tensor]
"""The values ``(out, in)`` float32 of a weight, by its name, from stored tensors."""


@dataclass(frozen=True)
class Tuned:
    """``tensors``: what to store for each weight, by name. ``outputs (n, T, d)``: the block's with just these.

    ``before``, ``after``: mean squared error per entry, relative to the targets' mean square.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    outputs: Tensor
    before: float
    after: float


@dataclass(frozen=True)
class BlockTuning:
    """The settings of :func:`tune_block`, which is what calling one does.

    ``steps``: each on about ``batch`` tokens, in whole sequences. ``rate``: of the first one, about ``1 / steps`` as
    published. ``checks``: how often the loss is measured on all states, evenly over the steps and after the last.
    ``sample``: how many tokens whoever has a text should take of it. ``mixed``: whether blocks of float32
    states are run in bfloat16 where PyTorch holds that safe (autocast); losses never are. ``seed``: of the order of
    sequences.
    """

    steps: int = 48
    batch: int = 1024
    rate: float = 0.02
    checks: int = 2
    sample: int = 8192
    mixed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.checks < 1 or self.sample < 1 or not self.rate > 0:
            raise BadInput(
                f"{self} cannot be used: there are 0 or more steps, batch, checks and sample are at least 1, and the "
                f"rate is above 0."
            )

    def precision(self, device: torch.device) -> AbstractContextManager[object]:
        """What blocks are run in, on one thread."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.mixed)

    def rows(self, length: int) -> int:
        """How many sequences of ``length`` tokens make the sample; at least one."""
        return max(self.sample // length, 1)

    def __call__(
        self,
        run: Run,
        weights: Mapping[str, Tunable],
        decode: Decode,
        inputs: Tensor,
        targets: Tensor,
        *,
        workers: int = 1,
    ) -> Tuned:
        return tune_block(run, weights, decode, inputs, targets, self, workers=workers)


def tune_block(
    run: Run,
    weights: Mapping[str, Tunable],
    decode: Decode,
    inputs: Tensor,
    targets: Tensor,
    tuning: BlockTuning,
    *,
    workers: int = 1,
) -> Tuned:
    """Tune what ``weights`` lets move, by name; see the module.

    ``inputs``: states that reach the block, ``targets``: what it should put out, ``(n, T, d)`` each. A weight that
    ``run`` needs and ``weights`` does not name is its own affair. Results do not depend on ``workers``. Raises
    BadInput for states that do not go together.
    """
    if inputs.shape != targets.shape or inputs.ndim != 3 or not inputs.numel():
        raise BadInput(
            f"A block cannot be tuned from states {tuple(inputs.shape)} towards {tuple(targets.shape)}: give both as "
            f"(sequences, length, width), none of them 0."
        )
    steps, batch = tuning.steps, min(max(tuning.batch // inputs.shape[1], 1), len(inputs))
    power = float(targets.float().square().mean()) or 1.0
    best = _measured(run, weights, decode, inputs, targets, tuning, workers)
    before = best.after
    generator = torch.Generator().manual_seed(tuning.seed)
    order = torch.empty(0, dtype=torch.int64)
    marks = {round(steps * check / tuning.checks) for check in range(1, tuning.checks + 1)}
    for step in range(steps if weights else 0):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(inputs), generator=generator)])
        picked, order = order[:batch], order[batch:]
        rate = tuning.rate * (1 - step / steps)
        _step(run, weights, inputs[picked], targets[picked], rate, tuning, workers)
        if step + 1 in marks:
            now = _measured(run, weights, decode, inputs, targets, tuning, workers)
            best = now if now.after < best.after else best
    return Tuned(best.tensors, best.outputs, before / power, best.after / power)


def _step(
    run: Run,
    weights: Mapping[str, Tunable],
    inputs: Tensor,
    targets: Tensor,
    rate: float,
    tuning: BlockTuning,
    workers: int,
) -> None:
    names = list(weights)
    values = dict(zip(names, in_order(lambda at: weights[names[at]].values(), len(names), workers), strict=True))
    leaves = {name: value.to(inputs.dtype).requires_grad_(True) for name, value in values.items()}
    total = [torch.zeros_like(value) for value in values.values()]

    def slopes(row: int) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            with tuning.precision(inputs.device):
                output = run(leaves, inputs[row : row + 1])
            loss = (output.float() - targets[row : row + 1].float()).square().sum()
            return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    for found in in_order(slopes, len(inputs), workers):
        for at, slope in enumerate(found):
            total[at] += slope

    def descend(at: int) -> None:
        weights[names[at]].descend(total[at], rate)

    list(in_order(descend, len(names), workers))


def _measured(
    run: Run,
    weights: Mapping[str, Tunable],
    decode: Decode,
    inputs: Tensor,
    targets: Tensor,
    tuning: BlockTuning,
    workers: int,
) -> Tuned:
    """The weights as they would be stored, and the mean squared error with them."""
    names = list(weights)
    stored = {name: weights[name].stored() for name in names}
    decoded = in_order(lambda at: decode(names[at], stored[names[at]]), len(names), workers)
    values = {name: value.to(inputs.dtype) for name, value in zip(names, decoded, strict=True)}

    def work(row: int) -> Tensor:
        with torch.no_grad(), tuning.precision(inputs.device):
            return run(values, inputs[row : row + 1]).to(inputs.dtype)

    outputs = torch.cat(list(in_order(work, len(inputs), workers)))
    error = sum(
        float((one.float() - other.float()).double().square().sum())
        for one, other in zip(outputs, targets, strict=True)
    )
    loss = error / targets.numel()
    return Tuned(stored, outputs, loss, loss)


__all__ = ["BlockTuning", "Decode", "Run", "Tuned", "tune_block"]
