"""tersor's side of ``peers.py``: plans for given sizes, encoded and measured, and the one evaluator for all sides.

Statistics are taken once and shared by all budgets, as they would be the same for each: what follows is what
``tersor compress --size`` does with its default options (``--effort normal``) on the given calibration text.
"""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tersor import pipeline
from tersor.allocators import Exact
from tersor.anatomy import WeightLoader, analyse, open_source, skeleton
from tersor.artifact import ArtifactWriter, open_artifact
from tersor.codecs import parse
from tersor.contracts import Layer, Plan, Quality, RatePoint
from tersor.runtime.stream import BlockStream
from tersor.solvers import ErrorFeedback
from tersor.stages import curves as curve_stage
from tersor.stages import encode as encode_stage
from tersor.stages import finish
from tersor.stages.allocate import Costs, artifact_layout, make_plan, plan_from_points
from tersor.stages.context import Context
from tersor.stages.encode import encode_model
from tersor.stages.encode_layers import Coded, encode_layers
from tersor.stages.options import Budget, Options
from tersor.stages.sensitivity import measure_sensitivity
from tersor.stages.text import Texts, prepare_texts
from tersor.stages.verify import Pair, advance_states, artifact_loader, check_errors, measure_quality
from tersor.stages.work import Work

Load = Callable[[list[str]], dict[str, Tensor]]


CHUNK = 2
"""Windows that run through a block together."""


class Remembered:
    """A stream whose blocks have run already: ``states (n, T, width)`` are what they made of ``ids (n, T)``."""

    def __init__(self, stream: BlockStream, ids: Tensor, states: Tensor) -> None:
        self._stream, self._ids, self._states = stream, ids, states
        self.head, self.head_module, self.close = stream.head, stream.head_module, stream.close

    def embed(self, ids: Tensor) -> Tensor:
        """The final states of windows that were remembered. Raises ValueError for others."""
        for at in range(0, len(self._ids), CHUNK):
            if torch.equal(self._ids[at : at + CHUNK], ids):
                return self._states[at : at + CHUNK]
        raise ValueError("these windows were not run through the reference")

    @contextmanager
    def block(self, block: int) -> Iterator[None]:
        yield None

    def run(self, module: None, block: int, hidden: Tensor) -> Tensor:
        return hidden


@dataclass(frozen=True)
class Judge:
    """Quality of any weights against the reference model's, in float32, on ``ids (n, T)``."""

    context: Context
    ids: Tensor
    origin: str
    states: list[Tensor] = field(default_factory=list)

    def __call__(self, load: Load) -> Quality:
        """``load``: weights by the reference's parameter names, as :class:`BlockStream` asks for them."""
        context = self.context
        reference = self.reference()
        compressed = self._stream(load)
        try:
            return measure_quality(
                Pair(reference, compressed),
                len(context.anatomy.blocks),
                self.ids,
                chunk=CHUNK,
                workers=context.workers,
                origin=self.origin,
                progress=context.progress,
            )
        finally:
            reference.close()
            compressed.close()

    def reference(self) -> Remembered:
        """The reference model, run when it is first asked for."""
        if not self.states:
            self.states.append(self._final())
        return Remembered(self._stream(self.original), self.ids, self.states[0])

    def _stream(self, load: Load) -> BlockStream:
        return BlockStream(self.context.model, self.context.anatomy, load, dtype=torch.float32)

    def _final(self) -> Tensor:
        """The reference's hidden states ``(n, T, width)`` after its last block, the same for all that is compared."""
        stream = self._stream(self.original)
        pieces = [self.ids[at : at + CHUNK] for at in range(0, len(self.ids), CHUNK)]
        try:
            with torch.no_grad():
                states = [stream.embed(piece) for piece in pieces]
            for block in range(len(self.context.anatomy.blocks)):
                with stream.block(block) as module:
                    states = advance_states(stream, module, block, states, self.context.workers)
        finally:
            stream.close()
        return torch.cat(states)

    def original(self, names: list[str]) -> dict[str, Tensor]:
        return self.context.loader.load(names, torch.float32)

    def folder(self, path: Path, *, linears_only: bool) -> Quality:
        """Of a folder with a model's weights; ``linears_only``: what is outside the blocks is the reference's own."""
        source = open_source(path)
        model = skeleton(source)
        analyse(source, model)
        loader = WeightLoader(source, model)
        outside = {layer.parameter for layer in self.context.anatomy.layers_of(None)}

        def load(names: list[str]) -> dict[str, Tensor]:
            own = [name for name in names if linears_only and name in outside]
            found = loader.load([name for name in names if name not in own], torch.float32)
            return {**found, **self.original(own)}

        return self(load)


