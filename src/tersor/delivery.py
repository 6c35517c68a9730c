"""Files for other engines: planned to the byte of the engine's own file, written, read back, and run by the engine."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from tersor import pipeline
from tersor.anatomy import Source, cache_folder
from tersor.engines.llama_cpp import engine as llama_cpp
from tersor.engines.llama_cpp.library import LlamaCpp, find_library
from tersor.engines.llama_cpp.write import Recipe
from tersor.errors import BadInput, EngineFailed, Infeasible, VerificationFailed
from tersor.pipeline import Planned, Result
from tersor.stages.allocate import dense_layout
from tersor.stages.context import Progress
from tersor.stages.estimate import chunk_sequences
from tersor.stages.evaluate import open_whole
from tersor.stages.options import Budget, Options
from tersor.stages.prove import Proof, prove_gguf
from tersor.stages.text import prepare_texts

ENGINES = ("transformers", llama_cpp.NAME)
UNPROVEN = "not proven here: llama.cpp is not installed (pip install xllamacpp)"


@dataclass(frozen=True)
class Delivered:
    """A file for an engine. ``result``: of the run that made it, sizes as in the file. ``proof``: None where the engine
    is not installed, which ``note`` says then."""

    path: Path
    result: Result
    proof: Proof | None
    note: str


@dataclass(frozen=True)
class _Target:
    """A model as a GGUF: its recipe, and by how much the file is larger than an artifact, at most."""

    source: Source
    body: nn.Module
    recipe: Recipe
    larger: int


def check_engine(name: str) -> None:
    """Raise BadInput for an engine that is not known."""
    if name not in ENGINES:
        raise BadInput(f"The engine {name!r} is unknown; use {' or '.join(ENGINES)}.")


def _target(model: str | Path | nn.Module, options: Options, cache_dir: Path | None) -> _Target:
    source, body, anatomy = pipeline.examine(model, options, cache_dir=cache_dir)
    name = Path(source.origin).stem or anatomy.model_type
    recipe = llama_cpp.open_recipe(anatomy, source.config, source.path, name)
    return _Target(source, body, recipe, llama_cpp.overhead(recipe, dense_layout(anatomy).total_bytes))


def _inner(target: _Target, options: Options) -> tuple[Options, int]:
    """The options of the run that makes the tensors, and the file's budget in bytes."""
    if options.budget is None:
        raise BadInput("Give a budget: --size or --bpw.")
    if options.budget.kind == "memory":
        raise BadInput("llama.cpp maps the file into memory as it is: give --size instead of --memory.")
    wanted = options.budget.file_bytes(target.recipe.anatomy, 0)
    texts = options.candidates or llama_cpp.candidates(options.effort)
    llama_cpp.check_candidates(texts)
    return replace(options, budget=Budget("size", wanted - target.larger), candidates=tuple(texts)), wanted


def _infeasible(error: Infeasible, target: _Target, wanted: int) -> Infeasible:
    least = error.smallest + target.larger
    return Infeasible(
        f"A file of {wanted:,} bytes is below the least possible for this model in llama.cpp, {least:,} bytes; give "
        f"--size {least} or more, or allow smaller types with --candidates.",
        least,
    )


def plan_gguf(
    model: str | Path | nn.Module, options: Options, *, fast: bool, progress: Progress, cache_dir: Path | None
) -> Planned:
    """What ``tersor plan --for llama.cpp`` shows: as for an artifact, with the exact bytes of the GGUF."""
    target = _target(model, options, cache_dir)
    inner, wanted = _inner(target, options)
    try:
        planned = pipeline.plan(model, inner, fast=fast, progress=progress, cache_dir=cache_dir)
    except Infeasible as error:
        raise _infeasible(error, target, wanted) from error
    size = llama_cpp.size_with(target.recipe, {name: one.codec for name, one in planned.plan.layers.items()})
    return replace(planned, plan=replace(planned.plan, file_bytes=size, budget=wanted))


