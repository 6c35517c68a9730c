"""Every recipe on the reference model at equal bytes: the table, and the verdict on every claim.

Runs ``tersor survey``, which goes on from the results that are there, those in ``benchmarks/results/survey.sqlite`` at
first; leaves the database and ``survey.md`` beside it, and a page for each recipe in ``docs/recipes``.

    python benchmarks/survey.py --model MODEL_FOLDER [--workers 2] [--recipes rtn,gptq]
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tersor import api
from tersor.survey.records import Outcome
from tersor.survey.run import DATABASE
from tersor.survey.verdicts import Verdict

RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "survey.sqlite"
BITS = (2.0, 3.0, 4.0)
ELSEWHERE = {8.0: ("rf8", "e5m2", "e4m3", "per-tensor", "bct"), 1.5: ("ptq161", "ptq161-rows", "pb-llm")}
"""Rates that the claims of a few recipes are about."""


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A row for each recipe, those with the least KL at 3 bits first; what was skipped is left empty."""
    measured = {(one.recipe, one.bits): one for one in outcomes if one.status == "measured" and one.kl is not None}

    def order(name: str) -> tuple[float, ...]:
        rates = (3.0, 4.0, 2.0)
        return next((rate, measured[name, rate].kl or 0.0) for rate in rates if (name, rate) in measured)

    names = sorted({name for name, bits in measured if bits in BITS}, key=order)
    lines = [
        "| recipe |" + "".join(f" bits | KL at {bits:g} | s |" for bits in BITS),
        "|---|" + "---|---|---|" * len(BITS),
    ]
    for name in names:
        cells = ""
        for bits in BITS:
            one = measured.get((name, bits))
            cells += (
                "  |  |  |"
                if one is None
                else f" {one.rate:.2f} | {one.kl:.3g} ± {one.kl_error:.2g} | {one.seconds:.0f} |"
            )
        lines.append(f"| {name} |{cells}")
    return lines


def claims(found: Sequence[Verdict], word: str) -> list[str]:
    """The claims with one verdict, with their numbers."""
    lines = ["| recipe | bits | claim | against | ratio at equal bytes | must be below |", "|---|---|---|---|---|---|"]
    for one in found:
        if one.word == word:
            ratio = f"{one.ratio:.3g} ({one.low:.3g} to {one.high:.3g})"
            cells = one.recipe, f"{one.bits:g}", one.claim.sentence, one.claim.against, ratio, f"{one.claim.ratio:g}"
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(outcomes: Sequence[Outcome], judged: Sequence[Verdict], text: str) -> str:
    """``survey.md``. ``text``: what was calibrated on and measured with."""
    counts = Counter(one.word for one in judged)
    tested = sum(counts[word] for word in ("holds", "fails", "undecided"))
    waiting = [f"{one.recipe} at {one.bits:g} bits ({one.why})" for one in judged if one.word == "untested"]
    lines = [
        "# Survey of the re-gauged SmolLM2-135M-Instruct (benchmarks/reference_model.py)",
        "",
        text,
        "",
        f"Of {tested} claims tested {counts['holds']} hold ({counts['holds'] / max(tested, 1):.0%}), "
        f"{counts['fails']} fail and {counts['undecided']} are undecided; {counts['untested']} were not tested.",
        "",
        "KL in nats a token with its standard error; the bits count all side information; s: of processor time.",
        "",
        *table(outcomes),
        "",
        "## Claims that fail",
        "",
        *claims(judged, "fails"),
        "",
        "## Undecided",
        "",
        *claims(judged, "undecided"),
    ]
    if waiting:
        lines += ["", "## Not tested", "", *(f"- {line}" for line in waiting)]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/reference"))
    parser.add_argument("--work", type=Path, default=Path("out/survey"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--recipes", help="some of them, by name; the tables have all that were ever measured")
    parser.add_argument("--docs", type=Path, default=Path("docs/recipes"))
    given = parser.parse_args()
    database = given.work / DATABASE
    if not database.exists() and KEPT.exists():
        given.work.mkdir(parents=True, exist_ok=True)
        shutil.copy(KEPT, database)
    names = given.recipes.split(",") if given.recipes else None
    # Results of all runs lie in one database, so that the last run writes the pages of all.
    runs = [(bits, [name for name in found if names is None or name in names]) for bits, found in ELSEWHERE.items()]
    for rates, wanted in [*(((bits,), found) for bits, found in runs if found), (BITS, names)]:
        surveyed = api.survey(
            given.model,
            given.work,
            bits=rates,
            recipes=wanted,
            processes=given.workers,
            docs=given.docs if names is None and wanted is None else None,
            told=lambda one: print(f"{one.recipe} at {one.bits:g} bits: {one.status}", flush=True),
        )
        shutil.copy(database, KEPT)
    text = "\n".join(f"- {name}: {value}" for name, value in surveyed.setting.items() if name != "Model")
    (RESULTS / "survey.md").write_text(page(surveyed.outcomes, surveyed.verdicts, text))
    print((RESULTS / "survey.md").read_text())


if __name__ == "__main__":
    main()
