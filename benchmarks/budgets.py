"""Is the budget exact? Weight files for five budgets: never over, and how far under.

Files are really written, with the codecs that `tersor compress` chooses among (and nearest rounding, since only their
size is asked), and their bytes counted on disk.

    python benchmarks/budgets.py --model MODEL_FOLDER --text TEXT [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

from allocation import prepare

from tersor import pipeline
from tersor.artifact import ArtifactWriter
from tersor.codecs import parse
from tersor.stages import curves as curve_stage
from tersor.stages.allocate import Costs, artifact_layout, make_plan
from tersor.stages.encode import encode_model

BUDGETS = (45_000_000, 60_000_000, 80_000_001, 110_000_000, 140_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--evaluation", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("out/bench-budgets"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/budgets.json"))
    arguments = parser.parse_args()
    rows = []
    with pipeline.one_thread_each():
        context, texts = prepare(
            arguments.model, arguments.text, arguments.work, arguments.sequences, arguments.evaluation, "normal"
        )
        records = curve_stage.load_records(context)
        quick = replace(context, options=replace(context.options, solver="nearest", propagate=False))
        for budget in BUDGETS:
            curves = curve_stage.rate_points(context, records, Costs(context.anatomy, budget).layer)
            plan = make_plan(context.anatomy, curves, budget, context.options)
            codecs = {name: parse(choice.codec) for name, choice in plan.layers.items()}
            folder = arguments.work / "budget"
            shutil.rmtree(folder, ignore_errors=True)
            for left in context.work.folder.glob("encode-*"):
                left.unlink()
            with ArtifactWriter(folder, artifact_layout(context.anatomy, codecs), {"benchmark": "budgets"}) as writer:
                encode_model(quick, codecs, writer, texts.calibration.ids[: context.chunk])
                writer.finish()
            size = sum(path.stat().st_size for path in folder.glob("model*.safetensors*"))
            shutil.rmtree(folder)
            rows.append({"budget": budget, "bytes": size, "under": 1 - size / budget})
            print(f"{budget:>12,}  {size:>12,}  {rows[-1]['under']:.4%} under", flush=True)
            assert size == plan.file_bytes
            assert 0 <= rows[-1]["under"] <= 0.005
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