def compress_gguf(
    model: str | Path | nn.Module,
    output: Path,
    options: Options,
    *,
    overwrite: bool,
    restart: bool,
    progress: Progress,
    cache_dir: Path | None,
    command: str,
) -> Delivered:
    """Compress ``model`` into the GGUF file ``output``, at most as large as the budget, and let llama.cpp run it.

    While it runs, the work lies beside ``output``; the same call after a crash continues. The report is kept as
    ``<output>.report.html``, plan and proof as ``<output>.json``.
    """
    _check_output(output, overwrite)
    target = _target(model, options, cache_dir)
    inner, wanted = _inner(target, options)
    folder = output.with_name(output.name + ".artifact")
    try:
        result = pipeline.compress(
            model,
            folder,
            inner,
            overwrite=folder.exists(),
            restart=restart,
            progress=progress,
            cache_dir=cache_dir,
            command=command,
        )
    except Infeasible as error:
        raise _infeasible(error, target, wanted) from error
    size = write_gguf(folder, output, target.recipe)
    if size > wanted:
        output.unlink()
        raise VerificationFailed(
            f"{output} would have {size:,} bytes, over the {wanted:,} asked for; please report this."
        )
    report = output.with_name(output.name + ".report.html")
    os.replace(folder / "report.html", report)
    weights = target.recipe.anatomy.parameters
    result = replace(
        result,
        folder=output,
        plan=replace(result.plan, file_bytes=size, budget=wanted),
        bits_per_weight=8 * size / weights,
    )
    proof, note = _proof(target, output, options, progress, cache_dir)
    data = {
        "plan": {name: choice.codec for name, choice in result.plan.layers.items()},
        "file_bytes": size,
        "proof": None if proof is None else {**asdict(proof), "path": str(output)},
        "note": note,
    }
    output.with_name(output.name + ".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder)
    return Delivered(output, result, proof, note)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".gguf":
        raise BadInput(f"llama.cpp reads .gguf files; {output} does not end so.")
    if output.exists() and not overwrite:
        raise BadInput(f"{output} exists already; choose another --output, or add --overwrite to replace it.")
    if not output.absolute().parent.is_dir():
        raise BadInput(f"The folder {output.absolute().parent} does not exist; make it, or choose another --output.")


def write_gguf(folder: Path, output: Path, recipe: Recipe) -> int:
    """Write an artifact's tensors as a GGUF, and read it back. Returns its bytes.

    Raises BadInput for an artifact with codecs that llama.cpp cannot run, VerificationFailed when it reads otherwise.
    """
    artifact = open_whole(folder)
    layers = {layer.name: layer for layer in recipe.anatomy.layers}

    def read(name: str) -> Tensor | dict[str, Tensor]:
        return artifact.tensors(name) if name in layers else artifact.kept(name)

    llama_cpp.export(recipe, artifact.layers, output, read)
    stored = llama_cpp.Stored(output, recipe)
    for name, layer in layers.items():
        codec = artifact.layers[name]
        same = stored.texts[name] == str(codec)
        written = stored.blocks(layer, codec) if same else {}
        if not same or any(not written[part].equal(tensor) for part, tensor in artifact.tensors(name).items()):
            raise VerificationFailed(f"{output} does not hold {name} as it was written; check the disk and run again.")
    return output.stat().st_size


def export_gguf(folder: Path, output: Path, *, overwrite: bool, cache_dir: Path | None) -> int:
    """An artifact that was made for llama.cpp as a GGUF; its bytes. The model it was made from must be there."""
    _check_output(output, overwrite)
    artifact = open_whole(folder)
    llama_cpp.check_candidates(sorted({str(codec) for codec in artifact.layers.values()}))
    target = _target(artifact.manifest.source.origin, Options(None), cache_dir)
    return write_gguf(folder, output, target.recipe)


def prove(
    path: Path, against: str | Path | nn.Module, options: Options, *, progress: Progress, cache_dir: Path | None
) -> Proof:
    """Run a GGUF by llama.cpp and compare it with its source, and with what our decoding of it predicts.

    Raises EngineFailed where llama.cpp is not installed or refuses the file.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist; give a GGUF file.")
    proof, note = _proof(_target(against, options, cache_dir), path, options, progress, cache_dir)
    if proof is None:
        raise EngineFailed(f"{path} is {note}.")
    return proof


def _proof(
    target: _Target, path: Path, options: Options, progress: Progress, cache_dir: Path | None
) -> tuple[Proof | None, str]:
    library = find_library()
    if library is None:
        return None, UNPROVEN
    workers = options.workers or pipeline.available_workers()
    with pipeline.one_thread_each():
        texts = prepare_texts(target.source, options, cache=cache_folder(cache_dir), workers=workers, progress=progress)
        proof = prove_gguf(
            path,
            LlamaCpp(library),
            target.source,
            target.body,
            target.recipe,
            texts.evaluation.ids,
            chunk=chunk_sequences(options.length),
            workers=workers,
            origin=texts.evaluation.origin,
            progress=progress,
        )
    return proof, ""
