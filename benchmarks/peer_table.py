"""The comparison of ``peers.py`` as figures and as a table: every ratio against the best peer that is no larger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def summary(peers: Sequence[Row], sized: Sequence[Row], linears: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """For every peer's file and rate: the best peer no larger, tersor no larger, and the ratio of their KL.

    ``sized``, ``linears``: tersor's rows for whole files and for linears alone. A tersor file made for a smaller budget
    fits a larger one too, so the best of those that fit counts; how many bytes it has is in ``ours_at``.
    """
    made = [row for row in peers if "quality" in row]
    files = [row for row in made if row["file_bytes"]]
    return {
        "files": [_against(row, files, sized, "file_bytes", "quality") for row in files],
        "linears": [_against(row, made, linears, "bits_per_weight", "quality_linears") for row in made],
    }


def _against(row: Row, peers: Sequence[Row], ours: Sequence[Row], size: str, quality: str) -> dict[str, Any]:
    # Rates are whole bytes cut to bits: a peer's own is never below what was asked of tersor but for rounding.
    limit = row[size] * (1 + 1e-9)
    best = min((peer for peer in peers if peer[size] <= limit), key=lambda peer: peer[quality]["kl"])
    found = {
        "peer": row["title"],
        "at": row[size],
        "kl": row[quality]["kl"],
        "best": best["title"],
        "best_at": best[size],
        "best_kl": best[quality]["kl"],
    }
    fitting = [one for one in ours if one[size] <= limit]
    if fitting:
        own = min(fitting, key=lambda one: one["quality"]["kl"])
        kl = own["quality"]["kl"]
        errors = [own["quality"]["kl_error"] / kl, best[quality]["kl_error"] / best[quality]["kl"]]
        ratio = kl / best[quality]["kl"]
        found |= {"ours_at": own[size], "ours_kl": kl, "ratio": ratio}
        found["ratio_error"] = ratio * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """All rows, the two comparisons, and the times."""
    lines = [
        f"# Peers on {result['model']}",
        "",
        f"Calibration: {result['calibration']}. Evaluation: {result['evaluation']}. KL in nats per token against the "
        "reference, dequantized weights, float32. Seconds of peers are for all they do; those of tersor for encoding, "
        f"{result['preparation']['seconds']:.0f} s before it for sensitivities and curves that all sizes share.",
        "",
        *_everything(result),
        "",
        "## Whole files: the best peer no larger, and tersor no larger",
        "",
        *_comparison(result["files"], "bytes", "{:,}"),
        "",
        "## Linear layers of the decoder alone, embedding in bfloat16 on both sides",
        "",
        *_comparison(result["linears"], "bits a weight", "{:.3f}"),
        "",
        *_speed(result.get("speed")),
    ]
    return "\n".join(lines) + "\n"


def _everything(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "| | bytes of weight files | bits a weight, linears | KL | perplexity | top-1 | seconds | processor seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if "error" in row:
            lines.append(f"| {row['title']} | failed: {row['error']} | | | | | | |")
            continue
        if "quality" not in row:
            lines.append(f"| {row['title']} | not measured yet | | | | | | |")
            continue
        size = f"{row['file_bytes']:,}" if row["file_bytes"] else "not saved"
        lines.append(
            f"| {row['title']} ({row['version']}) | {size} | {row['bits_per_weight']:.3f} | {_quality(row['quality'])} "
            f"| {row['seconds']:.0f} | {row['cpu_seconds']:.0f} |"
        )
    for kind in ("ours", "ours_linears"):
        for row in result[kind]:
            what = "whole" if kind == "ours" else "linears only"
            lines.append(
                f"| tersor, {what} | {row['file_bytes']:,} | {row['bits_per_weight']:.3f} | "
                f"{_quality(row['quality'])} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} |"
            )
    return lines


def _quality(found: Row) -> str:
    return f"{found['kl']:.4f} ± {found['kl_error']:.4f} | {found['perplexity']:.2f} | {found['top1']:.3f}"


def _comparison(rows: Sequence[Row], unit: str, form: str) -> list[str]:
    lines = [
        f"| peer | {unit} | its KL | best peer no larger | its KL | tersor's {unit} | tersor's KL | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["at"]):
        cells = [row["peer"], form.format(row["at"]), f"{row['kl']:.4f}", row["best"], f"{row['best_kl']:.4f}"]
        if "ratio" in row:
            cells += [form.format(row["ours_at"]), f"{row['ours_kl']:.4f}"]
            cells += [f"{row['ratio']:.3f} ± {row['ratio_error']:.3f}"]
        else:
            cells += ["not run", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _speed(speed: Row | None) -> list[str]:
    if not speed:
        return []
    theirs, plain = speed["gptqmodel"], speed["plain"]
    lines = [
        "## Time of error feedback on integers",
        "",
        f"{plain['bits']} bits, groups of {plain['group']}, the same tokens and threads. The whole is passes through "
        "the blocks and Gram matrices too, in PyTorch on both sides; solving is from Gram matrices to codes alone. "
        "GPTQModel leaves scales as they were chosen at first, and so does the second row (the survey's recipe gptq); "
        "the third refits them by least squares in the end, which is what compressing does.",
        "",
        "| | whole, s | processor time, s | solving, s | times as fast | by processor time | solving |",
        "|---|---|---|---|---|---|---|",
        f"| GPTQModel | {theirs['seconds']:.0f} | {theirs['cpu_seconds']:.0f} | {theirs['solving_seconds']:.1f} "
        "| | | |",
    ]
    for name, ours in (("tersor", plain), ("tersor, scales refitted", speed["refitted"])):
        lines.append(
            f"| {name} | {ours['seconds']:.0f} | {ours['cpu_seconds']:.0f} | {ours['solving_seconds']:.1f} | "
            f"{ours['seconds_ratio']:.2f} | {ours['cpu_seconds_ratio']:.2f} | {ours['solving_seconds_ratio']:.2f} |"
        )
    return lines
