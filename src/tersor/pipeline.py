"""The main job, in order: source → anatomy → text → sensitivity → curves → plan → encode → verify → report → artifact.

The only place that knows the order. Each stage is a function of :mod:`tersor.stages` that keeps what it finished, so a
killed run repeats none of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from tersor.anatomy import Source, WeightLoader, analyse, cache_folder, mark_writers, open_source, skeleton
from tersor.artifact import (
    STATE_FOLDER,
    ArtifactWriter,
    Manifest,
    partial_path,
    plan_to_json,
    publish,
)
from tersor.codecs import parse
from tersor.codecs.dense import Dense
from tersor.contracts import Anatomy, Codec, Plan, Quality
from tersor.errors import BadInput, CannotResume, Infeasible, NotFinite, TersorError, VerificationFailed
from tersor.stages import curves as curve_stage
from tersor.stages import finish
from tersor.stages import report as report_stage
from tersor.stages.allocate import (
    Costs,
    artifact_layout,
    budget_bytes,
    check_feasible,
    dense_layout,
    make_plan,
    sized_plan,
)
from tersor.stages.candidates import candidate_notes, layer_candidates
from tersor.stages.context import Context, Progress, silent
from tersor.stages.encode import encode_model
from tersor.stages.estimate import Estimate, check_disk, choose_workers, chunk_sequences, disk_bytes, estimate
from tersor.stages.evaluate import is_artifact
from tersor.stages.fast import fast_curves
from tersor.stages.options import Budget, Options, share_note
from tersor.stages.sensitivity import measure_sensitivity
from tersor.stages.text import Texts, prepare_texts
from tersor.stages.weights import check_finite
from tersor.stages.work import Work
from tersor.version import __version__


@dataclass(frozen=True)
class Planned:
    """What ``tersor plan`` shows."""

    plan: Plan
    anatomy: Anatomy
    estimate: Estimate
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A finished artifact, and what was measured of it. ``peak_memory``: resident bytes above the baseline."""

    folder: Path
    plan: Plan
    quality: Quality
    seconds: float
    peak_memory: int
    bits_per_weight: float
    sample: tuple[str, str] | None
    notes: tuple[str, ...]
    stages: Mapping[str, float]
    resumed: bool = False


