"""The files of this folder, read once and checked."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_type_hints

from huggingface_hub.dataclasses import type_validator

from vtc.errors import VtcError
from vtc.methods.base import Positions
from vtc.methods.registry import methods
from vtc.sites import Facts

Counts = Literal["llm_input", "layer_mean", "last", "schedule", "content"]
_NONE = "-"
_Kind = TypeVar("_Kind")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that tables are about.

    Attributes:
        slug: what it is called in a recipe's name.
        title: in words.
        id: of its checkpoint for transformers.
        type: `model_type` of its configuration.
        tokens: visual tokens of an image in tables whose budgets are numbers of tokens; None:
            there are none, or they do not say.
        layers: decoder layers.
        llm: `model_type` of the LLM's.
        width: hidden size of the LLM.
        kv_heads: key/value heads of a decoder layer.
        encoder: blocks of the vision encoder.
        tap: the block whose output the LLM reads.
        cls: whether the encoder has a [CLS].
        patches: that become one LLM token.
        tiled: whether an image may be several crops.
        first_cut: the first decoder layer after which tokens can be dropped.
        deviates: what is not as in those tables, whatever the method.
    """

    slug: str
    title: str
    id: str
    type: str
    llm: str
    tokens: int | None = None
    layers: int
    width: int
    kv_heads: int
    encoder: int
    tap: int
    cls: bool
    patches: int
    tiled: bool
    first_cut: int
    deviates: tuple[str, ...] = ()

    @property
    def facts(self) -> Facts:
        """What a method may know about it."""
        return Facts(
            encoder_depth=self.encoder,
            tap=self.tap,
            has_cls=self.cls,
            patches_per_token=self.patches,
            tiled=self.tiled,
            llm_depth=self.layers,
            first_layer_cut=self.first_cut,
            llm_width=self.width,
            llm_kind=self.llm,
            llm_kv_heads=self.kv_heads,
            projects=self.type in ("llava", "llava_next"),
        )


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where numbers are from: those of two lineages do not compare.

    Attributes:
        key: a short name.
        title: the paper, or whose table it is.
        kind: who ran what, as far as it is recorded.
    """

    key: str
    title: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a method is built for rows of tables; see `settings.toml`."""

    method: str
    models: tuple[str, ...]
    counts: Counts
    keep: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    positions: Positions = "published"
    places: tuple[str, ...] = ()
    follows: str = ""
    deviates: tuple[str, ...] = ()
    unstated: tuple[str, ...] = ()
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers of one lineage on one model, in one unit but for some columns.

    Attributes:
        lineage: its key.
        model: its key.
        unit: of all columns but those of `units`.
        units: of single columns.
        notes: what to know about columns.
        columns: names of benchmarks, averages and times.
        full: the full model's numbers in that order, `"-"` where they are not given.
        rows: budget, method and numbers.
    """

    lineage: str
    model: str
    unit: str
    units: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...]
    full: tuple[Any, ...] = ()
    rows: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Data:
    """All files.

    Attributes:
        models: by key.
        lineages: by key.
        tasks: lmms-eval's, by column; empty where it asks a paid service.
        settings: by method and model.
        tables: in order.
    """

    models: dict[str, Model]
    lineages: dict[str, Lineage]
    tasks: dict[str, str]
    settings: dict[tuple[str, str], Setting]
    tables: tuple[Table, ...]


@cache
def data() -> Data:
    """The files as they are installed."""
    folder = Path(__file__).parent
    read = {n: tomllib.loads((folder / n).read_text("utf-8")) for n in _FILES}
    return checked(*read.values())


_FILES = ("models.toml", "settings.toml", "tables.toml")


def checked(models: Any, settings: Any, tables: Any) -> Data:
    """The contents of the three files, as data.

    Raises:
        VtcError: something is missing, unknown, there twice, of a wrong type or never used.
    """
    file, table_file = _FILES[1:]
    by_pair: dict[tuple[str, str], Setting] = {}
    for i, entry in enumerate(settings["setting"], 1):
        setting = _made(Setting, entry, f"{file}: setting {i}")
        for model in setting.models:
            if (pair := (setting.method, model)) in by_pair:
                _wrong(f"{file}: setting {i}", f"{pair} a second time", "it once")
            by_pair[pair] = setting
    found = Data(
        models={k: _made(Model, v, f"{_FILES[0]}: {k}") for k, v in models.items()},
        lineages={
            k: _made(Lineage, {**v, "key": k}, f"{table_file}: lineage {k}")
            for k, v in tables["lineage"].items()
        },
        tasks=dict(tables["tasks"]),
        settings=by_pair,
        tables=tuple(
            _made(Table, v, f"{table_file}: table {i}") for i, v in enumerate(tables["table"], 1)
        ),
    )
    used = set()
    for i, table in enumerate(found.tables, 1):
        used |= _check_table(found, table, f"{table_file}: table {i}")
    if unused := sorted({*found.settings} - used):
        _wrong(file, f"a setting for {unused[0]}, of which there is no row", "one row or more")
    return found


def _made(kind: type[_Kind], entry: Mapping[str, Any], where: str) -> _Kind:
    """A dataclass of one entry; lists stand for tuples."""
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted({*entry} - {*known}):
        _wrong(where, f"key {unknown[0]!r}", f"one of {', '.join(known)}")
    for name, f in known.items():
        optional = f.default is not MISSING or f.default_factory is not MISSING
        if name not in entry and not optional:
            _wrong(where, f"no {name}", "it")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    for name, value in values.items():
        try:
            type_validator(name, value, hints[name])
        except TypeError as error:
            _wrong(where, f"{name}={value!r}", " ".join(str(error).split()))
    return kind(**values)


def _check_table(found: Data, table: Table, where: str) -> set[tuple[str, str]]:
    """The pairs of method and model of its rows; raises where it does not fit the rest."""
    for name, known in (("lineage", found.lineages), ("model", found.models)):
        if (key := getattr(table, name)) not in known:
            _wrong(where, f"{name} {key!r}", f"one of {', '.join(known)}")
    if strange := sorted({*table.units} - {*table.columns}):
        _wrong(where, f"a unit of {strange[0]!r}", f"one of its columns {table.columns}")
    _check_numbers(table.full or (_NONE,) * len(table.columns), table, f"{where}: full")
    pairs, seen = set(), set()
    for row in table.rows:
        of = f"{where}: row {row}"
        if len(row) < 2 or not isinstance(row[0], int | str) or row[1] not in methods():
            _wrong(of, f"{row[:2]}", "a budget and a registered method")
        if tuple(row[:2]) in seen:
            _wrong(of, f"{row[:2]} a second time", "it once")
        seen.add(tuple(row[:2]))
        _check_numbers(row[2:], table, of)
        if (pair := (row[1], table.model)) not in found.settings:
            _wrong(of, f"no setting of {pair}", f"one in {_FILES[1]}")
        if (keeps := found.settings[pair].keep) and str(row[0]) not in keeps:
            _wrong(of, f"no keep for {row[0]}", f"one in {_FILES[1]}, which has {sorted(keeps)}")
        pairs.add(pair)
    return pairs


def _check_numbers(cells: Sequence[Any], table: Table, where: str) -> None:
    if len(cells) != len(table.columns):
        _wrong(where, f"{len(cells)} numbers", f"{len(table.columns)}, one for each column")
    for cell in cells:
        if cell != _NONE and (isinstance(cell, bool) or not isinstance(cell, int | float)):
            _wrong(where, f"{cell!r}", f"a number or {_NONE!r}")


def _wrong(where: str, got: str, expected: str) -> NoReturn:
    raise VtcError(f"{where}: got {got}, expected {expected}: correct that file")
