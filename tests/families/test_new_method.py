"""A method of forty lines in a file of its own goes through everything that the others do."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from tests.families import test_matrix_forward as forwards
from tests.families import test_matrix_generate as generates
from tests.families import test_matrix_positions as positions
from tests.families import test_matrix_properties as properties
from tests.families import test_matrix_turns as turns
from tests.kit.matrix import FULL, MODES, Spec, specs_of
from tests.kit.models import FAMILIES
from tests.methods import test_universal as universal
from vtc.methods import registry

SOURCE = '''
"""Tokens whose features are long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import vtc
from vtc.scorers import Scorer
from vtc.selectors import Selector, TopK
from vtc.types import Tokens


@dataclass(frozen=True)
class Norm(Scorer):
    """L2 norm of each token."""

    name: ClassVar[str] = "norm"

    def __call__(self, tokens: Tokens) -> Tensor:
        """`[G, N]`."""
        return tokens.features.float().norm(dim=-1)


@vtc.register
@dataclass(frozen=True, kw_only=True)
class Longest(vtc.Method):
    """Keeps the longest tokens."""

    name: ClassVar[str] = "longest"
    summary: ClassVar[str] = "baseline: the longest tokens"

    def default_scorer(self) -> Scorer:
        return Norm()

    def default_selector(self) -> Selector:
        return TopK()
'''


@pytest.fixture
def longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spec]:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    path = tmp_path / "longest.py"
    path.write_text(SOURCE)
    spec: Any = importlib.util.spec_from_file_location("longest", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "longest", module)
    spec.loader.exec_module(module)
    (made,) = specs_of("longest")
    yield made


def test_it_is_short_and_gone_afterwards(longest: Spec) -> None:
    assert len(SOURCE.strip().splitlines()) <= 40
    assert vtc.methods()["longest"] == "baseline: the longest tokens"


def test_nothing_of_it_is_left() -> None:
    assert "longest" not in vtc.methods()


def test_what_holds_for_every_method(longest: Spec, llava: Any, make_inputs: Any) -> None:
    name = longest.name
    universal.test_kept_are_ascending_unique_valid_and_counted(name=name)
    universal.test_same_seed_same_result(name)
    universal.test_public_facts_are_declared(name)
    for keep in universal.KEEPS:
        universal.test_a_group_decides_as_it_would_alone(name, keep)
    for filler in (0.0, 1e9, float("nan")):
        universal.test_padding_changes_nothing(name, filler)
    for policy in ("keep", "renumber", "median", "published"):
        universal.test_every_position_policy_runs_and_batch_rows_equal_rows_alone(
            llava, make_inputs, name, policy
        )


@pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")
@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in FULL else (pytest.mark.slow,)) for f in FAMILIES],
)
def test_what_holds_in_every_family(longest: Spec, family: str) -> None:
    for mode in MODES:
        generates.test_generate_equals_the_oracle(family, longest, mode)
    forwards.test_forward_equals_the_oracle(family, longest)
    turns.compare(family, longest, "a new image", "whole conversation")
    positions.test_renumbered_positions(family, longest)
    properties.test_keeping_everything_is_bit_identical(family, longest)
    properties.test_a_row_of_a_batch_equals_the_row_alone(family, longest)
    properties.test_same_seed_same_result_and_counts_as_asked(family, longest)


def test_it_keeps_the_longest(longest: Spec, llava: Any, make_inputs: Any) -> None:
    inputs = make_inputs([[4, None, 5]])
    with torch.no_grad():
        (features,) = llava.get_image_features(inputs["pixel_values"]).pooler_output
    with vtc.patch(llava, "longest", 9) as handle:
        llava.generate(**inputs, max_new_tokens=1)
    assert (
        handle.selections[0].keep[0].tolist() == features.norm(dim=-1).topk(9)[1].sort()[0].tolist()
    )
