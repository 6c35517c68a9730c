"""The command line: each command is one call of :mod:`tersor.api`, its options, and how its answer is shown."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tersor.errors import BadInput, TersorError
from tersor.running import serve
from tersor.talking import chat, run
from tersor.version import __version__

app = typer.Typer(
    name="tersor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Model: a folder, a .gguf file, a hub id, or 'demo'.")]
Size = Annotated[
    str | None,
    typer.Option(
        help="Budget for all weight files: 60MB, 1.5GiB, bytes, or 25% of the source (of a quantized one, of its "
        "weights unpacked to 16 bits)."
    ),
]
Memory = Annotated[
    str | None, typer.Option(help="Budget for the weights in memory while running, written like --size.")
]
Bpw = Annotated[float | None, typer.Option(help="Budget in bits per weight, embeddings, head and headers included.")]
Text = Annotated[
    str | None, typer.Option(help="Calibration text: .txt, .jsonl, .parquet or a hub data set. Default: sampled.")
]
EvalText = Annotated[str | None, typer.Option(help="Text to measure quality on. Default: held out from --text.")]
Field = Annotated[str | None, typer.Option("--text-field", help="Field of .jsonl, .parquet or data set rows.")]
Split = Annotated[str, typer.Option("--text-split", help="Split of a hub data set.")]
Sequences = Annotated[int, typer.Option(help="Calibration sequences.")]
Length = Annotated[int, typer.Option(help="Tokens per sequence.")]
EvalSequences = Annotated[int, typer.Option(help="Sequences that quality is measured on.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn by chance.")]
Candidates = Annotated[
    str | None, typer.Option(help="Codecs to choose from, comma-separated, such as int3:g64,int4:g64,bf16.")
]
Effort = Annotated[
    str,
    typer.Option(
        "--effort", help="fast (scalar codecs only), normal, or best (longer searches, several times as slow)."
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        "--for", help="What is to run it: transformers, llama.cpp (a GGUF file), compressed-tensors, onnx or onnx-qdq."
    ),
]
Ranks = Annotated[
    int, typer.Option("--tensor-parallel", help="Processors that the engine named by --for splits each layer over.")
]
Like = Annotated[
    str | None,
    typer.Option(help="A file of the same model for --for llama.cpp: be no larger (unless --size says so), no slower."),
]
Accuracy = Annotated[
    int | None,
    typer.Option(
        "--onnx-accuracy-level",
        help="Arithmetic of --for onnx: 0 as ONNX Runtime likes, 1 float32 (default), 2 float16, 3 bfloat16, "
        "4 inputs rounded to 8 bits.",
    ),
]
Tune = Annotated[
    bool | None,
    typer.Option(
        "--tune/--no-tune", help="Tune each block's scales and rounding after encoding. Default: with --effort best."
    ),
]
SolverName = Annotated[str, typer.Option("--solver", help="coordinate, feedback or nearest.")]
Sensitivity = Annotated[str, typer.Option(help="fisher (one backward pass) or flat (all layers alike).")]
AllocatorName = Annotated[str, typer.Option("--allocator", help="exact or lagrangian.")]
Propagate = Annotated[bool, typer.Option(help="Fit each block to the outputs of the compressed blocks before it.")]
ShareFused = Annotated[bool, typer.Option(help="Give layers that engines fuse (q/k/v, gate/up) the same codec.")]
Dtype = Annotated[str, typer.Option(help="Arithmetic of the model's own passes: bfloat16 or float32.")]
Workers = Annotated[int | None, typer.Option(help="Threads. Does not change the result. Default: all processors.")]
MaxMemory = Annotated[str | None, typer.Option(help="Cap on resident memory above the interpreter's own, such as 4GB.")]
Trust = Annotated[bool, typer.Option(help="Allow code that comes with the model to run.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Options of a command, out of its local variables, as the API takes them."""
    from tersor.codecs import split

    named = values.pop("candidates")
    values["candidates"] = None if named is None else tuple(part for part in split(named, ",") if part)
    return values


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"tersor {__version__}\n")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """A rate-distortion compiler for neural networks: the best model that fits a given number of bytes."""


