"""All recipes by name, made of the tables' rows."""

from __future__ import annotations

import difflib
from functools import cache
from typing import Any

from vtc.errors import OptionError
from vtc.recipes.data import Table, data
from vtc.recipes.row import Number, Recipe, Result


def names() -> tuple[str, ...]:
    """Names of all recipes, in the order of methods."""
    return tuple(_all())


def recipe(name: str) -> Recipe:
    """A published row's settings and numbers, by a name such as `"fastv-llava1.5-64"`: the method,
    the model and the budget as tables call it.

    Raises:
        OptionError: there is no such row.
    """
    found = _all()
    if not isinstance(name, str) or name not in found:
        near = difflib.get_close_matches(str(name).casefold(), found, n=3, cutoff=0.5)
        did = f"did you mean {' or '.join(near)}? " if near else ""
        raise OptionError(
            f"recipe {name!r} is unknown, expected METHOD-MODEL-BUDGET such as fastv-llava1.5-64: "
            f"{did}`vtc recipe` lists all {len(found)}"
        )
    return found[name]


@cache
def _all() -> dict[str, Recipe]:
    """All rows of all tables, those of one method, model and budget together."""
    known = data()
    found: dict[tuple[str, str, str], list[Result]] = {}
    for table in known.tables:
        for budget, method, *cells in table.rows:
            key = (method, table.model, str(budget))
            found.setdefault(key, []).append(_result(table, cells))
    recipes = {}
    for (method, model, budget), results in sorted(found.items(), key=_order):
        slug = budget.replace("%", "pct").replace("=", "")
        name = f"{method}-{known.models[model].slug}-{slug}"
        setting = known.settings[method, model]
        recipes[name] = Recipe(name, known.models[model], budget, setting, tuple(results))
    return recipes


def _order(entry: tuple[tuple[str, str, str], Any]) -> tuple[str, int, float, str]:
    """By method, by model as they stand, most tokens first."""
    method, model, budget = entry[0]
    amount = budget.rstrip("%")
    most = -float(amount) if amount.replace(".", "").isdecimal() else 0.0
    return method, list(data().models).index(model), most, budget


def _result(table: Table, cells: list[Any]) -> Result:
    full = table.full or ("-",) * len(table.columns)
    numbers = tuple(
        Number(name, cell, table.units.get(name, table.unit), None if of == "-" else of)
        for name, cell, of in zip(table.columns, cells, full, strict=True)
        if cell != "-"
    )
    return Result(data().lineages[table.lineage], numbers, table.notes)
