"""Is a measured allocation worth it? KL of allocated plans against uniform integer plans of exactly the same bytes.

Same model, text, statistics, solver and run for both sides, and integers on both (what trellises add is measured
elsewhere); embedding, head, scales and headers are in the bytes. Two questions are asked. At 3, 4 and 5 bits per weight
overall, what does the best uniform plan within that budget lose, and what an allocated one? And, with --bits, at the
very sizes of uniform plans of so many bits, where those are at their best? In both, several uniform plans are tried and
the one with the least KL is the one to beat; the others are reported too. Results are kept in the work folder as they
come, so an interrupted benchmark continues.

    python benchmarks/allocation.py --model MODEL_FOLDER --text TEXT [--bits 3,4,5] [--out RESULT.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tersor import pipeline
from tersor.artifact import ArtifactWriter
from tersor.codecs import parse
from tersor.contracts import Plan, RatePoint
from tersor.stages import curves as curve_stage
from tersor.stages import finish
from tersor.stages.allocate import Costs, artifact_layout, make_plan, plan_from_points
from tersor.stages.context import Context
from tersor.stages.encode import encode_model
from tersor.stages.options import Budget, EffortName, Options
from tersor.stages.sensitivity import measure_sensitivity
from tersor.stages.text import Texts, prepare_texts
from tersor.stages.work import Work

FORMS = ("g64", "g64:s8", "g32:s8", "g32:asym:s8")


def uniform(context: Context, text: str) -> Plan:
    """Every layer, embedding included, in one integer codec."""
    points = {layer.name: RatePoint(0, 0.0, text) for layer in context.anatomy.layers}
    plan = plan_from_points(context.anatomy, points, 0)
    return replace(plan, budget=plan.file_bytes)


def fitting(context: Context, budget: int, tries: int) -> dict[str, Plan]:
    """The ``tries`` largest uniform integer plans that fit ``budget``, over bits, group sizes and zero points."""
    widths = {layer.shape[1] for layer in context.anatomy.layers}
    texts = [
        f"int{bits}:g{group}{zero}:s8"
        for bits in range(1, 9)
        for group in (12, 16, 24, 32, 48, 64)
        for zero in ("", ":asym")
        if all(width % group == 0 for width in widths)
    ]
    plans = {text: uniform(context, text) for text in texts}
    within = sorted((text for text in texts if plans[text].file_bytes <= budget), key=lambda t: -plans[t].file_bytes)
    return {text: plans[text] for text in within[:tries]}


def measure(context: Context, texts: Texts, plan: Plan, folder: Path) -> Mapping[str, Any]:
    """Encode a plan, open what was written, measure it, throw it away."""
    shutil.rmtree(folder, ignore_errors=True)
    # What a resumed run would take over from the one before; here that was another plan.
    for left in [*context.work.folder.glob("encode-*"), *context.work.folder.glob("quality.json")]:
        left.unlink()
    codecs = {name: parse(choice.codec) for name, choice in plan.layers.items()}
    began = time.perf_counter()
    with ArtifactWriter(folder, artifact_layout(context.anatomy, codecs), {"benchmark": "allocation"}) as writer:
        encode_model(context, codecs, writer, texts.calibration.ids)
        units = {layer.name: dict(writer.record(layer.name)) for layer in context.anatomy.layers}
        writer.finish()
    seconds = time.perf_counter() - began
    finish.write_folder(context, folder, plan, codecs, units, texts)
    quality = finish.verify(context, folder, plan, texts)
    shutil.rmtree(folder)
    return {
        "bytes": plan.file_bytes,
        "bpw": 8 * plan.file_bytes / context.anatomy.parameters,
        "kl": quality.kl,
        "kl_error": quality.kl_error,
        "perplexity": quality.perplexity,
        "reference_perplexity": quality.reference_perplexity,
        "top1": quality.top1,
        "predicted": plan.predicted,
        "seconds": seconds,
    }


def prepare(
    model: Path, text: Path, work: Path, sequences: int, evaluation: int, effort: EffortName = "fast"
) -> tuple[Context, Texts]:
    """Statistics of the model, once for all plans; calibration from the text's first half, quality on the second."""
    work.mkdir(parents=True, exist_ok=True)
    content = text.read_text()
    half = content.index("\n", len(content) // 2)
    (work / "first.txt").write_text(content[:half])
    (work / "second.txt").write_text(content[half:])
    options = Options(
        Budget("bpw", 4.0),
        text=str(work / "first.txt"),
        eval_text=str(work / "second.txt"),
        sequences=sequences,
        eval_sequences=evaluation,
        length=512,
        samples=0,
        effort=effort,
    )
    context = replace(pipeline.light_context(model, options), work=Work(work / "run"))
    context.work.begin({"model": context.source.fingerprint(), "options": options.identity()})
    texts = prepare_texts(context.source, options, cache=work, workers=context.workers, progress=context.progress)
    measure_sensitivity(context, texts.calibration.ids)
    curve_stage.measure_curves(context, texts.calibration.ids)
    return context, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--overall", default="3,4,5", help="budgets in bits per weight, everything included")
    parser.add_argument("--tries", type=int, default=2, help="uniform plans tried for each of them, the largest first")
    parser.add_argument("--bits", default="", help="integer widths whose own sizes are compared too")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--evaluation", type=int, default=12)
    parser.add_argument("--work", type=Path, default=Path("out/bench-allocation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/allocation.json"))
    arguments = parser.parse_args()
    with pipeline.one_thread_each():
        context, texts = prepare(
            arguments.model, arguments.text, arguments.work, arguments.sequences, arguments.evaluation
        )
        kept = arguments.work / "results.json"
        results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}

        def once(name: str, plan: Plan) -> Mapping[str, Any]:
            if name not in results:
                results[name] = measure(context, texts, plan, arguments.work / "artifact")
                kept.write_text(json.dumps(results, indent=1))
            row = results[name]
            print(
                f"{name:<34} {row['bytes']:>12,} B {row['bpw']:6.3f} bpw  KL {row['kl']:.4f} ± {row['kl_error']:.4f}",
                flush=True,
            )
            return row

        table = []
        records = curve_stage.load_records(context)

        def allocated(budget: int) -> Mapping[str, Any]:
            costs = Costs(context.anatomy, budget)
            curves = curve_stage.rate_points(context, records, costs.layer)
            row = once(f"allocated at {budget}", make_plan(context.anatomy, curves, budget, context.options))
            assert row["bytes"] <= budget
            return row

        def compare(title: str, plans: Mapping[str, Plan], budget: int | None) -> None:
            rows = {name: once(f"uniform {name}", plan) for name, plan in plans.items()}
            best = min(rows, key=lambda name: rows[name]["kl"])
            ours = allocated(plans[best].file_bytes if budget is None else budget)
            ratio = ours["kl"] / rows[best]["kl"]
            errors = [row["kl_error"] / row["kl"] for row in (ours, rows[best])]
            spread = ratio * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
            print(f"  {title}: best uniform {best}, allocated / uniform = {ratio:.3f} ± {spread:.3f}", flush=True)
            table.append(
                {"case": title, "best": best, "uniform": rows, "allocated": ours, "ratio": ratio, "error": spread}
            )

        for bits in map(float, arguments.overall.split(",") if arguments.overall else []):
            budget = int(bits * context.anatomy.parameters / 8)
            compare(f"{bits:g} bits per weight overall", fitting(context, budget, arguments.tries), budget)
        for bits in arguments.bits.split(",") if arguments.bits else []:
            plans = {f"int{bits}:{form}": uniform(context, f"int{bits}:{form}") for form in arguments.forms.split(",")}
            compare(f"the bytes of the best int{bits} plan", plans, None)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    summary = {
        "model": "re-gauged SmolLM2-135M-Instruct (benchmarks/reference_model.py)",
        "text": arguments.text.name,
        "calibration_tokens": texts.calibration.tokens,
        "evaluation_tokens": texts.evaluation.tokens,
        "solver": context.options.solver,
        "rows": table,
    }
    arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
