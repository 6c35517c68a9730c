"""The report's data to one HTML file that needs nothing but a browser."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tersor.errors import BadInput
from tersor.report import words
from tersor.report.data import ReportData, Sample
from tersor.report.figures import kind_shares, loss_scale, size_bars, size_parts, view
from tersor.report.shared import asset, plotly

_SCRIPTS = ("page.js", "tables.js", "charts.js")


def render(data: ReportData) -> str:
    """The whole page as text: no links to anything outside, everything escaped. Equal data give equal text."""
    parts = size_parts(data)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            parts=parts,
            bars=size_bars(data, parts),
            loss_scale=loss_scale(data),
            kind_shares=kind_shares(data),
            samples=[(sample, *_fork(sample)) for sample in data.samples],
            payload={"data": data.to_plain(), "view": view(data)},
            scale=words.SCALE,
            tone=words.tone(data),
            verdict=words.verdict(data),
            prediction=words.prediction(data),
            style=asset("style.css"),
            scripts=Markup("\n").join(asset(name) for name in _SCRIPTS),
            plotly=plotly(),
        )
    )


def write_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Write the page to ``path``, whole or not at all.

    Raises :class:`~tersor.errors.BadInput` when the file cannot be written.
    """
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    # Text from a model can hold lone surrogates, which UTF-8 cannot; they become character references.
    content = render(data).encode("utf-8", errors="xmlcharrefreplace")
    try:
        partial.write_bytes(content)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadInput(
            f"The report cannot be written to {target}: {error.strerror}; free some space or choose another folder."
        ) from error


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tersor.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters.update(
        size=words.size_text,
        count=words.count_text,
        duration=words.time_text,
        number=words.number_text,
        percent=words.percent_text,
        opening=words.opening,
    )
    environment.globals.update(measured=words.measured_text, change=words.change_text, share_of=_share_of)
    return environment


def _fork(sample: Sample) -> tuple[str, str, str]:
    """The two texts cut where they first differ, at a word: common beginning, rest before, rest after."""
    before, after = sample.before, sample.after
    if before == after:
        return before, "", ""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    cut = max(before.rfind(mark, 0, same) for mark in " \n") + 1
    return before[:cut], before[cut:], after[cut:]


def _share_of(value: float, whole: float) -> float:
    """Length of a bar in percent of the longest."""
    if not math.isfinite(value) or whole <= 0:
        return 100.0 if value == math.inf else 0.0
    return round(100 * min(1.0, max(0.0, value / whole)), 3)
