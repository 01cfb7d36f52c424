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
    # one answer of 40 says nothing
    assert "], p=0.00" in ours and ours.endswith("p=1.000 after Holm at keep=0.1")
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


def test_one_question_has_a_difference_and_no_interval(samples_frame):
    cells = {
        ("none", "keep", None, 0): [1.0],
        ("vtc_cls", "keep", 0.5, 0): [0.0],
        ("ima_skip", "keep", None, 0): [0.0],
        ("random", "keep", 0.5, 0): [1.0],
    }
    frame = samples_frame(cells)
    ours, free = findings.losses(frame, table.tables(frame)[1])
    assert ours.endswith("vtc_cls (keep): +100.0 points [n/a], p=1.000 after Holm at keep=0.5")
    assert "+100.0 points [n/a] at 50.0 % active tokens" in free


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


def test_layers_are_compared_with_random_layers_and_with_as_few_active_tokens(said):
    losses, _ = said(
        {
            ("shortv", "keep", 0.5, 0): right(20),
            ("shortv", "keep", 0.25, 0): right(12),
            ("shortv:scorer=random", "keep", 0.5, 0): right(22),
            ("shortv:scorer=random", "keep", 0.25, 0): right(8),
            # more active tokens, then as many, then fewer: the first says nothing
            ("random", "keep", 0.6, 0): right(35),
            ("random", "keep", 0.5, 0): right(10),
            ("random", "keep", 0.2, 0): right(18),
            ("downsample", "keep", 0.25, 0): right(14),
        }
    )
    of_shortv = [line for line in losses if "higher than shortv (keep)" in line]
    layers, tokens, smaller = of_shortv
    assert tokens.startswith("random (keep) scores") and smaller.startswith("downsample (keep)")
    assert layers.startswith("shortv:scorer=random (keep) scores higher than shortv (keep): +5.0")
    assert layers.endswith("at keep=0.5")
    # as many as at one half score lower, so only the smaller budget is named
    assert tokens.endswith("at 20.0 % active tokens against 25.0 %") and "+15.0 points" in tokens
    assert smaller.endswith("at 25.0 % active tokens against 25.0 %") and "+5.0 points" in smaller


def test_a_method_without_a_budget_is_compared_with_as_few_active_tokens(said):
    losses, _ = said(
        {
            ("ima_skip", "keep", None, 0): right(20),
            ("random", "keep", 0.5, 0): right(30),
        }
    )
    (line,) = losses
    assert line.startswith("random (keep) scores higher than ima_skip (keep): +25.0 points")
    assert line.endswith("at 50.0 % active tokens against 100.0 %")


def test_bends_of_methods_that_keep_all_tokens_are_told_in_active_ones(said):
    _, bends = said(
        {
            ("shortv", "keep", 0.75, 0): right(30),
            ("shortv", "keep", 0.5, 0): right(10),
            ("shortv", "keep", 0.25, 0): right(25),
        }
    )
    (line,) = bends
    assert line.startswith("shortv (keep) rises from 50.0 % to 25.0 % active tokens: +37.5 points")


def test_what_keeps_every_token_active_has_no_step_to_fewer(said):
    assert said({("var", "keep", None, 0): right(40)})[1] == []
