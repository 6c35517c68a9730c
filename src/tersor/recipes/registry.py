"""Which recipes there are: our own, those of installed packages, and those in a file that the user names.

A package adds recipes through the entry-point group ``tersor.recipes``, each entry naming a module that calls
:func:`recipe`. A user's own file does the same and is run because the user names it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from tersor.codecs import parse
from tersor.errors import BadInput
from tersor.recipes.recipe import Recipe

GROUP = "tersor.recipes"
OWN = ("baselines", "scalar", "outliers", "low_rank", "vectors", "stack", "entropy", "columns", "learned", "guided")
"""Modules of this folder, each of which adds its recipes when it is imported; in the order they are listed."""
_RECIPES: dict[str, Recipe] = {}
_FILES: dict[Path, tuple[str, ...]] = {}
_ENTRIES: set[str] = set()


def recipe(**fields: Any) -> Recipe:
    """Make a :class:`Recipe` of its fields and add it, unless this installation lacks a codec that it needs.

    Raises BadInput for a name that is taken.
    """
    made = Recipe(**fields)
    if made.name in _RECIPES:
        raise BadInput(f"There are two recipes called {made.name}; give the second another name.")
    if all(readable(text) for text in made.needs):
        _RECIPES[made.name] = made
    return made


def readable(text: str) -> bool:
    """Whether a codec's text can be read here."""
    try:
        parse(text)
    except BadInput:
        return False
    return True


def recipes() -> dict[str, Recipe]:
    """All recipes by name, those of installed packages included."""
    for name in OWN:
        importlib.import_module(f"tersor.recipes.{name}")
    for entry in metadata.entry_points(group=GROUP):
        if entry.value not in _ENTRIES:
            _ENTRIES.add(entry.value)
            entry.load()
    return dict(_RECIPES)


def load_file(path: Path) -> tuple[str, ...]:
    """Run a Python file that adds recipes; returns their names. Once in a process for each file."""
    path = path.resolve()
    if path not in _FILES:
        if not path.is_file():
            raise BadInput(f"The recipe file {path} does not exist.")
        before = set(recipes())
        spec = importlib.util.spec_from_file_location(f"tersor_recipes_{len(_FILES)}", path)
        if spec is None or spec.loader is None:
            raise BadInput(f"{path} is not a Python file; recipes are written in one that ends in .py.")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up by name while they are made.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        _FILES[path] = tuple(name for name in _RECIPES if name not in before)
    if not _FILES[path]:
        raise BadInput(f"{path} adds no recipe; call tersor.recipes.recipe(name=…, …) in it.")
    return _FILES[path]


def chosen(names: tuple[str, ...] | None) -> dict[str, Recipe]:
    """Recipes by name or from files, in the order asked; all there are when ``names`` is None. Raises BadInput."""
    if names is None:
        return recipes()
    found: dict[str, Recipe] = {}
    for name in names:
        if name.endswith(".py"):
            own = load_file(Path(name))
            found.update({one: _RECIPES[one] for one in own})
            continue
        known = recipes()
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise BadInput(f"There is no recipe {name!r}.{hint} Recipes are {', '.join(known)}.")
        found[name] = known[name]
    return found
