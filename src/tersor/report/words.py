"""Numbers as a person reads them, and the sentences of the report."""

from __future__ import annotations

import math
from typing import Literal

from tersor.report.data import ReportData

Tone = Literal["good", "fair", "poor", "bad", "unknown"]

SCALE: tuple[tuple[float, Tone, str], ...] = (
    (0.01, "good", "is hard to tell from the original"),
    (0.05, "good", "stays very close to the original"),
    (0.15, "fair", "stays close to the original"),
    (0.4, "fair", "differs noticeably from the original"),
    (1.0, "poor", "is clearly weaker than the original"),
    (math.inf, "bad", "no longer behaves like the original"),
)
"""Reading aid for KL in nats per token: upper limit, tone, words.

Anchors, measured on a model of 135 M parameters: int8 per channel 0.004, llama.cpp Q4_K_M 0.05, Q4_0 0.36,
3-bit groups 1.1.
"""


def size_text(nbytes: float) -> str:
    """Decimal units, as file managers and download pages count.

    >>> size_text(67_265_138), size_text(1_234_000_000), size_text(512), size_text(9_230)
    ('67.3 MB', '1.23 GB', '512 bytes', '9.23 kB')
    """
    if abs(nbytes) < 1000:
        return f"{nbytes:.0f} byte" + ("" if nbytes == 1 else "s")
    scaled, unit = nbytes / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if abs(scaled) < 999.95:
            break
        scaled, unit = scaled / 1000, larger
    return f"{scaled:.2f} {unit}" if abs(scaled) < 10 else f"{scaled:.1f} {unit}"


def opening(text: str) -> str:
    """
    >>> opening("rate–distortion of SmolLM2"), opening("")
    ('Rate–distortion of SmolLM2', '')
    """
    return text[:1].upper() + text[1:]


def count_text(value: int) -> str:
    """
    >>> count_text(134_515_008), count_text(1_235_814_400), count_text(960)
    ('134.5 M', '1.24 B', '960')
    """
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.2f} {unit}" if scaled < 10 else f"{scaled:.1f} {unit}"
    return f"{value:,}"


def time_text(seconds: float) -> str:
    """
    >>> time_text(0.4213), time_text(12.3), time_text(252), time_text(7500)
    ('0.42 s', '12.3 s', '4 min 12 s', '2 h 05 min')
    """
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def number_text(value: float) -> str:
    """Three significant digits.

    >>> number_text(0.097712), number_text(22.5414), number_text(1234.5), number_text(3.2e-7), number_text(0.0)
    ('0.0977', '22.5', '1,234', '3.2e-07', '0')
    """
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: "−infinite"}.get(value, "not a number")
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-4:
        return f"{value:.2g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def measured_text(value: float, error: float) -> str:
    """A value with as many decimals as its standard error bears.

    >>> measured_text(0.097712, 0.00213), measured_text(1.2345, 0.0)
    ('0.0977 ± 0.0021', '1.23')
    """
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return number_text(value)
    decimals = min(8, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def percent_text(share: float) -> str:
    """
    >>> percent_text(0.2499), percent_text(0.00042), percent_text(0.0), percent_text(0.99999)
    ('25.0%', '0.04%', '0%', '>99.99%')
    """
    if not math.isfinite(share):
        return number_text(share)
    if 0 < share < 0.0001:
        return "<0.01%"
    if 0.9999 < share < 1:
        return ">99.99%"
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{share:.2%}" if abs(share) < 0.01 or 0.999 < share < 1 else f"{share:.1%}"


def change_text(before: float, after: float) -> str:
    """
    >>> change_text(22.54, 23.92), change_text(10.0, 9.5), change_text(20.0, 220.0)
    ('+6.1%', '−5.0%', '11×')
    """
    if not (math.isfinite(before) and math.isfinite(after)) or before <= 0:
        return number_text(after)
    ratio = after / before
    if ratio >= 3:
        return f"{ratio:,.0f}×"
    return f"{'−' if ratio < 1 else '+'}{abs(ratio - 1):.1%}"


def tone(data: ReportData) -> Tone:
    """How the measured loss should be read; unknown when nothing was measured."""
    if data.quality is None:
        return "unknown"
    if not math.isfinite(data.quality.kl):
        return "bad"
    return next(found for limit, found, _ in SCALE if data.quality.kl <= limit)


def verdict(data: ReportData) -> str:
    """One sentence for someone who reads nothing else."""
    if data.source_bytes:
        size = f"At {percent_text(data.file_bytes / data.source_bytes)} of its original size"
    else:
        size = f"At {size_text(data.file_bytes)}"
    if data.budget is not None and data.file_bytes > data.budget:
        size += f", and {size_text(data.file_bytes - data.budget)} over its budget"
    quality = data.quality
    if quality is None:
        return f"{size}; its quality has not been measured."
    if not math.isfinite(quality.kl):
        return f"{size}, the model is broken: its divergence from the original is {number_text(quality.kl)}."
    words = next(text for limit, _, text in SCALE if quality.kl <= limit)
    return (
        f"{size}, the model {words}: it agrees on the next token {percent_text(quality.top1)} of the time, "
        f"and its perplexity {_moved(change_text(quality.reference_perplexity, quality.perplexity))}."
    )


def _moved(change: str) -> str:
    if change.endswith("×"):
        return f"is {change[:-1]} times the original's"
    verbs = {"+": "rises by", "−": "falls by"}
    return f"{verbs[change[0]]} {change[1:]}" if change[0] in verbs else f"is {change}"


def prediction(data: ReportData) -> str:
    """How well the plan foresaw the measured loss, in one sentence; empty when one of them is missing."""
    if data.quality is None or data.predicted is None:
        return ""
    measured, error, predicted = data.quality.kl, data.quality.kl_error, data.predicted
    if not (math.isfinite(measured) and math.isfinite(predicted)) or measured <= 0 or predicted <= 0:
        return "The predicted and the measured loss cannot be compared."
    if abs(predicted - measured) <= 2 * error:
        return "The plan's prediction agrees with the measurement, within two standard errors."
    factor = max(predicted / measured, measured / predicted)
    where = "above" if predicted > measured else "below"
    if factor >= 2:
        return f"The prediction was a factor {factor:.1f} {where} what was measured."
    return f"The prediction was {abs(predicted / measured - 1):.0%} {where} what was measured."
