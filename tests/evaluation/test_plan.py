"""Which cells a sweep has: every method, budget, policy and seed once, with all baselines."""

from collections import Counter

import pytest

from vtc.errors import OptionError
from vtc.evaluation.sweep import BASELINES, SweepConfig, plan

pytestmark = pytest.mark.eval


def cells(**changes):
    return plan(SweepConfig(model="m", **changes))


def test_the_default_sweep():
    found = cells()
    assert len({repr(cell) for cell in found}) == len(found) == 56
    assert (found[0].method, found[0].keep) == ("none", 1.0)
    # 5 budgets: × 2 policies, × 3 seeds for random; the other baselines under one policy
    assert Counter(cell.method for cell in found) == {
        "none": 1,
        "vtc_cls": 10,
        "random": 30,
        "uniform": 5,
        "average_pool": 5,
        "downsample": 5,
    }


def test_every_swept_cell_has_random_at_its_keep_and_policy():
    found = cells(methods=("vtc_cls:start=8", "uniform"), keeps=(0.5, 64), seeds=(3, 4))
    random = {(c.keep, c.positions, c.seed) for c in found if c.method == "random"}
    for cell in found:
        if cell.method in ("vtc_cls", "uniform"):
            assert {(cell.keep, cell.positions, seed) for seed in (3, 4)} <= random


def test_baselines_are_always_there_and_never_twice():
    found = cells(methods=("random", "none", "downsample"), keeps=(0.5,), seeds=(0,))
    labels = Counter((cell.method, cell.positions) for cell in found)
    assert set(labels.values()) == {1}
    assert {*BASELINES, "none"} == {cell.method for cell in found}


def test_everything_is_the_full_model_and_one_token_is_not():
    assert [c.method for c in cells(keeps=(1.0,))] == ["none"]
    assert {c.keep for c in cells(keeps=(1.0, 1))} == {1.0}
    assert {type(c.keep) for c in cells(keeps=(1,)) if c.method != "none"} == {int}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("nope",)}, "'nope' is unknown"),
        ({"methods": ()}, r"methods=\(\): expected at least one"),
        ({"methods": "vtc_cls"}, "methods='vtc_cls': expected at least one, in a tuple"),
        ({"keeps": (0.5, 1.5)}, "out of range"),
        ({"positions": ("up",)}, "positions='up' is unknown"),
        ({"questions": 0}, "questions=0: expected at least 1"),
        ({"timed_samples": -1}, "timed_samples=-1: expected at least 0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(OptionError, match=message):
        cells(**changes)
