"""A row of published tables as something that can be built and cited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from vtc.adapters.registry import adapter_of
from vtc.errors import OptionError, UnsupportedModelError
from vtc.methods.base import Method, Positions
from vtc.methods.layer_cuts import LayerCuts
from vtc.methods.registry import method as build_method
from vtc.recipes.data import Lineage, Model, Setting, data
from vtc.runtime.handle import Handle, patch
from vtc.runtime.tower import facts_of
from vtc.sites import Facts
from vtc.types import Budget

_RUNNING = ("fast", "kernels", "seed")
_SPAN = ("first", "last", "tokens")
COUNTS = {
    "llm_input": "tokens of an image that reach the LLM",
    "layer_mean": "tokens of an image, averaged over decoder layers",
    "last": "tokens of an image left behind the cut in the LLM",
    "schedule": "the name of a published schedule",
    "content": "the method's own affair",
}


@dataclass(frozen=True)
class Number:
    """A published number.

    Attributes:
        benchmark: of what.
        value: the number.
        unit: its unit.
        full: the full model's in the same table; None: not given.
    """

    benchmark: str
    value: float
    unit: str
    full: float | None


@dataclass(frozen=True)
class Result:
    """What one lineage published about a row.

    Attributes:
        lineage: whose numbers they are; those of two lineages do not compare.
        numbers: benchmark by benchmark.
        notes: what to know about them.
    """

    lineage: Lineage
    numbers: tuple[Number, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """The settings of a published row, and its numbers.

    Attributes:
        name: method, model and budget.
        model: the model of the row.
        budget: as the table calls it: tokens (`"64"`), a share (`"11.1%"`) or an option.
        setting: how the method is built.
        results: the published numbers, one for each lineage and unit.
    """

    name: str
    model: Model
    budget: str
    setting: Setting
    results: tuple[Result, ...]

    @property
    def method(self) -> str:
        """The method's registered name."""
        return self.setting.method

    @property
    def options(self) -> Mapping[str, Any]:
        """The method's options, as they were published."""
        return self.setting.options

    @property
    def positions(self) -> Positions:
        """The policy of position ids."""
        return self.setting.positions

    @property
    def keep(self) -> float | int | None:
        """What `vtc.patch` is given for the budget; None: the method decides."""
        if self.setting.counts == "content":
            return None
        if self.setting.keep:
            return self.setting.keep[self.budget]
        # 33.3 / 100 is not 0.333
        share = self.budget.endswith("%")
        return round(float(self.budget[:-1]) / 100, 6) if share else int(self.budget)

    @property
    def deviates(self) -> tuple[str, ...]:
        """Where this library does otherwise than what was published."""
        return (*self.setting.deviates, *(self.model.deviates if self.tokens else ()))

    @property
    def tokens(self) -> int | None:
        """Visual tokens of an image in the row's table; None: they differ, or it does not say."""
        return self.model.tokens if self.budget.isdecimal() else None

    def build(self, **places: Any) -> Method:
        """The method with its options; `places` are those that say where files lie.

        Raises:
            OptionError: the row's settings cannot be built, or an option is not a place.
        """
        if self.setting.refused:
            raise OptionError(f"recipe {self.name!r} cannot be built: {self.setting.refused}")
        if strange := sorted({*places} - {*self.setting.places}):
            allowed = (*_RUNNING, *self.setting.places)
            raise OptionError(
                f"recipe {self.name!r} got {strange[0]!r}, expected nothing but "
                f"{', '.join(allowed)}: its settings are those of the published row; call "
                "vtc.patch for others"
            )
        return build_method(self.method, **{**self.options, **places})

    def patch(self, model: nn.Module, **more: Any) -> Handle:
        """`vtc.patch` with exactly these settings.

        Args:
            model: the model of the row, or one fine-tuned from it.
            **more: `fast`, `kernels` and `seed` of `vtc.patch`, and options that say where files
                lie.

        Raises:
            OptionError: the row's settings cannot be built, or an option is not one of those.
            UnsupportedModelError: a model of another family or size.
        """
        running = {name: more.pop(name) for name in _RUNNING if name in more}
        method = self.build(**more)
        self.check(model)
        return patch(model, method, self.keep, positions=self.positions, **running)

    def check(self, model: nn.Module) -> None:
        """Raise `UnsupportedModelError` unless the model is of the row's family and size."""
        adapter = adapter_of(model)
        got = _shape(str(adapter.model.config.model_type), facts_of(adapter))
        wanted = _shape(self.model.type, self.model.facts)
        if got != wanted:
            raise UnsupportedModelError(
                f"recipe {self.name!r} got a model of {got}, expected {self.model.title} "
                f"({wanted}), {self.model.id}: its numbers are of that model; call vtc.patch with "
                "the settings that `vtc recipe` prints to use them on another"
            )

    def spans(self) -> list[tuple[int, int, int]]:
        """Of an image of as many tokens as tables count, how many decoder layers see: first layer,
        last layer, tokens. Empty where the method does not cut there, or cannot be built."""
        method = None if self.setting.refused else self.build()
        n, keep = self.tokens, self.keep
        if n is None or keep is None or not isinstance(method, LayerCuts):
            return []
        facts = self.model.facts
        ends = [0, *(cut + 1 for cut in method.cuts(facts)), facts.llm_depth]
        counts = (n, *method.wanted(n, Budget.of(keep), facts))
        return [
            (a, b - 1, count) for (a, b), count in zip(pairwise(ends), counts, strict=True) if b > a
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it in words and numbers, for JSON."""
        built = not self.setting.refused
        return {
            "name": self.name,
            "model": {"id": self.model.id, "title": self.model.title, "tokens": self.tokens},
            "budget": {
                "published": self.budget,
                "counts": self.setting.counts,
                "means": COUNTS[self.setting.counts],
                "keep_follows": self.setting.follows,
            },
            "method": self.method,
            "options": dict(self.options),
            "keep": self.keep if built else None,
            "positions": self.positions,
            "tokens_by_layer": [dict(zip(_SPAN, span, strict=True)) for span in self.spans()],
            "call": self.call if built else None,
            "command": self.command if built else None,
            "refused": self.setting.refused,
            "deviates": list(self.deviates),
            "unstated": list(self.setting.unstated),
            "not_in_command": list(self.paid),
            "published": [asdict(result) for result in self.results],
            "bibtex": self.bibtex,
        }

    @property
    def bibtex(self) -> str:
        """How to cite the method; empty for baselines."""
        return build_method(self.method).bibtex.strip()

    @property
    def call(self) -> str:
        """The call of `vtc.patch`, in Python."""
        options = "".join(f", {name}={_python(value)}" for name, value in self.options.items())
        keep = f", {self.keep!r}" if self.keep is not None else ""
        return f'vtc.patch(model, "{self.method}"{keep}, positions="{self.positions}"{options})'

    @property
    def tasks(self) -> tuple[str, ...]:
        """lmms-eval's tasks for the benchmarks that have one."""
        named = [data().tasks.get(name) for name in self.benchmarks]
        return tuple(dict.fromkeys(task for task in named if task))

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """What there are numbers of."""
        return tuple(dict.fromkeys(n.benchmark for r in self.results for n in r.numbers))

    @property
    def paid(self) -> tuple[str, ...]:
        """Benchmarks whose tasks ask a paid service for judgment, so that they are no `tasks`."""
        return tuple(name for name in self.benchmarks if data().tasks.get(name) == "")

    @property
    def command(self) -> str:
        """The command that evaluates it with lmms-eval."""
        keep = self.keep
        written = {
            "pretrained": self.model.id,
            "method": self.method,
            **({} if keep is None else {"keep": f"{keep}tok" if isinstance(keep, int) else keep}),
            "positions": self.positions,
            **self.options,
        }
        arguments = ",".join(f"{name}={value}" for name, value in written.items())
        return (
            f"lmms-eval --model vtc --model_args {arguments} "
            f"--tasks {','.join(self.tasks) or 'pope'} --batch_size 1 --log_samples "
            f"--output_path out/{self.name}"
        )


def _python(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _shape(kind: str, of: Facts) -> str:
    """What tells a model from others of its family, in words."""
    return (
        f"{kind} with {of.llm_kind} of {of.llm_depth} layers, {of.llm_width} wide, "
        f"{of.llm_kv_heads} key/value heads, and {of.encoder_depth} encoder blocks"
    )
