"""What the report says in words, on rows made by hand where the truth is plain."""

import pytest

from vtc.evaluation import findings, table

pytestmark = pytest.mark.eval

N = 40


def right(count):
    return [1.0] * count + [0.0] * (N - count)


@pytest.fixture
def said(samples_frame):
    """Both lists of sentences for scores by (method, positions, keep, seed)."""

    def read(cells):
        frame = samples_frame({("none", "keep", None, 0): right(36), **cells})
        summary = table.tables(frame)[1]
        return findings.losses(frame, summary), findings.bends(frame, summary)

    return read


def test_a_method_that_wins_everywhere_gives_no_sentence(said):
    losses, bends = said(
        {
            ("vtc_cls", "keep", 0.5, 0): right(34),
            ("vtc_cls", "keep", 0.1, 0): right(30),
            ("random", "keep", 0.5, 0): right(30),
            ("random", "keep", 0.1, 0): right(20),
        }
    )
    assert losses == bends == []


def test_random_and_downsample_that_score_higher_are_named_with_every_budget(said):
    losses, _ = said(
        {
            ("vtc_cls", "keep", 0.5, 0): right(20),
            ("vtc_cls", "keep", 0.1, 0): right(19),
            ("random", "keep", 0.5, 0): right(30),
            ("random", "keep", 0.1, 0): right(20),
            ("downsample", "keep", 0.1, 0): right(10),
        }
    )
    ours, other = losses
    assert ours.startswith("random (keep) scores higher than vtc_cls (keep): +25.0 points [")
    assert "at keep=0.5; +2.5 points [" in ours
    # one answer of 40 is within any interval
    assert ours.endswith(", within its interval at keep=0.1")
    assert other.startswith("random (keep) scores higher than downsample (keep): +25.0 points [")


def test_methods_are_compared_under_the_same_policy(said):
    losses, _ = said(
        {
            ("vtc_cls", "keep", 0.5, 0): right(30),
            ("vtc_cls", "renumber", 0.5, 0): right(20),
            ("random", "keep", 0.5, 0): right(25),
            ("random", "renumber", 0.5, 0): right(15),
        }
    )
    assert losses == []


def test_seeds_are_averaged(said):
    losses, _ = said(
        {
            ("vtc_cls", "keep", 0.5, 0): right(20),
            ("random", "keep", 0.5, 0): right(30),
            ("random", "keep", 0.5, 1): right(18),
        }
    )
    (line,) = losses
    assert line.startswith(
        "random (keep, mean of 2 seeds) scores higher than vtc_cls (keep): +10.0"
    )


def test_a_curve_that_rises_beyond_its_interval_is_named(said):
    _, bends = said(
        {
            ("vtc_cls", "keep", 0.5, 0): right(10),
            ("vtc_cls", "keep", 0.1, 0): right(30),
            ("uniform", "keep", 0.5, 0): right(29),
            ("uniform", "keep", 0.1, 0): right(30),
        }
    )
    (line,) = bends
    assert line.startswith("vtc_cls (keep) rises from 50.0 % to 10.0 % of the tokens: +50.0 points")


def test_a_curve_that_rises_above_the_full_model_is_named(said):
    _, bends = said({("uniform", "keep", 0.5, 0): right(40)})
    (line,) = bends
    assert line.startswith("uniform (keep) rises from 100.0 % to 50.0 % of the tokens: +10.0")