@dataclass
class Clock:
    """Wall time by stage, and the resident memory the run began with."""

    began: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    baseline: int = field(default_factory=finish.resident_bytes)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch with one thread per operation: parallelism comes from workers on pieces of fixed size.

    An operation's result can depend on how many threads share it; a piece's result cannot depend on who computes it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def examine(
    model: str | Path | nn.Module, options: Options, *, cache_dir: Path | None = None
) -> tuple[Source, nn.Module, Anatomy]:
    """A model's source, its skeleton on the meta device, and its anatomy. Loads no weights."""
    source = open_source(
        model, cache_dir=cache_dir, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    body = skeleton(source)
    anatomy = analyse(source, body)
    if options.tensor_parallel > 1:
        anatomy = mark_writers(body, anatomy)
    note = share_note(options.budget, anatomy, source.lossy_note)
    return source, body, anatomy if note is None else replace(anatomy, notes=(*anatomy.notes, note))


def light_context(
    model: str | Path | nn.Module, options: Options, *, progress: Progress = silent, cache_dir: Path | None = None
) -> Context:
    """A context for looking at weights only; its work folder is never written."""
    source, body, anatomy = examine(model, options, cache_dir=cache_dir)
    workers = options.workers or available_workers()
    return _context(source, body, anatomy, options, Work(cache_folder(cache_dir) / "none"), workers, progress)


def available_workers() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plan(
    model: str | Path | nn.Module,
    options: Options,
    *,
    fast: bool = False,
    work_folder: Path | None = None,
    progress: Progress = silent,
    cache_dir: Path | None = None,
) -> Planned:
    """Choose codecs within the budget and say what the run will cost, without encoding anything.

    ``fast``: from the weights alone, in seconds: no text, no statistics, every layer's relative error counted alike.
    ``work_folder``: where to keep finished work if it is killed (default: in the cache, by model and options).
    """
    budget = _needs_budget(options)
    source, body, anatomy = examine(model, options, cache_dir=cache_dir)
    workers = choose_workers(anatomy, options, available_workers())
    cache = cache_folder(cache_dir)
    identity = finish.identity(source, options, None)
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    work = Work(work_folder or cache / "plans" / key)
    context = _context(source, body, anatomy, options, work, workers, progress)
    target = _target(context)
    notes = anatomy.notes + candidate_notes(context)
    with one_thread_each():
        if fast:
            records = fast_curves(context)
        else:
            context.check_streamed()
            work.begin(identity)
            try:
                check_finite(context)
                texts = prepare_texts(source, options, cache=cache, workers=workers, progress=progress)
                notes += texts.calibration.notes + _measure(context, texts, None)
            except TersorError as error:
                if _hopeless(error):
                    shutil.rmtree(work.folder.parent.parent, ignore_errors=True)
                raise
            records = curve_stage.load_records(context)
    costs = Costs(anatomy, target)
    made = make_plan(anatomy, curve_stage.rate_points(context, records, costs.layer), target, options)
    if not fast:
        shutil.rmtree(work.folder.parent.parent, ignore_errors=True)
    made = replace(made, options={"measured": not fast, "budget": str(budget)})
    return Planned(made, anatomy, estimate(anatomy, options, workers, made.file_bytes), notes)


def compress(
    model: str | Path | nn.Module,
    output: str | Path,
    options: Options,
    *,
    given: Plan | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = silent,
    cache_dir: Path | None = None,
    command: str = "",
) -> Result:
    """Compress a model into the artifact folder ``output``, within the budget, and prove it.

    ``given``: a plan to follow instead of making one. ``overwrite``: replace an existing output. ``restart``: throw an
    interrupted run's work away. Runs again after a crash, the same call continues where it stopped and ends with the
    same bytes. Raises a :class:`~tersor.errors.TersorError` with one clear sentence for anything that cannot be done.
    """
    clock = Clock()
    output = Path(output)
    partial = _claim(output, overwrite=overwrite, restart=restart)
    fresh = not partial.exists()
    try:
        with clock.stage("open"):
            source, body, anatomy = examine(model, options, cache_dir=cache_dir)
        check_not_source(output, source)
        workers = choose_workers(anatomy, options, available_workers())
        context = _context(source, body, anatomy, options, Work(partial), workers, progress)
        given = None if given is None else sized_plan(anatomy, given, options.budget)
        target = _target(context) if given is None else given.budget
        if fresh and (output / STATE_FOLDER).exists():
            finished = _published(context, output, given, clock, overwrite=overwrite)
            if finished is not None:
                return finished
        context.check_streamed()
        check_disk(partial, disk_bytes(anatomy, options, min(target, dense_layout(anatomy).total_bytes)))
        context.work.begin(finish.identity(source, options, given))
        with one_thread_each():
            result = _run(context, target, given, clock, cache_folder(cache_dir), output, command)
    except BaseException as error:
        # A run that failed before it did any work, or that would fail again, leaves nothing behind.
        if fresh and (_hopeless(error) or not (partial / STATE_FOLDER / "work" / "texts.json").exists()):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    publish(partial, output, replace=overwrite)
    return result


def _run(
    context: Context, target: int, given: Plan | None, clock: Clock, cache: Path, output: Path, command: str
) -> Result:
    """All stages after the source is open, up to an artifact that is complete but not yet in its place."""
    work, anatomy, options = context.work, context.anatomy, context.options
    resumed = work.has("texts.json")
    with clock.stage("open"):
        notes = candidate_notes(context) if given is None else ()
        check_finite(context)
    with clock.stage("text"):
        texts = prepare_texts(context.source, options, cache=cache, workers=context.workers, progress=context.progress)
        _keep_digests(work, texts)
    with clock.stage("statistics"):
        notes += texts.calibration.notes
        notes += _measure(context, texts, given)
    with clock.stage("plan"):
        made, codecs = _plan(context, target, given)
        (work.folder.parent.parent / "plan.json").write_text(plan_to_json(made))
    with clock.stage("encode"):
        fingerprint = {
            "model": context.source.fingerprint(),
            "plan": hashlib.sha256(plan_to_json(made).encode()).hexdigest(),
            "text": texts.calibration.digest(),
            "version": __version__,
        }
        folder = work.folder.parent.parent
        with ArtifactWriter(folder, artifact_layout(anatomy, codecs), fingerprint) as writer:
            encode_model(context, codecs, writer, texts.calibration.ids)
            units = {layer.name: dict(writer.record(layer.name)) for layer in anatomy.layers}
            writer.finish()
    with clock.stage("verify"):
        finish.write_folder(context, folder, made, codecs, units, texts)
        quality = finish.verify(context, folder, made, texts)
    with clock.stage("samples"):
        samples = finish.samples(context, folder)
    notes += tuple(note for unit in units.values() for note in unit["notes"])
    peak = max(finish.peak_resident_bytes() - clock.baseline, 0)
    report_stage.write(
        context,
        report_stage.Findings(made, units, texts, quality, samples, notes, clock.stages, peak, command),
    )
    return Result(
        folder=output,
        plan=made,
        quality=quality,
        seconds=time.perf_counter() - clock.began,
        peak_memory=peak,
        bits_per_weight=8 * made.file_bytes / anatomy.parameters,
        sample=(samples[0][0], samples[0][2]) if samples else None,
        notes=anatomy.notes + notes,
        stages=clock.stages,
        resumed=resumed,
    )


def _published(context: Context, output: Path, given: Plan | None, clock: Clock, *, overwrite: bool) -> Result | None:
    """The result of a run that was killed while its finished folder was put in place; clears what was left to clear.

    None when the folder is another run's and may be replaced. Raises BadInput when it may not.
    """
    manifest = finish.finished(context.source, context.options, output, given)
    if manifest is None or manifest.quality is None:
        if overwrite:
            return None
        raise _exists(output)
    publish(partial_path(output), output, replace=overwrite)
    return result_of(manifest, context.anatomy, output, clock)


def result_of(manifest: Manifest, anatomy: Anatomy, folder: Path, clock: Clock) -> Result:
    """The result of a run that ended before, as far as its artifact says."""
    assert manifest.quality is not None
    return Result(
        folder=folder,
        plan=manifest.plan,
        quality=manifest.quality,
        seconds=time.perf_counter() - clock.began,
        peak_memory=max(finish.peak_resident_bytes() - clock.baseline, 0),
        bits_per_weight=8 * manifest.plan.file_bytes / anatomy.parameters,
        sample=None,
        notes=manifest.notes,
        stages=clock.stages,
        resumed=True,
    )


def _keep_digests(work: Work, texts: Texts) -> None:
    """Note which tokens this run measures with. Raises CannotResume when an interrupted run began with others."""
    digests = {"calibration": texts.calibration.digest(), "evaluation": texts.evaluation.digest()}
    if work.has("texts.json") and work.load("texts.json") != digests:
        raise CannotResume(
            f"The text in {texts.calibration.origin} has changed since the interrupted run began: put it back to "
            f"continue that run, or add --restart to throw it away."
        )
    work.save("texts.json", digests)


def _measure(context: Context, texts: Texts, given: Plan | None) -> tuple[str, ...]:
    """Sensitivities, Gram matrices and, where no plan is ``given``, rate–distortion points; gives notes to show."""
    ids = texts.calibration.ids
    curves = given is None or not _kept_outside(context.anatomy, given)
    if context.options.guided or (curves and context.options.sensitivity == "fisher"):
        measure_sensitivity(context, ids)
    if curves:
        curve_stage.measure_curves(context, ids, points=given is None)
    if given is not None:
        return ()
    return curve_stage.calibration_notes(curve_stage.load_records(context), held_out=context.held_out(len(ids)) > 0)


def _kept_outside(anatomy: Anatomy, given: Plan) -> bool:
    """Whether a plan keeps embedding and head as floats; blocks are encoded with what is collected on the way to them.

    Nothing else of curves is needed to follow a plan, and they take as long as encoding by error feedback.
    """
    return all(isinstance(parse(given.layers[layer.name].codec), Dense) for layer in anatomy.layers_of(None))


def _plan(context: Context, target: int, given: Plan | None) -> tuple[Plan, Mapping[str, Codec]]:
    """The plan to follow, exact sizes included, and its codecs. Raises when a given plan does not fit its budget."""
    anatomy = context.anatomy
    if given is None:
        costs = Costs(anatomy, target)
        records = curve_stage.load_records(context)
        curves = curve_stage.rate_points(context, records, costs.layer)
        made = make_plan(anatomy, curves, target, context.options)
        if made.file_bytes > target:
            raise VerificationFailed(
                f"The plan takes {made.file_bytes:,} bytes, more than the budget of {target:,}: a size was "
                f"mispredicted; please report this."
            )
        given = made
    return given, {name: parse(choice.codec) for name, choice in given.layers.items()}


def _target(context: Context) -> int:
    """The budget in bytes, checked to be reachable before any work."""
    budget = _needs_budget(context.options)
    candidates = {layer.name: layer_candidates(context, layer) for layer in context.anatomy.layers}
    check_feasible(context.anatomy, budget, candidates)
    return budget_bytes(context.anatomy, budget)


def _needs_budget(options: Options) -> Budget:
    if options.budget is None:
        raise BadInput("Give a budget: --size, --memory or --bpw (or a --plan that has one).")
    return options.budget


def _claim(output: Path, *, overwrite: bool, restart: bool) -> Path:
    """The partial folder for an output, after checking that it may be written."""
    # With its state still there it was killed while being put in place: who asks decides what that is.
    if output.exists() and not overwrite and not (output / STATE_FOLDER).exists():
        raise _exists(output)
    if not output.absolute().parent.is_dir():
        raise BadInput(f"The folder {output.absolute().parent} does not exist; make it, or choose another --output.")
    check_replaceable(output, lambda folder: is_artifact(folder) or (folder / STATE_FOLDER).exists())
    partial = partial_path(output)
    if restart:
        shutil.rmtree(partial, ignore_errors=True)
    return partial


def check_replaceable(output: Path, ours: Callable[[Path], bool]) -> None:
    """Raise BadInput for a folder ``output`` with anything in it unless ``ours(output)``: it would be removed whole."""
    if output.is_dir() and any(output.iterdir()) and not ours(output):
        raise BadInput(f"{output} is a folder of other things, which would be lost; choose another --output.")


def check_not_source(output: Path, source: Source) -> None:
    """Raise BadInput where ``output`` is the model's own folder, or one that it lies in."""
    path = source.path.resolve()
    if output.resolve() in (path, *path.parents):
        raise BadInput(f"{output} holds the model itself, which would be lost; choose another --output.")


def _exists(output: Path) -> BadInput:
    return BadInput(f"{output} exists already; choose another --output, or add --overwrite to replace it.")


def _context(
    source: Source, body: nn.Module, anatomy: Anatomy, options: Options, work: Work, workers: int, progress: Progress
) -> Context:
    return Context(
        source,
        body,
        anatomy,
        WeightLoader(source, body),
        options,
        work,
        workers,
        chunk_sequences(options.length),
        progress,
    )


def _hopeless(error: BaseException) -> bool:
    """Whether the same run would fail in the same way again, so that its work is worth nothing."""
    return isinstance(error, (NotFinite, Infeasible))
