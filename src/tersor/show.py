"""How answers look on a terminal, and the same as JSON for machines."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging

from tersor.errors import BadInput

if TYPE_CHECKING:
    from tersor.api import Inspection
    from tersor.contracts import Quality
    from tersor.delivery import Delivered
    from tersor.pipeline import Planned, Result
    from tersor.stages.chat import Chat
    from tersor.stages.prove import Proof
    from tersor.stages.session import Written
    from tersor.survey import Outcome, Survey


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with time left per stage, on standard error; nothing where that is not a terminal.

    transformers' own bars are off meanwhile: they would break up this one, and fill log files.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with _no_bars(), Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


@contextmanager
def _no_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def emit(as_json: bool, data: Callable[[], Any], table: Callable[[], None]) -> None:
    """Print an answer one way or the other, on standard output."""
    if as_json:
        sys.stdout.write(json.dumps(_plain(data()), indent=1, allow_nan=False) + "\n")
    else:
        table()


def _plain(data: Any) -> Any:
    """The same for JSON, which has no NaN: what is unknown becomes null."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _console() -> Console:
    """Standard output; a file or a pipe has no edge that long layer names would have to be cut at."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def written_data(written: Written) -> dict[str, Any]:
    return {
        "text": written.text,
        "prompt_tokens": written.prompt_tokens,
        "tokens": written.tokens,
        "prompt_tokens_per_second": round(written.prompt_speed, 2),
        "tokens_per_second": round(written.speed, 2),
        "fallback": written.fallback,
    }


def written_line(written: Written) -> None:
    """How fast a text was written, on standard error, and why not faster."""
    _say_fallback(written.fallback)
    speed = f" at {written.speed:.1f} a second" if written.tokens > 1 else ""
    sys.stderr.write(
        f"tersor: {written.prompt_tokens} tokens read at {written.prompt_speed:.1f} a second, {written.tokens} written"
        f"{speed}\n"
    )


def _say_fallback(reason: str | None) -> None:
    if reason is not None:
        sys.stderr.write(f"tersor: run by transformers, layer by layer: {reason}.\n")


def talk(chat: Chat) -> None:
    """Answer lines of standard input until ``/exit`` or its end. Raises KeyboardInterrupt from between answers."""
    _say_fallback(chat.fallback)
    while (line := _line()) is not None:
        message = line.strip()
        if message == "/exit":
            return
        if message == "/new":
            chat.forget()
        elif message:
            _answer(chat, message)


def _line() -> str | None:
    """The next line, or None at the end. At a terminal it can be edited."""
    try:
        return input("> ") if sys.stdin.isatty() else sys.stdin.readline() or None
    except EOFError:
        sys.stdout.write("\n")
        return None


def _answer(chat: Chat, message: str) -> None:
    try:
        chat.say(message, stream)
    except KeyboardInterrupt:
        sys.stderr.write("tersor: the answer was broken off and is forgotten.\n")
    except BadInput as error:
        sys.stderr.write(f"tersor: {error}\n")
    else:
        if chat.full:
            sys.stderr.write(f"tersor: all {chat.context} tokens of the conversation are taken; /new begins anew.\n")


def nice_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.4g} {unit}"
        count /= 1000
    raise AssertionError


def _facts(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    _console().print(table)


def plan_data(planned: Planned) -> dict[str, Any]:
    plan = planned.plan
    return {
        "budget": plan.budget,
        "file_bytes": plan.file_bytes,
        "bits_per_weight": 8 * plan.file_bytes / planned.anatomy.parameters,
        "predicted_kl": plan.predicted if plan.options.get("measured") else None,
        "peak_memory": planned.estimate.memory,
        "disk": planned.estimate.disk,
        "seconds": planned.estimate.seconds,
        "layers": {name: asdict(choice) for name, choice in plan.layers.items()},
        "tensors": [asdict(fate) for fate in planned.anatomy.tensors],
        "notes": list(planned.notes),
    }


def plan_table(planned: Planned, output: Path | None) -> None:
    plan, anatomy = planned.plan, planned.anatomy
    layers = Table(title="Plan", title_justify="left")
    for heading in ("layers", "codec", "count", "bytes", "bits/weight"):
        layers.add_column(heading, justify="left" if heading in ("layers", "codec") else "right")
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    for layer in anatomy.layers:
        kind = layer.name.rsplit(".", 1)[-1]
        key = (kind, plan.layers[layer.name].codec)
        counts[key] += 1
        sizes[key] += plan.layers[layer.name].nbytes
        weights[key] += layer.parameters
    for key in sorted(counts):
        layers.add_row(*key, str(counts[key]), f"{sizes[key]:,}", f"{8 * sizes[key] / weights[key]:.3f}")
    _console().print(layers)
    fates = Counter(fate.fate for fate in anatomy.tensors)
    rows = [
        ("budget", f"{plan.budget:,} bytes"),
        ("weight files", f"{plan.file_bytes:,} bytes ({plan.file_bytes / plan.budget:.2%} of the budget)"),
        ("bits per weight", f"{8 * plan.file_bytes / anatomy.parameters:.3f}, everything included"),
        (
            "predicted KL",
            _predicted(plan.predicted) if plan.options.get("measured") else "not measured (--fast)",
        ),
        ("tensors", ", ".join(f"{count} {fate}" for fate, count in fates.items())),
        ("peak memory", f"about {nice_bytes(planned.estimate.memory)} above the interpreter's own"),
        ("disk", f"about {nice_bytes(planned.estimate.disk)} while running"),
        ("time", f"about {planned.estimate.seconds:.0f} s for `tersor compress`"),
    ]
    if output is not None:
        rows.append(("plan", str(output)))
    rows += [("note", note) for note in planned.notes]
    _facts("Run", rows)


def _predicted(value: float) -> str:
    return "unknown: the plan was edited" if math.isnan(value) else f"{value:.5f} nats/token"


def quality_data(quality: Quality) -> dict[str, Any]:
    return asdict(quality)


def _quality_rows(quality: Quality) -> list[tuple[str, str]]:
    return [
        ("KL", f"{quality.kl:.5f} ± {quality.kl_error:.5f} nats/token"),
        ("perplexity", f"{quality.perplexity:.3f} (reference {quality.reference_perplexity:.3f})"),
        ("top-1 agreement", f"{quality.top1:.2%}"),
        ("measured on", f"{quality.tokens:,} tokens of {quality.text}"),
    ]


def quality_table(quality: Quality) -> None:
    _facts("Quality", _quality_rows(quality))


def result_data(result: Result) -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "budget": result.plan.budget,
        "file_bytes": result.plan.file_bytes,
        "bits_per_weight": result.bits_per_weight,
        "predicted_kl": result.plan.predicted,
        "quality": asdict(result.quality),
        "seconds": result.seconds,
        "stages": {name: round(seconds, 2) for name, seconds in result.stages.items()},
        "peak_memory": result.peak_memory,
        "report": str(result.folder / "report.html"),
        "notes": list(result.notes),
    }


def result_table(result: Result) -> None:
    plan = result.plan
    rows = [
        ("weight files", f"{plan.file_bytes:,} bytes of {plan.budget:,} ({plan.file_bytes / plan.budget:.2%})"),
        ("bits per weight", f"{result.bits_per_weight:.3f}, everything included"),
        *_quality_rows(result.quality),
        ("predicted KL", _predicted(plan.predicted)),
        ("time", f"{result.seconds:.0f} s" + (" (resumed)" if result.resumed else "")),
        ("peak memory", f"{nice_bytes(result.peak_memory)} above the interpreter's own"),
    ]
    rows += [("note", note) for note in result.notes]
    if result.sample is not None:
        rows += [("prompt", result.sample[0]), ("text", result.sample[1])]
    rows += [("artifact", str(result.folder)), ("report", str(result.folder / "report.html"))]
    _facts("Compressed", rows)


def _asked(proof: Proof) -> str:
    return f", {proof.said}" if proof.said else ""


def _proof_rows(proof: Proof) -> list[tuple[str, str]]:
    return [
        (f"KL by {proof.by}", f"{proof.engine.kl:.5f} ± {proof.engine.kl_error:.5f} nats/token"),
        ("KL by our decoding", f"{proof.ours.kl:.5f} ± {proof.ours.kl_error:.5f} nats/token"),
        ("between the two", f"{proof.noise:.2g} nats/token: the engine's own arithmetic{_asked(proof)}"),
        ("perplexity", f"{proof.engine.perplexity:.3f} (reference {proof.engine.reference_perplexity:.3f})"),
        ("top-1 agreement", f"{proof.engine.top1:.2%}"),
        ("measured on", f"{proof.engine.tokens:,} tokens of {proof.engine.text}"),
    ]


def proof_data(proof: Proof) -> dict[str, Any]:
    return {**asdict(proof), "path": str(proof.path)}


def proof_table(proof: Proof) -> None:
    _facts("Proven", [("file", f"{proof.path}, {proof.file_bytes:,} bytes"), *_proof_rows(proof)])


def delivered_data(delivered: Delivered) -> dict[str, Any]:
    proof = None if delivered.proof is None else proof_data(delivered.proof)
    return {**result_data(delivered.result), "file": str(delivered.path), "proof": proof, "note": delivered.note}


def delivered_table(delivered: Delivered) -> None:
    result, plan = delivered.result, delivered.result.plan
    rows = [
        ("file", str(delivered.path)),
        ("bytes", f"{plan.file_bytes:,} of {plan.budget:,} ({plan.file_bytes / plan.budget:.2%})"),
        ("bits per weight", f"{result.bits_per_weight:.3f}, everything included"),
        *(_quality_rows(result.quality) if delivered.proof is None else _proof_rows(delivered.proof)),
        ("predicted KL", _predicted(plan.predicted)),
        ("time", f"{result.seconds:.0f} s" + (" (resumed)" if result.resumed else "")),
        ("peak memory", f"{nice_bytes(result.peak_memory)} above the interpreter's own"),
    ]
    rows += [("note", note) for note in (*result.notes, delivered.note) if note]
    if result.sample is not None:
        rows += [("prompt", result.sample[0]), ("text", result.sample[1])]
    rows.append(("report", f"{delivered.path}.report.html"))
    _facts(f"Compressed for {delivered.engine}", rows)


def inspection_data(found: Inspection) -> dict[str, Any]:
    if found.artifact is not None:
        artifact = found.artifact
        return {
            "weight_bytes": artifact.weight_bytes,
            "layers": {name: str(codec) for name, codec in artifact.layers.items()},
            "shapes": {name: list(shape) for name, shape in artifact.shapes.items()},
            "errors": dict(artifact.manifest.errors),
            "quality": None if artifact.manifest.quality is None else asdict(artifact.manifest.quality),
            "source": asdict(artifact.manifest.source),
            "notes": list(artifact.manifest.notes),
        }
    assert found.anatomy is not None
    return {
        "model_type": found.anatomy.model_type,
        "parameters": found.anatomy.parameters,
        "source_bytes": found.anatomy.source_bytes,
        "layers": [asdict(layer) for layer in found.anatomy.layers],
        "tensors": [asdict(fate) for fate in found.anatomy.tensors],
        "errors": {name: dict(errors) for name, errors in found.errors.items()},
        "notes": list(found.anatomy.notes),
    }


def inspection_table(found: Inspection) -> None:
    table = Table(title_justify="left")
    if found.artifact is not None:
        artifact = found.artifact
        table.title = f"{artifact.folder}: {artifact.weight_bytes:,} bytes of weights"
        for heading in ("layer", "codec", "shape", "bits/weight", "relative error"):
            table.add_column(heading, justify="left" if heading in ("layer", "codec") else "right", overflow="fold")
        for name, codec in artifact.layers.items():
            rows, width = artifact.shapes[name]
            bits = codec.bits((rows, width)) / (rows * width)
            error = artifact.manifest.errors.get(name)
            table.add_row(name, str(codec), f"{rows} x {width}", f"{bits:.3f}", "" if error is None else f"{error:.4f}")
        _console().print(table)
        if artifact.manifest.quality is not None:
            quality_table(artifact.manifest.quality)
        return
    anatomy = found.anatomy
    assert anatomy is not None
    texts = list(next(iter(found.errors.values()), {}))
    table.title = f"{anatomy.model_type}: {anatomy.parameters:,} weights, {anatomy.source_bytes:,} bytes"
    for heading in ("layer", "kind", "shape", "inputs shared by", *(f"error {text}" for text in texts)):
        left = heading in ("layer", "kind", "inputs shared by")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for layer in anatomy.layers:
        shape = f"{layer.shape[0]} x {layer.shape[1]}" + (f" x {layer.copies}" if layer.copies > 1 else "")
        shared = sum(other.inputs == layer.inputs for other in anatomy.layers)
        errors = [f"{found.errors[layer.name].get(text, float('nan')):.4f}" for text in texts]
        table.add_row(layer.name, layer.kind, shape, str(shared), *errors)
    _console().print(table)
    fates = Counter(fate.fate for fate in anatomy.tensors)
    facts = [("tensors", ", ".join(f"{count} {fate}" for fate, count in fates.items()))]
    _facts("Anatomy", facts + [("note", note) for note in anatomy.notes])


def survey_line(outcome: Outcome) -> None:
    """One line on standard error for each result of a survey, as it comes."""
    told = f"{outcome.recipe} at {outcome.bits:g} bits: "
    if outcome.status == "measured":
        told += f"KL {outcome.kl:.4f} ± {outcome.kl_error:.4f}, {outcome.rate:.3f} bits per weight"
    else:
        told += f"{outcome.status}: {outcome.error}"
    if outcome.seconds is not None:
        told += f", {outcome.seconds:.0f} s"
    sys.stderr.write(told + "\n")


def survey_data(survey: Survey) -> dict[str, Any]:
    return {
        "model": survey.model,
        "page": str(survey.page),
        "database": str(survey.database),
        "new": survey.new,
        "results": [outcome.plain() for outcome in survey.outcomes],
        "verdicts": [asdict(verdict) for verdict in survey.verdicts],
    }


def survey_table(survey: Survey) -> None:
    """The results by bits and KL, the verdicts, and where the page is."""
    from tersor.survey import front

    best = {(outcome.recipe, outcome.bits) for outcome in front(survey.outcomes)}
    table = Table(title=f"{survey.model}: KL from the original at equal bytes")
    for heading in ("bits", "recipe", "bits/weight", "KL", "output error", "CPU time", "front"):
        table.add_column(heading, justify="left" if heading == "recipe" else "right", overflow="fold")
    for one in sorted(survey.outcomes, key=lambda one: (one.bits, one.kl is None, one.kl or 0.0)):
        if one.status != "measured":
            table.add_row(f"{one.bits:g}", escape(one.recipe), one.status, "", "", "", "")
            continue
        table.add_row(
            f"{one.bits:g}",
            escape(one.recipe),
            f"{one.rate:.3f}",
            f"{one.kl:.4f} ± {one.kl_error:.4f}",
            "" if one.output_error is None else f"{one.output_error:.4f}",
            "" if one.seconds is None else f"{one.seconds:.0f} s",
            "yes" if (one.recipe, one.bits) in best else "",
        )
    _console().print(table)
    claims = Table(title="Claims")
    for heading in ("recipe", "claim", "bits", "ratio", "below", "verdict"):
        claims.add_column(heading, justify="left" if heading in ("recipe", "claim", "verdict") else "right")
    for verdict in survey.verdicts:
        if verdict.word != "untested":
            claims.add_row(
                escape(verdict.recipe),
                escape(verdict.claim.sentence),
                f"{verdict.bits:g}",
                f"{verdict.ratio:.3f} ({verdict.low:.3f} to {verdict.high:.3f})",
                f"{verdict.claim.ratio:g}",
                verdict.word,
            )
    if claims.rows:
        _console().print(claims)
    untested = sum(verdict.word == "untested" for verdict in survey.verdicts)
    facts = [("page", str(survey.page)), ("results", f"{survey.database}, {survey.new} of them from this run")]
    if untested:
        facts.append(("not tested", f"{untested} claims, for want of the recipe, its baseline or their bits"))
    _facts("Survey", facts)
