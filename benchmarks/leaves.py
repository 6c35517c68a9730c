"""What each leaf codec loses on a unit Gaussian, against what theory or its paper says, and against Shannon's bound.

Every bit that is stored counts: codes, scales, tables. ``gap`` is the rate wasted, ``R + 0.5 log2(MSE)`` bits a weight
(0 at the bound); a tenth of a bit is 15 % of error. Weights are rounded by themselves: independent weights leave error
feedback nothing to do. Trellises are run by its solver all the same, which then only refits their scales. The sample
is brought to unit power, which takes out most of its own error; the standard error that is left comes from the spread
over rows.

A leaf is in order when its error is at most 1 % above the reference's, at the reference's rate; ceilings have no
tolerance. Scales of groups adapt to the sample, which references for an endless row do not know: errors below the
reference are no mistake. Lines go to the result file one by one, and those that are there are not measured again.

    python benchmarks/leaves.py [--only trellis] [--again] [--table] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from leaf_references import TEXTS, reference
from torch import Tensor

from tersor.codecs import parse
from tersor.contracts import Gram
from tersor.solvers import Encoder, ErrorFeedback, Nearest

TOLERANCE = 0.01
ROWS, COLUMNS = 768, 1152
FIELDS = ("codec", "bits", "MSE", "±", "Shannon", "gap", "reference", "of it", "source", "verdict")


def sample(rows: int, columns: int) -> Tensor:
    """Independent Gaussian weights ``(rows, columns)`` of unit power."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight / weight.square().mean().sqrt()


def measure(text: str, weight: Tensor) -> dict[str, Any]:
    """One line of the results."""
    codec = parse(text)
    if not codec.accepts((weight.shape[0], weight.shape[1])):
        weight = weight[:, : weight.shape[1] // 256 * 256].contiguous()  # blocks of 256 columns
    shape = (weight.shape[0], weight.shape[1])
    feedback = text.startswith("trellis")
    encoder = Encoder(ErrorFeedback() if feedback else Nearest())
    began = time.process_time()
    tensors, values = encoder(weight, codec, Gram(torch.eye(shape[1]), 1) if feedback else None)
    seconds = time.process_time() - began
    assert codec.bits(shape) == 8 * sum(tensor.nbytes for tensor in tensors.values())
    error = (weight - values).square().double()
    mse, rate = float(error.mean()), codec.bits(shape) / weight.numel()
    gap = rate + 0.5 * math.log2(mse)
    row = {"codec": text, "shape": shape, "bits": rate, "mse": mse, "gap": gap}
    row["mse_error"] = float(error.mean(1).std()) / math.sqrt(shape[0])
    row["weights_per_second"] = weight.numel() / max(seconds, 1e-9)
    return row | judged(text, row)


def judged(text: str, row: dict[str, Any]) -> dict[str, Any]:
    """What a line's error is compared with, and how that goes."""
    known = reference(text)
    if known is None:
        return {"verdict": "no reference"}
    wanted = known.mse if known.gap is None else 4.0 ** (known.gap - row["bits"])
    ratio = row["mse"] / wanted
    verdict = "ok" if ratio <= 1 + (0 if known.ceiling else TOLERANCE) else "misses"
    return {"reference": wanted, "ratio": ratio, "source": known.source, "verdict": verdict}


def cells(row: dict[str, Any]) -> list[str]:
    """A line for people."""
    known = "reference" in row
    return [
        f"`{row['codec']}`",
        f"{row['bits']:.3f}",
        f"{row['mse']:.3g}" if row["mse"] < 1e-3 else f"{row['mse']:.5f}",
        f"{100 * row['mse_error'] / row['mse']:.2f} %",
        f"{4.0 ** -row['bits']:.5f}",
        f"{row['gap']:.3f}",
        (f"{row['reference']:.3g}" if row["reference"] < 1e-3 else f"{row['reference']:.5f}") if known else "",
        f"{row['ratio']:.3f}" if known else "",
        row.get("source", ""),
        row["verdict"],
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """All lines as a table."""
    lines = [list(FIELDS), ["---"] * len(FIELDS), *(cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The result file."""
    summary = {"torch": torch.__version__, "codecs": rows}
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is missing; print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only codecs whose text begins with this")
    parser.add_argument("--again", action="store_true", help="measure those too that are in the result file")
    parser.add_argument(
        "--table", action="store_true", help="judge the result file anew and print it as a table; measure nothing"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "leaves.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text())["codecs"] if options.out.exists() else []
    done = {row["codec"]: row for row in rows}
    if options.table:
        judged_anew = [done[text] | judged(text, done[text]) for text in TEXTS if text in done]
        write(options.out, judged_anew)
        sys.stdout.write(markdown(judged_anew))
        return
    weight = sample(ROWS, COLUMNS)
    for text in TEXTS:
        if text.startswith(options.only) and (options.again or text not in done):
            done[text] = measure(text, weight)
            write(options.out, [done[text] for text in TEXTS if text in done])
            sys.stdout.write("  ".join(cells(done[text])) + f"  {done[text]['weights_per_second'] / 1e6:.2f} M/s\n")
            sys.stdout.flush()
    rows = [done[text] for text in TEXTS if text in done]
    missed = [row["codec"] for row in rows if row["verdict"] == "misses"]
    sys.stdout.write(f"{len(rows)} codecs measured; above their reference: {', '.join(missed) or 'none'}\n")


if __name__ == "__main__":
    main()