@dataclass(frozen=True)
class Compressor:
    """A model's statistics, from which any budget is encoded."""

    context: Context
    texts: Texts
    work: Path

    @property
    def weights(self) -> int:
        """How many weights the decoder's linear layers have."""
        return sum(layer.parameters for layer in self.context.anatomy.layers if layer.block is not None)

    def sized(self, file_bytes: int) -> Plan:
        """The plan for weight files of at most ``file_bytes``, headers and all."""
        anatomy = self.context.anatomy
        curves = curve_stage.rate_points(self.context, self._measured(), Costs(anatomy, file_bytes).layer)
        return make_plan(anatomy, curves, file_bytes, self.context.options)

    def linears(self, bits: float) -> Plan:
        """The plan for ``bits`` per weight on the decoder's linear layers, scales included; all others in bfloat16."""
        anatomy = self.context.anatomy
        inside = {layer.name for layer in anatomy.layers if layer.block is not None}
        curves = curve_stage.rate_points(
            self.context, self._measured(), lambda layer, codec: codec.bits(layer.stored_shape) // 8
        )
        chosen = Exact().allocate({name: curves[name] for name in inside}, int(bits * self.weights / 8))
        return self._fixed({**chosen, **dict.fromkeys(set(curves) - inside, RatePoint(0, 0.0, "bf16"))})

    def uniform(self, text: str) -> Plan:
        """Every linear layer of the decoder in one codec, all others in bfloat16."""
        return self._fixed(
            {
                layer.name: RatePoint(0, 0.0, "bf16" if layer.block is None else text)
                for layer in self.context.anatomy.layers
            }
        )

    def encode(self, plan: Plan, judge: Judge | None) -> dict[str, Any]:
        """Write a plan's weight files, measure them if there is a ``judge``, and throw them away."""
        context, folder = self.context, self.work / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        for left in context.work.folder.glob("encode-*"):
            left.unlink()
        codecs = {name: parse(choice.codec) for name, choice in plan.layers.items()}
        began, cpu = time.perf_counter(), _cpu_seconds()
        with ArtifactWriter(folder, artifact_layout(context.anatomy, codecs), {"benchmark": "peers"}) as writer:
            encode_model(context, codecs, writer, self.texts.calibration.ids)
            units = {layer.name: dict(writer.record(layer.name)) for layer in context.anatomy.layers}
            writer.finish()
        seconds, cpu = time.perf_counter() - began, _cpu_seconds() - cpu
        size = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
        if size != plan.file_bytes:
            raise ValueError(f"the weight files have {size} bytes, and the plan said {plan.file_bytes}")
        stored = sum(
            codecs[layer.name].bits(layer.stored_shape) for layer in context.anatomy.layers if layer.block is not None
        )
        row = {
            "file_bytes": size,
            "bits_per_weight": stored / self.weights,
            "seconds": seconds,
            "cpu_seconds": cpu,
            "predicted": plan.predicted,
            "largest_relative_error": max(unit["relative_error"] for unit in units.values()),
        }
        if judge is not None:
            row["quality"] = self._quality(folder, plan, judge, units)
        shutil.rmtree(folder)
        return row

    def _quality(self, folder: Path, plan: Plan, judge: Judge, units: dict[str, Any]) -> dict[str, Any]:
        """Open what was written, check every layer against what encoding recorded, and compare with the reference."""
        context = self.context
        codecs = {name: parse(choice.codec) for name, choice in plan.layers.items()}
        finish.write_folder(context, folder, plan, codecs, units, self.texts)
        artifact = open_artifact(folder)
        check_errors(context, artifact)
        return asdict(judge(artifact_loader(artifact, context.anatomy, torch.float32, context.workers)))

    def _measured(self) -> dict[str, Any]:
        return curve_stage.load_records(self.context)

    def _fixed(self, points: dict[str, RatePoint]) -> Plan:
        plan = plan_from_points(self.context.anatomy, points, 0)
        return replace(plan, budget=plan.file_bytes)


def prepare(
    model: Path, text: Path, work: Path, *, sequences: int, length: int, workers: int, **more: Any
) -> Compressor:
    """Sensitivities and rate–distortion curves on the calibration text, kept in ``work``: taken once.

    ``more``: other options, where they are not the defaults.
    """
    options = Options(
        Budget("bpw", 4.0),
        text=str(text),
        eval_text=str(text),
        sequences=sequences,
        length=length,
        workers=workers,
        **more,
    )
    context = replace(pipeline.light_context(model, options, progress=_say), work=Work(work / "run"))
    context.work.begin({"model": context.source.fingerprint(), "options": options.identity()})
    texts = prepare_texts(context.source, options, cache=work, workers=workers, progress=context.progress)
    measure_sensitivity(context, texts.calibration.ids)
    curve_stage.measure_curves(context, texts.calibration.ids)
    return Compressor(context, texts, work)


def feedback_speed(compressor: Compressor, bits: int, group: int, *, refit: bool) -> dict[str, Any]:
    """Time of error feedback on plain integers for all linear layers, each block's statistics included.

    That is what GPTQModel's time covers too: passes through the blocks with Gram matrices, solving, and packing. Tokens
    count alike, as they do there. ``refit``: finish with least squares for the scales, as tersor does and GPTQModel
    does not. ``solving_seconds``: from Gram matrices to packed codes, which are written meanwhile.
    """
    options = replace(compressor.context.options, solver="feedback", sensitivity="flat")
    context = replace(compressor.context, options=options)
    solving = 0.0

    def counted(*given: Any) -> Iterator[tuple[Layer, Coded]]:
        nonlocal solving
        began = time.perf_counter()
        yield from encode_layers(*given)
        solving += time.perf_counter() - began

    with (
        patch.object(encode_stage, "encode_layers", counted),
        patch.object(Context, "solver", lambda _: ErrorFeedback(refit=refit)),
    ):
        row = replace(compressor, context=context).encode(compressor.uniform(f"int{bits}:g{group}"), None)
    times = {"seconds": row["seconds"], "cpu_seconds": row["cpu_seconds"], "solving_seconds": solving}
    return {"bits": bits, "group": group, **times}


def _say(stage: str, done: int, total: int) -> None:
    if done == total or done % 10 == 0:
        print(f"    {stage} {done}/{total}", flush=True)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
