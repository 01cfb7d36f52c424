"""What a sweep runs, checked before anything is loaded; on a command line or in one YAML file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vtc.errors import OptionError
from vtc.evaluation.compression import Compression, parse_method
from vtc.keep import parse_keep
from vtc.types import Budget

KEEPS = (1.0, 0.5, 0.33, 0.22, 0.11, 0.055)
TESTBED_TASK = "vtc_scenes"
_SEVERAL = ("models", "methods", "keeps", "layer_keeps", "positions", "seeds", "tasks")
_LEAST = {"questions": 1, "batch_size": 1, "timed_samples": 0, "pictures": 0, "workers": 1}
# a file and the command line say what is meant in the singular
_WRITTEN = {"models": "model", "keeps": "keep", "layer_keeps": "layer_keep"}


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What to run.

    Args:
        models: folders, hub ids, or `"llava"`, `"qwen2_vl"` and `"internvl"` of the testbed.
        out: folder of results; a second run with it goes on where the first stopped.
        methods: names, `"vtc_cls:start=8"` with options, or compositions, see `parse_method`; the
            baselines are added. Those that decide by themselves how much they keep run once.
        keeps: fractions or tokens per image; everything (1.0) is the full model, run once.
        layer_keeps: shares of decoder layers, for methods that skip work in them; None: the
            fractions among `keeps`. Those that come to the same layers run once.
        positions: policies for `methods` and for `random`; other baselines, and methods that drop
            no token before the LLM, run under the first.
        questions: the first so many of each task; of the testbed's task, so many are made.
        seeds: of `random` and of methods with `scorer=random`; others take the first.
        tasks: lmms-eval tasks.
        include_path: folder of task files; None: the testbed's for its task, else lmms-eval's own.
        metric: the key of a question's score; None: found by itself.
        device: `"cpu"`, `"cuda"`, ...; None: CUDA where there is one.
        dtype: `"auto"`: the checkpoint's on a GPU, float32 on a CPU.
        batch_size: questions per call.
        timed_samples: questions per cell that run once more, alone and with nothing beside them,
            to be timed; the full model is timed on the same ones right before.
        pictures: pictures in the report, the first question of so many kinds.
        workers: processes that answer, on a CPU; None: one for each core where the models are
            small, else one.
        command: shown in the report as the way to run it again.

    Raises:
        OptionError: a value that cannot be; the message starts with its name.
    """

    models: tuple[str, ...] = ("llava",)
    out: Path = Path("out/sweep")
    methods: tuple[str, ...] = ("vtc_cls",)
    keeps: tuple[float | int, ...] = KEEPS
    layer_keeps: tuple[float, ...] | None = None
    positions: tuple[str, ...] = ("keep", "renumber")
    questions: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: tuple[str, ...] = (TESTBED_TASK,)
    include_path: Path | None = None
    metric: str | None = None
    device: str | None = None
    dtype: str = "auto"
    batch_size: int = 16
    timed_samples: int = 12
    pictures: int = 4
    workers: int | None = None
    command: str = ""

    # pydantic looks for it under this name
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    def __post_init__(self) -> None:
        for name in _SEVERAL:
            if (value := getattr(self, name)) is None and name == "layer_keeps":
                continue
            if isinstance(value, str) or not tuple(value):
                raise OptionError(f"{name}={value!r}: expected at least one, in a tuple")
            object.__setattr__(self, name, tuple(value))
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise OptionError(f"{name}={value}: expected at least {least}")
        _each(self, "methods", parse_method)
        _each(self, "keeps", Budget.of)
        _each(self, "layer_keeps", _share)
        _each(self, "positions", lambda policy: Compression("none", positions=policy))
        object.__setattr__(self, "out", Path(self.out))
        if self.include_path is not None:
            object.__setattr__(self, "include_path", Path(self.include_path))

    @property
    def model(self) -> str:
        """The first model."""
        return self.models[0]


def _each(config: SweepConfig, name: str, check: Callable[[Any], Any]) -> None:
    for value in getattr(config, name) or ():
        try:
            check(value)
        except OptionError as error:
            raise OptionError(f"{name}: {error}") from None


def _share(keep: Any) -> None:
    if not isinstance(Budget.of(keep).keep, float):
        raise OptionError(
            f"got {keep!r}, expected floats in (0, 1], the share of decoder layers in which visual "
            "rows stay active"
        )


def read_config(file: Path) -> SweepConfig:
    """The settings in a YAML file, under the names of the command line's options.

    `model`, `methods`, `keep`, `layer-keep`, `positions`, `questions`, ...; a dash or an underscore
    between words; a list, or a single value for one.

    Raises:
        OptionError: the file cannot be read, holds something else, an unknown key, or a value of
            the wrong type or out of range; the message names the file and the key.
    """
    return _validated(file, _settings(file))


def _settings(file: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{file}: cannot be read as YAML ({reason})") from None
    if not isinstance(found, dict):
        raise OptionError(
            f"{file}: got {type(found).__name__}, expected `key: value` lines such as `keep: [0.5]`"
        )
    fields = {_WRITTEN.get(f.name, f.name): f.name for f in dataclasses.fields(SweepConfig)}
    settings: dict[str, Any] = {}
    for key, value in found.items():
        name = fields.get(str(key).replace("-", "_"))
        if name is None or name == "command":
            known = ", ".join(key.replace("_", "-") for key in fields if key != "command")
            raise OptionError(f"{file}: key {key!r} is unknown, expected one of {known}")
        if name in settings:
            raise OptionError(f"{file}: key {key!r} is there twice, expected it once")
        settings[name] = _as_list(file, key, name, value) if name in _SEVERAL else value
    return settings


def _as_list(file: Path, key: str, name: str, value: Any) -> Any:
    """One value is a list of one; budgets are read as on a command line."""
    values = value if isinstance(value, list) or value is None else [value]
    if name not in ("keeps", "layer_keeps") or values is None:
        return values
    try:
        return [parse_keep(v if isinstance(v, float) else str(v)) for v in values]
    except OptionError as error:
        raise OptionError(f"{file}: key {key!r}: {error}") from None


def _validated(file: Path, settings: Mapping[str, Any]) -> SweepConfig:
    from pydantic import TypeAdapter, ValidationError

    try:
        # JSON has neither tuples nor paths, so lists and texts are taken for them, and nothing else
        return TypeAdapter(SweepConfig).validate_json(json.dumps(settings), strict=True)
    except TypeError as error:
        raise OptionError(f"{file}: {error}, expected numbers, texts and lists") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        raise OptionError(f"{file}: {first['ctx']['error']}")
    name = str(first["loc"][0])
    key = _WRITTEN.get(name, name).replace("_", "-")
    message = first["msg"][0].lower() + first["msg"][1:]
    raise OptionError(f"{file}: key {key!r}: got {first['input']!r}, {message}")
