"""Files for other engines: planned to the byte of the engine's own file, written, read back, and run by the engine."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from tersor import pipeline
from tersor.anatomy import Source, cache_folder
from tersor.artifact import STATE_FOLDER, Artifact, atomic_write
from tersor.contracts import Anatomy, Codec, Plan
from tersor.engines.contract import Engine, Stored, Target, check_codecs, token_time, warnings
from tersor.engines.table import ENGINES, engine_of, find_engine
from tersor.errors import BadInput, CorruptArtifact, EngineFailed, Infeasible, VerificationFailed
from tersor.pipeline import Planned, Result
from tersor.stages import finish
from tersor.stages.allocate import dense_layout, sized_plan
from tersor.stages.context import Progress, parsed
from tersor.stages.estimate import chunk_sequences
from tersor.stages.evaluate import is_artifact
from tersor.stages.opened import open_whole
from tersor.stages.options import Budget, Options
from tersor.stages.prove import Proof, prove_file
from tersor.stages.rules import rule_notes
from tersor.stages.text import prepare_texts

_FINISHED = ".artifact.finished"
"""What the work of a run that has ended is called until it is removed."""

__all__ = ["ENGINES", "Delivered", "compress_for", "engine_for", "export_to", "plan_for", "prove", "write_file"]


@dataclass(frozen=True)
class Delivered:
    """A file for an engine. ``result``: of the run that made it, sizes as in the file. ``proof``: None where the engine
    is not installed, which ``note`` says then."""

    path: Path
    engine: str
    result: Result
    proof: Proof | None
    note: str


@dataclass(frozen=True)
class _Job:
    """A model that is to become a file of an engine. ``larger``: than an artifact, by how many bytes at most."""

    engine: Engine
    source: Source
    body: nn.Module
    target: Target
    larger: int


def engine_for(options: Options) -> Engine | None:
    """The engine that is asked for; None for transformers. Raises BadInput where it cannot do what is asked of it."""
    engine = find_engine(options.engine)
    if options.like is not None and (engine is None or engine.pace is None):
        able = " or ".join(name for name, one in ENGINES.items() if one.pace is not None)
        raise BadInput(f"How fast {options.engine} runs a file is not known here; give --like with --for {able}.")
    if options.tensor_parallel > 1 and (engine is None or not engine.splits):
        able = " or ".join(name for name, one in ENGINES.items() if one.splits) or "another engine"
        raise BadInput(
            f"{options.engine} does not split layers over processors; give --tensor-parallel for {able} only."
        )
    if options.onnx_accuracy_level is None:
        return engine
    if engine is None or engine.at_level is None:
        able = " or ".join(name for name, one in ENGINES.items() if one.at_level is not None) or "another engine"
        raise BadInput(f"Files for {options.engine} say nothing of it; give --onnx-accuracy-level for {able} only.")
    return engine.at_level(options.onnx_accuracy_level)


def _job(engine: Engine, model: str | Path | nn.Module, options: Options, cache_dir: Path | None) -> _Job:
    source, body, anatomy = pipeline.examine(model, options, cache_dir=cache_dir)
    target = engine.open(source, anatomy, cache_dir)
    return _Job(engine, source, body, target, target.overhead(dense_layout(anatomy).total_bytes))


def _inner(job: _Job, options: Options) -> tuple[Options, int]:
    """The options of the run that makes the tensors, and the file's budget in bytes."""
    name, anatomy = job.engine.name, job.target.anatomy
    if options.like is not None:
        options = _as(job, options, Path(options.like))
    if options.budget is None:
        raise BadInput("Give a budget: --size or --bpw.")
    if options.budget.kind == "memory":
        raise BadInput(f"{name} decides itself what it holds in memory: give --size instead of --memory.")
    wanted = options.budget.file_bytes(anatomy, 0)
    texts = tuple(options.candidates or job.engine.candidates(options.effort))
    job.engine.check(texts)
    rule_notes(options, anatomy, parsed(texts))  # refuses, before any work, what leaves no layer a codec
    return replace(options, budget=Budget("size", wanted - job.larger), candidates=texts), wanted


