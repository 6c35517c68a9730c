"""Stage: curves and a budget to a plan, exact to the byte."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from tersor.allocators import Exact, Lagrangian, expand_groups, merge_groups
from tersor.artifact import (
    MAX_SHARD_SIZE,
    Layout,
    compute_layout,
    fixed_cost,
    header_cost,
    most_shards,
    tensor_header_cost,
)
from tersor.codecs import parse
from tersor.contracts import Allocator, Anatomy, Choice, Codec, Layer, Plan, RatePoint
from tersor.errors import Infeasible
from tersor.stages.options import Budget, Options

_log = logging.getLogger(__name__)


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


def budget_bytes(anatomy: Anatomy, budget: Budget) -> int:
    """A budget of any kind as bytes of all weight files."""
    dense = {layer.name: parse("bf16") for layer in anatomy.layers}
    layout = artifact_layout(anatomy, dense)
    data = sum(entry.nbytes for entry in layout.entries.values())
    return budget.file_bytes(anatomy, layout.total_bytes - data)


def check_feasible(anatomy: Anatomy, budget: int, candidates: Mapping[str, Mapping[str, Codec]]) -> None:
    """Raise Infeasible before any work, naming the least possible size, when even the smallest choices do not fit."""
    costs = Costs(anatomy, budget)
    least = costs.fixed + sum(
        min(costs.layer(layer, codec) for codec in candidates[layer.name].values()) for layer in anatomy.layers
    )
    if least > budget:
        raise Infeasible(
            f"A budget of {budget:,} bytes is below the least possible, {least:,} bytes, for this model and these "
            f"candidates; give --size {least} or more, or allow smaller codecs with --candidates.",
            least,
        )


def make_plan(anatomy: Anatomy, curves: Mapping[str, list[RatePoint]], budget: int, options: Options) -> Plan:
    """Least predicted loss within ``budget`` bytes of weight files."""
    costs = Costs(anatomy, budget)
    allocator: Allocator = Exact() if options.allocator == "exact" else Lagrangian()
    groups: dict[str, list[str]] = {}
    if options.share_fused:
        for layer in anatomy.layers:
            if layer.fused is not None:
                groups.setdefault(f"fused:{layer.fused}", []).append(layer.name)
    try:
        chosen = allocator.allocate(merge_groups(curves, groups), budget - costs.fixed)
    except Infeasible as error:
        least = error.smallest + costs.fixed
        raise Infeasible(
            f"A budget of {budget:,} bytes is below the least possible, {least:,} bytes; give --size {least} or more.",
            least,
        ) from error
    points = expand_groups(chosen, curves, groups)
    return plan_from_points(anatomy, points, budget)


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


def uniform_plan(anatomy: Anatomy, text: str) -> Plan:
    """Every layer in one codec: what most tools do, and what plans are compared with."""
    points = {layer.name: RatePoint(0, 0.0, text) for layer in anatomy.layers}
    plan = plan_from_points(anatomy, points, 0)
    return Plan(plan.layers, plan.file_bytes, plan.file_bytes, float("nan"), {})
