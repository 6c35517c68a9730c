"""A page of documentation for each recipe, from the recipe itself and what a survey found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tersor.errors import BadInput
from tersor.recipes import Recipe
from tersor.survey.records import Outcome
from tersor.survey.verdicts import Verdict


def recipe_page(
    recipe: Recipe, outcomes: Sequence[Outcome], verdicts: Sequence[Verdict], setting: Mapping[str, str]
) -> str:
    """The page of one recipe as Markdown. ``setting``: what the figures were measured on."""
    lines = [
        f"# {recipe.name}",
        "",
        recipe.summary,
        "",
        f"Paper: {_cited(recipe)}.",
        "",
        f"How ours differs: {recipe.differs}",
    ]
    own = sorted((one for one in outcomes if one.recipe == recipe.name), key=lambda one: one.bits)
    if own:
        lines += ["", "## Measured", "", *(f"- {name}: {value}" for name, value in setting.items()), ""]
        lines += [
            "| bits | bits per weight | KL | output error | processor seconds | codecs |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(one) for one in own]
        told = recipe.codecs_told()
        lines += ["", f"The codecs are those {told}."] if told else []
    judged = [one for one in verdicts if one.recipe == recipe.name]
    if judged:
        lines += ["", "## Claims", "", "| claim | bits | against | ratio at equal bytes | must be below | verdict |"]
        lines += ["|---|---|---|---|---|---|", *(_claim(one) for one in judged)]
    lines += ["", "Written by `tersor survey --docs`.", ""]
    return "\n".join(lines)


def _row(one: Outcome) -> str:
    codecs = ", ".join(f"`{text}`" for text in one.codecs)
    if one.kl is None or one.kl_error is None:
        return f"| {one.bits:g} | {one.status}: {one.error} | | | | {codecs} |"
    error = "" if one.output_error is None else f"{one.output_error:.4f}"
    seconds = "" if one.seconds is None else f"{one.seconds:.0f}"
    return f"| {one.bits:g} | {one.rate:.3f} | {one.kl:.4f} ± {one.kl_error:.4f} | {error} | {seconds} | {codecs} |"


def _claim(one: Verdict) -> str:
    found = one.why if one.ratio is None else f"{one.ratio:.3f} ({one.low:.3f} to {one.high:.3f})"
    return f"| {one.claim.sentence} | {one.bits:g} | {one.claim.against} | {found} | {one.claim.ratio:g} | {one.word} |"


def _cited(recipe: Recipe) -> str:
    return recipe.paper.title + (f", arXiv:{recipe.paper.arxiv}" if recipe.paper.arxiv else "")


def index_page(recipes: Mapping[str, Recipe], verdicts: Sequence[Verdict], setting: Mapping[str, str]) -> str:
    """The page that leads to all others, as Markdown: what each recipe is, and how its claims fared."""
    lines = ["# Recipes", "", *(f"- {name}: {value}" for name, value in setting.items()), ""]
    lines += ["| recipe | what it does | paper | claims that hold, fail, are undecided |", "|---|---|---|---|"]
    for name, recipe in sorted(recipes.items()):
        words = [one.word for one in verdicts if one.recipe == name]
        counts = ", ".join(str(words.count(word)) for word in ("holds", "fails", "undecided")) if words else ""
        lines.append(f"| [{name}]({name}.md) | {recipe.summary} | {_cited(recipe)} | {counts} |")
    return "\n".join([*lines, "", "Written by `tersor survey --docs`.", ""])


def write_manual(
    folder: Path,
    recipes: Mapping[str, Recipe],
    outcomes: Sequence[Outcome],
    verdicts: Sequence[Verdict],
    setting: Mapping[str, str],
) -> None:
    """``<folder>/<name>.md`` for every recipe, and ``index.md``. Raises BadInput when they cannot be written."""
    pages = {name: recipe_page(recipe, outcomes, verdicts, setting) for name, recipe in recipes.items()}
    pages["index"] = index_page(recipes, verdicts, setting)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, page in pages.items():
            partial = folder / f"{name}.md.partial"
            partial.write_text(page, encoding="utf-8")
            os.replace(partial, folder / f"{name}.md")
    except OSError as error:
        raise BadInput(f"The pages cannot be written to {folder}: {error.strerror}; give another --docs.") from error
