"""The survey's results as one HTML file that loads nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tersor.errors import BadInput
from tersor.recipes import Recipe
from tersor.report import words
from tersor.report.shared import asset, plotly
from tersor.survey.bench import SIDE, Bench
from tersor.survey.records import Outcome
from tersor.survey.verdicts import SIGMAS, Verdict, front
from tersor.version import __version__

_SCRIPT = Path(__file__).parent / "assets" / "survey.js"


def write_page(
    path: Path,
    bench: Bench,
    recipes: Mapping[str, Recipe],
    outcomes: Sequence[Outcome],
    verdicts: Sequence[Verdict],
) -> None:
    """Write the page to ``path``, whole or not at all. Raises BadInput when it cannot be written."""
    text = render(setting(bench), recipes, outcomes, verdicts)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(text.encode("utf-8", errors="xmlcharrefreplace"))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadInput(f"The page cannot be written to {path}: {error.strerror}; give another --output.") from error


def setting(bench: Bench) -> dict[str, str]:
    """What results were measured on, for people."""
    anatomy = bench.context.anatomy
    return {
        "Model": f"{bench.context.source.origin} ({anatomy.model_type})",
        "Weights": f"{bench.weights:,} in {len(bench.layers)} layers are encoded; embeddings, head and norms stay",
        "Calibration": f"{bench.texts.calibration.tokens:,} tokens of {bench.texts.calibration.origin}",
        "Held-out text": f"{bench.texts.evaluation.tokens:,} tokens of {bench.texts.evaluation.origin}",
        "Arithmetic": str(bench.context.dtype).removeprefix("torch."),
        "Version": __version__,
    }


def render(
    facts: Mapping[str, str],
    recipes: Mapping[str, Recipe],
    outcomes: Sequence[Outcome],
    verdicts: Sequence[Verdict],
) -> str:
    """The whole page as text. Equal arguments give equal text."""
    best = {(one.recipe, one.bits) for one in front(outcomes)}
    counts = {word: sum(v.word == word for v in verdicts) for word in ("holds", "fails", "undecided", "untested")}
    rows = sorted(outcomes, key=lambda one: (one.bits, one.kl is None, one.kl or 0.0, one.recipe))
    return (
        _environment()
        .get_template("survey.html.j2")
        .render(
            facts=facts,
            recipes=recipes,
            rows=[(one, (one.recipe, one.bits) in best) for one in rows],
            # What was not tested comes last.
            verdicts=sorted(verdicts, key=lambda one: one.word == "untested"),
            counts=counts,
            side=SIDE,
            sigmas=SIGMAS,
            payload={"points": points(outcomes), "front": [_point(one) for one in front(outcomes)]},
            style=asset("style.css"),
            script=_script(),
            plotly=plotly(),
        )
    )


def points(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What the chart draws: measured outcomes."""
    return [_point(one) for one in outcomes if one.status == "measured" and one.kl is not None]


def _point(outcome: Outcome) -> dict[str, Any]:
    return {
        "recipe": outcome.recipe,
        "asked": outcome.bits,
        "bytes": outcome.nbytes,
        "bits": outcome.rate,
        "kl": outcome.kl,
        "error": outcome.kl_error,
        "seconds": outcome.seconds,
        "memory": outcome.memory,
    }


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tersor.survey"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters.update(size=words.size_text, duration=words.time_text, number=words.number_text)
    environment.globals.update(measured=words.measured_text)
    return environment


@cache
def _script() -> Markup:
    return Markup(_SCRIPT.read_text(encoding="utf-8"))
