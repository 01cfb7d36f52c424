"""Rows of published tables: their settings, built exactly, and their numbers with their lineage.

`tables.toml` holds the numbers, `settings.toml` how each method is built for them, `models.toml`
the models. Nothing is read before it is asked for.
"""

from vtc.recipes.index import names, recipe
from vtc.recipes.row import Number, Recipe, Result

__all__ = ["Number", "Recipe", "Result", "names", "recipe"]
