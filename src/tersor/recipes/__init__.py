"""The weight-quantization literature as recipes: each a choice of codec, solver and preparation, with its claims.

A new one is a call of :func:`recipe`, here, in an installed package or in a file of the user's own.
"""

from tersor.recipes.fit import fullest, grouped, integer, largest, rate, with_low_rank, with_outliers
from tersor.recipes.recipe import Claim, NothingFits, Paper, Prepared, Recipe
from tersor.recipes.registry import chosen, load_file, recipe, recipes

__all__ = [
    "Claim",
    "NothingFits",
    "Paper",
    "Prepared",
    "Recipe",
    "chosen",
    "fullest",
    "grouped",
    "integer",
    "largest",
    "load_file",
    "rate",
    "recipe",
    "recipes",
    "with_low_rank",
    "with_outliers",
]