@app.command()
def plan(
    model: Model,
    size: Size = None,
    memory: Memory = None,
    bpw: Bpw = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="From the weights alone, in seconds, without calibration.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan here, to edit and feed back.")
    ] = None,
    text: Text = None,
    text_field: Field = None,
    text_split: Split = "train",
    sequences: Sequences = 64,
    length: Length = 256,
    seed: Seed = 0,
    candidates: Candidates = None,
    effort: Effort = "normal",
    tune: Tune = None,
    solver: SolverName = "coordinate",
    sensitivity: Sensitivity = "fisher",
    allocator: AllocatorName = "exact",
    share_fused: ShareFused = False,
    dtype: Dtype = "bfloat16",
    eval_text: EvalText = None,
    eval_sequences: EvalSequences = 16,
    workers: Workers = None,
    max_memory: MaxMemory = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
    engine: Engine = "transformers",
    tensor_parallel: Ranks = 1,
    onnx_accuracy_level: Accuracy = None,
    like: Like = None,
    as_json: Json = False,
) -> None:
    """Choose codecs within a budget; show exact sizes and the cost of the run. Encodes nothing."""
    values = dict(locals())
    for name in ("model", "fast", "output", "as_json"):
        values.pop(name)
    from tersor import api, show
    from tersor.artifact import plan_to_json

    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise BadInput(f"The plan cannot be written to {output}; give a file in a folder that exists.")
    with show.progress() as progress:
        planned = api.plan(model, fast=fast, progress=progress, **_settings(values))
    if output is not None:
        output.write_text(plan_to_json(planned.plan))
    show.emit(as_json, lambda: show.plan_data(planned), lambda: show.plan_table(planned, output))


@app.command()
def compress(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write, or the engine's file.")],
    size: Size = None,
    memory: Memory = None,
    bpw: Bpw = None,
    plan: Annotated[Path | None, typer.Option(help="Follow this plan, as written by `tersor plan` or edited.")] = None,
    text: Text = None,
    text_field: Field = None,
    text_split: Split = "train",
    sequences: Sequences = 64,
    length: Length = 256,
    eval_text: EvalText = None,
    eval_sequences: EvalSequences = 16,
    samples: Annotated[int, typer.Option(help="Prompts continued before and after, for the report (0 to 2).")] = 2,
    seed: Seed = 0,
    candidates: Candidates = None,
    effort: Effort = "normal",
    tune: Tune = None,
    solver: SolverName = "coordinate",
    sensitivity: Sensitivity = "fisher",
    allocator: AllocatorName = "exact",
    propagate: Propagate = True,
    share_fused: ShareFused = False,
    dtype: Dtype = "bfloat16",
    workers: Workers = None,
    max_memory: MaxMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an interrupted run's work away.")] = False,
    trust_remote_code: Trust = False,
    revision: Revision = None,
    engine: Engine = "transformers",
    tensor_parallel: Ranks = 1,
    onnx_accuracy_level: Accuracy = None,
    like: Like = None,
    as_json: Json = False,
) -> None:
    """Compress a model within a budget, verify the result and measure it. Continues an interrupted run."""
    values = dict(locals())
    for name in ("model", "output", "plan", "overwrite", "restart", "engine", "as_json"):
        values.pop(name)
    from tersor import api, show

    if engine != "transformers":
        if memory is not None:
            raise BadInput(f"--memory cannot be used with --for {engine}; give --size or --bpw.")
        values.pop("memory")
        with show.progress() as progress:
            delivered = api.compress_for(
                engine,
                model,
                output,
                plan=plan,
                overwrite=overwrite,
                restart=restart,
                progress=progress,
                command=shlex.join(["tersor", *sys.argv[1:]]),
                **_settings(values),
            )
        show.emit(as_json, lambda: show.delivered_data(delivered), lambda: show.delivered_table(delivered))
        return
    with show.progress() as progress:
        result = api.compress(
            model,
            output,
            plan=plan,
            overwrite=overwrite,
            restart=restart,
            progress=progress,
            command=shlex.join(["tersor", *sys.argv[1:]]),
            **_settings(values),
        )
    show.emit(as_json, lambda: show.result_data(result), lambda: show.result_table(result))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="An artifact, or any model folder of the same structure.")],
    against: Annotated[str | None, typer.Option(help="The reference. Default: the artifact's source.")] = None,
    text: Text = None,
    text_field: Field = None,
    text_split: Split = "train",
    sequences: Sequences = 32,
    length: Length = 256,
    seed: Seed = 1,
    dtype: Dtype = "bfloat16",
    workers: Workers = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Measure KL, perplexity and agreement against the reference."""
    from tersor import api, show

    with show.progress() as progress:
        quality = api.evaluate(
            model,
            against=against,
            progress=progress,
            text=text,
            text_field=text_field,
            text_split=text_split,
            sequences=sequences,
            length=length,
            seed=seed,
            dtype=dtype,
            workers=workers,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
    show.emit(as_json, lambda: show.quality_data(quality), lambda: show.quality_table(quality))


@app.command()
def export(
    artifact: Annotated[Path, typer.Argument(help="An artifact whose codecs the engine can run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File or folder to write.")],
    to: Annotated[str, typer.Option("--to", help="The engine, named as for --for.")] = "llama.cpp",
    tensor_parallel: Ranks = 1,
    onnx_accuracy_level: Accuracy = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")] = False,
) -> None:
    """Write an artifact as another engine's file."""
    from tersor import api

    size = api.export(
        artifact,
        output,
        engine=to,
        overwrite=overwrite,
        tensor_parallel=tensor_parallel,
        onnx_accuracy_level=onnx_accuracy_level,
    )
    sys.stdout.write(f"{output}: {size:,} bytes\n")


