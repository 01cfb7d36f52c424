"""The front against its definition: what no timed row beats."""

import random

import pytest

from vtc.evaluation.pareto import front, share_of_time

pytestmark = pytest.mark.eval


def row(ratio, accuracy, method="vtc_cls"):
    return {"method": method, "ttft_ratio": ratio, "accuracy": accuracy}


def beats(a, b):
    at_least = share_of_time(a) <= share_of_time(b) and a["accuracy"] >= b["accuracy"]
    return at_least and (share_of_time(a) < share_of_time(b) or a["accuracy"] > b["accuracy"])


@pytest.mark.parametrize("seed", range(8))
def test_the_front_is_what_nothing_beats(seed):
    draw = random.Random(seed)
    rows = [row(draw.randint(1, 12) / 8, draw.randint(0, 9) / 9) for _ in range(40)]
    found = front(rows)
    unbeaten = [r for r in rows if not any(beats(other, r) for other in rows)]
    assert {(r["ttft_ratio"], r["accuracy"]) for r in found} == {
        (r["ttft_ratio"], r["accuracy"]) for r in unbeaten
    }
    assert found == sorted(found, key=share_of_time)
    assert found == sorted(found, key=lambda r: r["accuracy"])


def test_what_was_not_timed_is_not_on_it():
    assert front([row(None, 1.0), row(0.5, 0.2)]) == [row(0.5, 0.2)]
    assert front([row(None, 1.0)]) == []


def test_the_full_model_takes_its_own_time():
    """A lucky measurement of it against itself doesn't make it faster than itself."""
    slower, full = row(0.95, 0.9), row(0.8, 1.0, "none")
    assert share_of_time(full) == 1.0
    assert front([full, slower]) == [slower, full]
