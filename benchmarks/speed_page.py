"""docs/speed.md and its plots, from what benchmarks/product_speed.py and benchmarks/decode.py have written.

python benchmarks/speed_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"


def save(name: str) -> str:
    """Writes the current figure; the same figure gives the same bytes. Its place relative to docs/."""
    (DOCS / "images").mkdir(exist_ok=True)
    pyplot.tight_layout()
    pyplot.savefig(DOCS / "images" / f"{name}.svg", metadata={"Date": None, "Creator": None})
    pyplot.close()
    return f"images/{name}.svg"


def bars(
    names: list[str], series: dict[str, list[float]], label: str, *, marks: list[float | None] | None = None
) -> None:
    """Horizontal bars, one group a name; ``marks``: an aim for each."""
    height = 0.8 / len(series)
    _, axes = pyplot.subplots(figsize=(8, 0.55 + 0.34 * len(names) * max(len(series), 1) ** 0.5))
    for number, ((name, values), color) in enumerate(zip(series.items(), (BLUE, ORANGE, GREY), strict=False)):
        places = [-(i + number * height) for i in range(len(names))]
        axes.barh(places, values, height=height * 0.92, color=color, label=name)
        for place, value in zip(places, values, strict=True):
            axes.text(value, place, f" {value:.2f}" if value < 10 else f" {value:.0f}", va="center", fontsize=8)
    for i, aim in enumerate(marks or []):
        if aim is not None:
            axes.plot([aim, aim], [-i + height * 0.6, -i - 0.8 + height * 0.4], color="black", linewidth=1.5)
    axes.set_yticks([-i - (len(series) - 1) * height / 2 for i in range(len(names))], names, fontsize=9)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)


def kernels(found: dict[str, Any]) -> list[str]:
    """The section about single products."""
    lines = [row for row in found["lines"] if row["kernel"]]
    most = max(row["threads"] for row in lines)
    shapes = sorted({tuple(row["shape"]) for row in lines})
    text = [
        "## Products, one token at a time",
        "",
        f"Bytes of packed weight per second, as a share of what plain reading of memory reaches in the same run "
        f"({found['instructions']}; medians of ratios of neighbours). Inputs are rounded to 16 bits, or to "
        f"8 on request.",
    ]
    for shape in shapes:
        here = [row for row in lines if tuple(row["shape"]) == shape and row["threads"] == most]
        bars(
            [row["codec"] for row in here],
            {f"{bits}-bit inputs": [row["share_of_reading"][f"int{bits}"] for row in here] for bits in (16, 8)},
            "share of the speed of reading memory",
            marks=[row["aim"] for row in here],
        )
        place = save(f"kernels-{shape[0]}x{shape[1]}")
        text += ["", f"![{shape[0]} x {shape[1]}, {most} threads]({place})", ""]
        text += [f"{shape[0]} × {shape[1]}, {most} threads; black strokes are aims.", ""]
        text += ["| codec | bits a weight | GB/s | share | share, 8-bit inputs | times torch's bf16 `linear` |"]
        text += ["|---|---|---|---|---|---|"]
        for row in here:
            share = row["share_of_reading"]
            text.append(
                f"| `{row['codec']}` | {row['bits']:.2f} | {row['bytes_per_second']['int16'] / 1e9:.1f} "
                f"| {share['int16']:.2f} | {share['int8']:.2f} | {row['times_bf16_linear']['int16']:.1f} |"
            )
    return text


def decode(found: dict[str, Any]) -> list[str]:
    """The section about whole models."""
    titles = {"small": "SmolLM2-135M", "big": "a Llama of 1.1 billion random weights"}
    text = ["## Whole models, one text at a time", ""]
    text += [f"Tokens per second with {found['threads']} threads, everything run in turns; medians."]
    for part, title in titles.items():
        if part not in found:
            continue
        rows = {name: one["median"] for name, one in found[part].items() if isinstance(one, dict) and "median" in one}
        rows = dict(sorted(rows.items(), key=lambda item: -item[1]))
        bars(list(rows), {"tokens/s": list(rows.values())}, "tokens per second")
        text += ["", f"![{title}]({save(f'decode-{part}')})", "", f"### {title}", ""]
        text += ["| | tokens/s |", "|---|---|", *(f"| {name} | {value:.1f} |" for name, value in rows.items())]
        for name, value in found[part].get("ratios", {}).items():
            both = f"`int4:g32` over {name}" if part == "small" else f"{name} over llama.cpp Q4_0"
            text += ["", f"Ratio of {both}: {value:.2f} (median of neighbours)."]
        for name, value in found[part].get("ratios to 4 bits", {}).items():
            if value != 1:
                text += ["", f"Ratio of {name} over tersor int4:g32: {value:.2f} (median of neighbours)."]
        for name, one in found[part].get("agreement", {}).items():
            text += [
                "",
                f"Greedy tokens of `{name}` on ten prompts: {one['same']} of {one['tokens']} are the likeliest of",
            ]
            behind = ", ".join(f"{value:.1e}" for value in one["behind"])
            others = f"; the others are behind by {behind} standard deviations of the logits." if behind else "."
            text += [f"the decoded weights in float32, run by transformers{others}"]
        if "memory" in found[part]:
            memory = found[part]["memory"]
            text += [
                "",
                f"Memory: {memory['peak'] / 1e6:.0f} MB resident at most, which is torch alone "
                f"({memory['torch_alone'] / 1e6:.0f} MB), the file ({memory['weights_file'] / 1e6:.0f} MB) and "
                f"{memory['above_torch_and_weights'] / 1e6:.0f} MB, keys and values included. When the artifact is "
                f"run for the first time, the last is {memory['above_them_the_first_time'] / 1e6:.0f} MB.",
            ]
    return text


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "tersor"
    text = [
        "# Speed",
        "",
        "Written by `benchmarks/speed_page.py` from benchmarks/results; see `make bench-kernels` and",
    ]
    text += ["`make bench-decode`.", ""]
    for name, section in (("kernels", kernels), ("decode", decode)):
        path = HERE / "results" / f"{name}.json"
        if path.exists():
            text += [*section(json.loads(path.read_text())), ""]
    (DOCS / "speed.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