@app.command()
def prove(
    path: Annotated[Path, typer.Argument(help="A file or folder for another engine, such as a GGUF.")],
    against: Annotated[str, typer.Option(help="The model it was made from: a folder, .gguf file, hub id, or 'demo'.")],
    text: Text = None,
    text_field: Field = None,
    text_split: Split = "train",
    sequences: Sequences = 64,
    length: Length = 256,
    eval_text: EvalText = None,
    eval_sequences: EvalSequences = 16,
    seed: Seed = 0,
    workers: Workers = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Run a file by its real engine; show its KL from the source beside the one that tersor predicts."""
    values = dict(locals())
    for name in ("path", "against", "as_json"):
        values.pop(name)
    from tersor import api, show

    with show.progress() as progress:
        proof = api.prove(path, against, progress=progress, **values)
    show.emit(as_json, lambda: show.proof_data(proof), lambda: show.proof_table(proof))


@app.command()
def inspect(model: Model, trust_remote_code: Trust = False, revision: Revision = None, as_json: Json = False) -> None:
    """Show an artifact's contents, or a model's layers and how hard each is to compress."""
    from tersor import api, show

    with show.progress() as progress:
        found = api.inspect(model, progress=progress, trust_remote_code=trust_remote_code, revision=revision)
    show.emit(as_json, lambda: show.inspection_data(found), lambda: show.inspection_table(found))


app.command()(run)
app.command()(chat)
app.command()(serve)


@app.command()
def survey(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "--out", "-o", help="Folder of results.")] = Path("tersor-survey"),
    bits: Annotated[str, typer.Option(help="Bits per weight of the codes, comma-separated.")] = "2,3,4",
    recipes: Annotated[
        str | None, typer.Option(help="Recipes by name, or Python files that add some, comma-separated. Default: all.")
    ] = None,
    text: Text = None,
    text_field: Field = None,
    text_split: Split = "train",
    sequences: Sequences = 64,
    length: Length = 256,
    eval_text: EvalText = None,
    eval_sequences: EvalSequences = 16,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    workers: Annotated[int, typer.Option(help="Recipes run side by side, each in a process of its own.")] = 1,
    ray: Annotated[
        str | None, typer.Option(help="Run them on a Ray cluster instead: local, auto or an address.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed before.")] = False,
    docs: Annotated[Path | None, typer.Option(help="Write a page of documentation for each recipe here.")] = None,
    trust_remote_code: Trust = False,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Run the literature's recipes on a model at equal bytes; say which claims hold. Continues where it was stopped."""
    from tersor import api, show

    with show.progress() as progress:
        found = api.survey(
            model,
            output,
            bits=_numbers(bits),
            recipes=None if recipes is None else _words(recipes),
            processes=workers,
            ray=ray,
            retry=retry,
            docs=docs,
            progress=progress,
            told=None if as_json else show.survey_line,
            text=text,
            text_field=text_field,
            text_split=text_split,
            sequences=sequences,
            length=length,
            eval_text=eval_text,
            eval_sequences=eval_sequences,
            seed=seed,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
    show.emit(as_json, lambda: show.survey_data(found), lambda: show.survey_table(found))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in _words(text)]
    except ValueError:
        raise BadInput(f"--bits {text!r} cannot be read; write numbers with commas, such as 2,3,4.") from None


def main() -> None:
    """Entry point: deliberate errors become one sentence on standard error and exit code 2."""
    try:
        app()
    except TersorError as error:
        sys.stderr.write(f"tersor: {error}\n")
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        # The option parser turns Ctrl-C into this exit code, without a word.
        if isinstance(stop, SystemExit) and stop.code != 130:
            raise
        sys.stderr.write("tersor: stopped; the same command continues compress, plan and survey where they were.\n")
        sys.exit(130)
    except OSError as error:
        # A full or failing disk, a folder without permission: the system's own sentence, and where.
        where = f" ({error.filename})" if error.filename else ""
        sys.stderr.write(f"tersor: {error.strerror or error}{where}; mend that and run the same command again.\n")
        sys.exit(2)