def _as(job: _Job, options: Options, path: Path) -> Options:
    """Options with the size, unless there is a budget, and the speed of a file of the engine's."""
    if not job.engine.recognises(path):
        raise BadInput(f"--like {path} is no file for {job.engine.name}; give one of this very model.")
    stored = job.target.stored(path)
    time = token_time(job.engine, job.target.anatomy, stored.texts)
    budget = options.budget or Budget("size", stored.nbytes)
    return replace(options, like=None, token_time=time, budget=budget)


def _infeasible(error: Infeasible, job: _Job, wanted: int) -> Infeasible:
    least = error.smallest + job.larger
    return Infeasible(
        f"A file of {wanted:,} bytes is below the least possible for this model in {job.engine.name}, {least:,} bytes; "
        f"give --size {least} or more, or allow smaller codecs with --candidates.",
        least,
    )


def plan_for(
    engine: Engine,
    model: str | Path | nn.Module,
    options: Options,
    *,
    fast: bool,
    progress: Progress,
    cache_dir: Path | None,
) -> Planned:
    """What ``tersor plan --for ENGINE`` shows: as for an artifact, with the exact bytes of the engine's file."""
    job = _job(engine, model, options, cache_dir)
    inner, wanted = _inner(job, options)
    try:
        planned = pipeline.plan(model, inner, fast=fast, progress=progress, cache_dir=cache_dir)
    except Infeasible as error:
        raise _infeasible(error, job, wanted) from error
    size = job.target.file_bytes(_texts(planned.plan))
    plan = replace(planned.plan, file_bytes=size, budget=wanted)
    return replace(planned, plan=plan, notes=_all_notes(job, planned.notes, plan))


def _all_notes(job: _Job, notes: tuple[str, ...], plan: Plan) -> tuple[str, ...]:
    """Notes of a run, and those on the budget and on the engine that it did not know of."""
    more = (*job.target.anatomy.notes, *warnings(job.engine, job.target.anatomy, _parsed(_texts(plan))))
    return (*notes, *(note for note in more if note not in notes))


def _texts(plan: Plan) -> dict[str, str]:
    return {name: choice.codec for name, choice in plan.layers.items()}


def _followed(job: _Job, options: Options, given: Plan) -> tuple[Options, int]:
    """Options and budget of a run that follows a plan. Raises BadInput for one that the engine cannot run, or that is
    over its budget."""
    if options.budget is not None or options.like is not None:
        raise BadInput("Give --plan or a budget; a plan for an engine brings its own budget.")
    texts = _texts(given)
    strangers = set(texts) ^ {layer.name for layer in job.target.anatomy.layers}
    if strangers:
        raise BadInput(f"The plan does not belong to this model: {min(strangers)!r} is in only one of them.")
    check_codecs(job.engine, job.target.anatomy, _parsed(texts), options.tensor_parallel)
    size = job.target.file_bytes(texts)
    if size > given.budget:
        raise BadInput(
            f"The plan takes {size:,} bytes in {job.engine.name}, more than its budget of {given.budget:,}: choose "
            f"smaller codecs in it, or raise its budget."
        )
    return options, given.budget


def _parsed(texts: Mapping[str, str]) -> dict[str, Codec]:
    codecs = parsed(tuple(sorted(set(texts.values()))))
    return {name: codecs[text] for name, text in texts.items()}


