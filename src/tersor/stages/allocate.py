"""Stage: curves and a budget to a plan, exact to the byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from tersor.allocators import Exact, Lagrangian, allocate_within, expand_groups, merge_groups
from tersor.artifact import (
    MAX_SHARD_SIZE,
    Layout,
    compute_layout,
    fixed_cost,
    header_cost,
    most_shards,
    tensor_header_cost,
    validate_plan,
)
from tersor.codecs import parse
from tersor.contracts import Allocator, Anatomy, Choice, Codec, Layer, Plan, RatePoint
from tersor.engines.contract import Engine, layer_time
from tersor.engines.contract import groups as engine_groups
from tersor.engines.table import find_engine
from tersor.errors import BadInput, Infeasible, ShapeMismatch
from tersor.stages.options import Budget, Options

_SURELY = 0.97
"""Of a limit on time: an engine's times of codecs are right to a few percent. All of it where less cannot be had."""


def artifact_layout(anatomy: Anatomy, codecs: Mapping[str, Codec]) -> Layout:
    """The exact layout of all weight files for these choices."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for layer in anatomy.layers:
        for part in codecs[layer.name].parts(layer.stored_shape):
            tensors[f"{layer.name}.{part.name}"] = (part.dtype, part.shape)
    for name, (dtype, shape) in anatomy.kept.items():
        tensors[name] = (dtype, shape)
    return compute_layout(tensors)


class Costs:
    """Bytes that choices add to the weight files, headers included; an upper bound tight to a few bytes a tensor."""

    def __init__(self, anatomy: Anatomy, largest: int) -> None:
        self._shard = min(MAX_SHARD_SIZE, max(largest, 1))
        self._sharded = most_shards(largest) > 1
        kept = sum(
            torch.Size(shape).numel() * dtype.itemsize
            + tensor_header_cost(name, dtype, shape, max_shard_size=self._shard, sharded=self._sharded)
            for name, (dtype, shape) in anatomy.kept.items()
        )
        self.fixed = fixed_cost(most_shards(largest)) + kept

    def layer(self, layer: Layer, codec: Codec) -> int:
        parts = codec.parts(layer.stored_shape)
        header = header_cost(layer.name, parts, max_shard_size=self._shard, sharded=self._sharded)
        return header + codec.bits(layer.stored_shape) // 8


def dense_layout(anatomy: Anatomy) -> Layout:
    """The layout with every layer in bfloat16: as large as an artifact gets."""
    return artifact_layout(anatomy, {layer.name: parse("bf16") for layer in anatomy.layers})


def _header_bytes(anatomy: Anatomy) -> int:
    layout = dense_layout(anatomy)
    return layout.total_bytes - sum(entry.nbytes for entry in layout.entries.values())


def budget_bytes(anatomy: Anatomy, budget: Budget) -> int:
    """A budget of any kind as bytes of all weight files."""
    return budget.file_bytes(anatomy, _header_bytes(anatomy))


def check_feasible(anatomy: Anatomy, budget: Budget, candidates: Mapping[str, Mapping[str, Codec]]) -> None:
    """Raise Infeasible before any work, naming the least possible size, when even the smallest choices do not fit."""
    target = budget_bytes(anatomy, budget)
    costs = Costs(anatomy, target)
    cheapest = {
        layer.name: min(candidates[layer.name].values(), key=lambda codec: costs.layer(layer, codec))
        for layer in anatomy.layers
    }
    least = artifact_layout(anatomy, cheapest).total_bytes
    if least > target:
        hint = budget.asking_for(least, anatomy, _header_bytes(anatomy))
        raise Infeasible(
            f"A budget of {budget} is below the least possible for this model and these candidates, weight files of "
            f"{least:,} bytes; give {hint} or more, or allow smaller codecs with --candidates.",
            least,
        )


def make_plan(anatomy: Anatomy, curves: Mapping[str, list[RatePoint]], budget: int, options: Options) -> Plan:
    """Least predicted loss within ``budget`` bytes of weight files, and within ``options.token_time``."""
    costs = Costs(anatomy, budget)
    allocator: Allocator = Exact() if options.allocator == "exact" else Lagrangian()
    engine = find_engine(options.engine)
    groups = {} if engine is None else engine_groups(engine, anatomy)
    if options.share_fused and not groups:
        for layer in anatomy.layers:
            if layer.fused is not None:
                groups.setdefault(f"fused:{layer.fused}", []).append(layer.name)
    merged = merge_groups(curves, groups)
    try:
        if engine is None or options.token_time is None:
            chosen = allocator.allocate(merged, budget - costs.fixed)
        else:
            times = _times(engine, anatomy, merged, groups)
            room, most = budget - costs.fixed, options.token_time
            try:
                chosen = allocate_within(allocator, merged, room, times, _SURELY * most)
            except BadInput:
                chosen = allocate_within(allocator, merged, room, times, most)
    except Infeasible as error:
        # Costs are bounds, some bytes a tensor too high; the cheapest choices may fit all the same.
        chosen = {key: min(points, key=lambda point: point.nbytes) for key, points in merged.items()}
        plan = plan_from_points(anatomy, expand_groups(chosen, curves, groups), budget)
        if plan.file_bytes <= budget:
            return plan
        least = plan.file_bytes
        raise Infeasible(
            f"A budget of {budget:,} bytes is below the least possible, {least:,} bytes; give --size {least} or more.",
            least,
        ) from error
    return plan_from_points(anatomy, expand_groups(chosen, curves, groups), budget)


def _times(
    engine: Engine, anatomy: Anatomy, merged: Mapping[str, Sequence[RatePoint]], groups: Mapping[str, Sequence[str]]
) -> dict[str, list[float]]:
    """Microseconds a token that the engine takes for each point of each layer or group."""
    layers = {layer.name: layer for layer in anatomy.layers}
    return {
        key: [
            sum(layer_time(engine, anatomy, layers[name], point.choice) for name in groups.get(key, (key,)))
            for point in points
        ]
        for key, points in merged.items()
    }


def plan_from_points(anatomy: Anatomy, points: Mapping[str, RatePoint], budget: int) -> Plan:
    """A plan with exact sizes from one point per layer. ``nbytes`` of a choice is what its tensors take."""
    codecs = {name: parse(point.choice) for name, point in points.items()}
    layout = artifact_layout(anatomy, codecs)
    layers = {
        layer.name: Choice(
            points[layer.name].choice,
            codecs[layer.name].bits(layer.stored_shape) // 8,
            points[layer.name].distortion,
        )
        for layer in anatomy.layers
    }
    predicted = sum(choice.distortion for choice in layers.values())
    return Plan(layers, budget, layout.total_bytes, predicted, {})


def sized_plan(anatomy: Anatomy, given: Plan, budget: Budget | None) -> Plan:
    """A plan that a user gave, perhaps edited, with the sizes that its codecs have on this model.

    What an edited choice costs was never measured: its distortion, and with it the sum, becomes NaN. Raises BadInput,
    naming the layer, for a plan that does not belong to this model or a codec that cannot take its layer, and when the
    plan does not fit ``budget`` (None: its own, or what it takes when that is more).
    """
    codecs = validate_plan(given, [layer.name for layer in anatomy.layers], parse, where="The plan")
    layers = {}
    for layer in anatomy.layers:
        try:
            nbytes = codecs[layer.name].bits(layer.stored_shape) // 8
        except ShapeMismatch as error:
            raise BadInput(f"The plan: layer '{layer.name}': {error}") from error
        choice = given.layers[layer.name]
        layers[layer.name] = Choice(choice.codec, nbytes, choice.distortion if choice.nbytes == nbytes else math.nan)
    size = artifact_layout(anatomy, codecs).total_bytes
    target = max(given.budget, size) if budget is None else budget_bytes(anatomy, budget)
    if size > target:
        raise BadInput(
            f"The plan takes {size:,} bytes, more than the budget of {target:,}: choose smaller codecs in it, or give "
            f"--size {size}."
        )
    return Plan(layers, target, size, sum(choice.distortion for choice in layers.values()), given.options)


def uniform_plan(anatomy: Anatomy, text: str) -> Plan:
    """Every layer in one codec: what most tools do, and what plans are compared with."""
    points = {layer.name: RatePoint(0, 0.0, text) for layer in anatomy.layers}
    plan = plan_from_points(anatomy, points, 0)
    return Plan(plan.layers, plan.file_bytes, plan.file_bytes, float("nan"), {})