def compress_for(
    engine: Engine,
    model: str | Path | nn.Module,
    output: Path,
    options: Options,
    *,
    given: Plan | None,
    overwrite: bool,
    restart: bool,
    progress: Progress,
    cache_dir: Path | None,
    command: str,
) -> Delivered:
    """Compress ``model`` into the engine's file ``output``, at most as large as the budget, and let the engine run it.

    ``given``: a plan to follow instead of making one. While it runs, the work lies beside ``output``; the same call
    after a crash continues, also where only proof and clean-up are left. The report is kept as
    ``<output>.report.html``, plan and proof as ``<output>.json``.
    """
    folder = _beside(output, ".artifact")
    shutil.rmtree(_beside(output, _FINISHED), ignore_errors=True)
    _check_output(engine, output, overwrite or is_artifact(folder))
    job = _job(engine, model, options, cache_dir)
    pipeline.check_not_source(output, job.source)
    inner, wanted = _inner(job, options) if given is None else _followed(job, options, given)
    result = None if restart else _finished(job, folder, inner, given)
    held = output.exists() and result is not None and _holds(folder, output, job.target)
    if output.exists() and not overwrite and not held:
        raise _exists(output)
    try:
        result = result or pipeline.compress(
            model,
            folder,
            inner,
            given=given,
            overwrite=folder.exists(),
            restart=restart,
            progress=progress,
            cache_dir=cache_dir,
            command=command,
        )
    except Infeasible as error:
        raise _infeasible(error, job, wanted) from error
    size = job.target.stored(output).nbytes if held else write_file(folder, output, job.target, most=wanted)
    shutil.copyfile(folder / "report.html", _beside(output, ".report.html"))
    result = replace(
        result,
        folder=output,
        plan=replace(result.plan, file_bytes=size, budget=wanted),
        bits_per_weight=8 * size / job.target.anatomy.parameters,
        notes=_all_notes(job, result.notes, result.plan),
    )
    proof, note = _proof(job, output, options, progress, cache_dir)
    _conclude(folder, Delivered(output, engine.name, result, proof, note), options)
    return Delivered(output, engine.name, result, proof, note)


def _conclude(folder: Path, done: Delivered, options: Options) -> None:
    """Write down what was delivered, and remove the work; a kill in between leaves nothing that looks like a run."""
    data = {
        "engine": done.engine,
        "tensor_parallel": options.tensor_parallel,
        "plan": _texts(done.result.plan),
        "file_bytes": done.result.plan.file_bytes,
        "proof": None if done.proof is None else {**asdict(done.proof), "path": str(done.path)},
        "note": done.note,
    }
    atomic_write(_beside(done.path, ".json"), (json.dumps(data, indent=1) + "\n").encode())
    finished = _beside(done.path, _FINISHED)
    os.replace(folder, finished)
    shutil.rmtree(finished)


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


def _exists(output: Path) -> BadInput:
    return BadInput(f"{output} exists already; choose another --output, or add --overwrite to replace it.")


def _check_output(engine: Engine, output: Path, overwrite: bool) -> None:
    if output.suffix != engine.suffix and engine.suffix:
        raise BadInput(f"{engine.name} reads {engine.suffix} files; {output} does not end so.")
    if output.exists() and not overwrite:
        raise _exists(output)
    if not output.absolute().parent.is_dir():
        raise BadInput(f"The folder {output.absolute().parent} does not exist; make it, or choose another --output.")
    pipeline.check_replaceable(output, engine.recognises)


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def write_file(folder: Path, output: Path, target: Target, *, most: int | None = None) -> int:
    """Write an artifact's tensors as the engine's file, and read it back. Returns the bytes that a budget counts.

    ``most``: that they may be. Raises BadInput for an artifact with codecs that the engine cannot run,
    VerificationFailed when the file is larger, or reads otherwise than it was written. What ``output`` was before is
    replaced only when all is well.
    """
    artifact = open_whole(folder)
    layers = {layer.name: layer for layer in target.anatomy.layers}

    def read(name: str) -> Tensor | Mapping[str, Tensor]:
        return artifact.tensors(name) if name in layers else artifact.kept(name)

    # Names that end otherwise would not do: engines choose by them.
    partial = output.with_name(f"partial.{output.name}")
    _remove(partial)
    try:
        target.write(artifact.layers, partial, read)
        stored = target.stored(partial)
        wrong = _difference(artifact, target.anatomy, stored)
        if wrong is not None:
            raise VerificationFailed(f"{output} does not hold {wrong} as it was written; check the disk and run again.")
        if most is not None and stored.nbytes > most:
            raise VerificationFailed(
                f"{output} would have {stored.nbytes:,} bytes, over the {most:,} asked for; please report this."
            )
        _forget(output)
        _remove(output)
        os.replace(partial, output)
    finally:
        _remove(partial)
    return stored.nbytes


def _difference(artifact: Artifact, anatomy: Anatomy, stored: Stored) -> str | None:
    """The first layer or kept tensor that an engine's file has otherwise than the artifact; None where none is."""
    for layer in anatomy.layers:
        codec = artifact.layers[layer.name]
        same = stored.texts[layer.name] == str(codec)
        written = stored.tensors(layer, codec) if same else {}
        if not same or any(not written[part].equal(one) for part, one in artifact.tensors(layer.name).items()):
            return layer.name
    return next((name for name in anatomy.kept if not stored.holds(name, artifact.kept(name))), None)


def _holds(folder: Path, output: Path, target: Target) -> bool:
    """Whether ``output`` is the artifact ``folder`` as the engine's file, whoever wrote it."""
    try:
        return _difference(open_whole(folder), target.anatomy, target.stored(output)) is None
    except (BadInput, CorruptArtifact):
        return False


def _finished(job: _Job, folder: Path, inner: Options, given: Plan | None) -> Result | None:
    """What an earlier call came to that ended with the artifact ``folder``, if this one would make the same again."""
    if not is_artifact(folder) or (folder / STATE_FOLDER).exists():
        return None
    anatomy = job.target.anatomy
    plan = None if given is None else sized_plan(anatomy, given, inner.budget)
    try:
        manifest = finish.finished(job.source, inner, folder, plan)
    except CorruptArtifact:
        return None
    if manifest is None or manifest.quality is None:
        return None
    return pipeline.result_of(manifest, anatomy, folder, pipeline.Clock())


def _forget(output: Path) -> None:
    """Remove the record of the file that was there before: of another one it would be false."""
    record = _beside(output, ".json")
    try:
        said = json.loads(record.read_text("utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(said, dict) and {"engine", "proof"} <= said.keys():
        record.unlink()


def export_to(
    engine: Engine, folder: Path, output: Path, options: Options, *, overwrite: bool, cache_dir: Path | None
) -> int:
    """An artifact whose codecs the engine can run as its file; its bytes. The model it was made from must be there."""
    _check_output(engine, output, overwrite)
    artifact = open_whole(folder)
    engine.check(sorted({str(codec) for codec in artifact.layers.values()}))
    origin = artifact.manifest.source.origin
    job = _job(engine, origin, options, cache_dir)
    if dict(artifact.manifest.shapes) != {layer.name: layer.stored_shape for layer in job.target.anatomy.layers}:
        raise BadInput(
            f"{folder} was made from {origin}, which has other layers by now; put the same model there again."
        )
    pipeline.check_not_source(output, job.source)
    check_codecs(engine, job.target.anatomy, artifact.layers, options.tensor_parallel)
    return write_file(folder, output, job.target)


def prove(
    path: Path, against: str | Path | nn.Module, options: Options, *, progress: Progress, cache_dir: Path | None
) -> Proof:
    """Run a file by the engine that it is for, and compare it with its source, and with what our decoding predicts.

    Raises EngineFailed where the engine is not installed or refuses the file.
    """
    engine = engine_of(path)
    proof, note = _proof(_job(engine, against, options, cache_dir), path, options, progress, cache_dir)
    if proof is None:
        raise EngineFailed(f"{path} is {note}.")
    return proof


def _proof(
    job: _Job, path: Path, options: Options, progress: Progress, cache_dir: Path | None
) -> tuple[Proof | None, str]:
    if not job.engine.installed():
        return None, job.engine.unproven
    codecs = _parsed(job.target.stored(path).texts)
    if any(job.engine.shuns(layer, codecs[layer.name]) for layer in job.target.anatomy.layers):
        return None, f"not proven here: {' '.join(warnings(job.engine, job.target.anatomy, codecs))}"
    workers = options.workers or pipeline.available_workers()
    with pipeline.one_thread_each():
        texts = prepare_texts(job.source, options, cache=cache_folder(cache_dir), workers=workers, progress=progress)
        proof = prove_file(
            path,
            job.engine,
            job.source,
            job.body,
            job.target,
            texts.evaluation.ids,
            chunk=chunk_sequences(options.length),
            workers=workers,
            origin=texts.evaluation.origin,
            progress=progress,
        )
    return proof, ""
