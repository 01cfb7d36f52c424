"""Which cells a sweep has: every method, budget, policy and seed once, with all baselines."""

from collections import Counter

import pytest

from vtc.errors import OptionError
from vtc.evaluation.cells import BASELINES, Cell, distinct, left_out, plan, settings
from vtc.evaluation.config import SweepConfig

pytestmark = pytest.mark.eval


def cells(**changes):
    return plan(SweepConfig(**changes))


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


def test_a_baseline_with_options_stands_for_none():
    given = ("random:selector=uniform", "downsample:selector=grid_pool")
    found = {cell.label for cell in cells(methods=given, keeps=(0.5,))}
    assert found == {*given, *BASELINES, "none"}


@pytest.mark.parametrize(
    "twice",
    [
        {"keeps": (0.5, 0.50, 8)},
        {"seeds": (0, 0)},
        {"positions": ("keep", "keep")},
        {"methods": ("vtc_cls:start=8,ensemble=max", "vtc_cls: ensemble=max,start=8")},
    ],
)
def test_what_is_asked_for_twice_is_run_once(twice):
    once = {name: values[:1] + values[2:] for name, values in twice.items()}
    assert cells(**twice) == cells(**once)


def test_everything_is_the_full_model_and_one_token_is_not():
    assert [c.method for c in cells(keeps=(1.0,))] == ["none"]
    assert {c.keep for c in cells(keeps=(1.0, 1))} == {1.0}
    assert {type(c.keep) for c in cells(keeps=(1,)) if c.method != "none"} == {int}


def test_methods_over_layers_take_shares_only_and_one_policy():
    found = cells(methods=("vtc_cls", "shortv"), keeps=(64, 0.5, 0.25))
    keeps = {name: [c.keep for c in found if c.method == name] for name in ("vtc_cls", "shortv")}
    assert keeps == {"vtc_cls": [64, 64, 0.5, 0.5, 0.25, 0.25], "shortv": [0.5, 0.25]}
    assert {c.positions for c in found if c.method == "shortv"} == {"keep"}
    config = SweepConfig(methods=("vtc_cls", "shortv", "var"), keeps=(64, 8, 0.5))
    (note,) = left_out(config)
    assert note.startswith("shortv: not run at keep=64tok, 8tok, because")


def test_methods_over_layers_have_shares_of_their_own():
    found = cells(methods=("shortv", "vtc_cls"), keeps=(64,), layer_keeps=(0.75, 0.5))
    assert [c.keep for c in found if c.method == "shortv"] == [0.75, 0.5]
    assert {c.keep for c in found if c.method == "vtc_cls"} == {64}
    assert left_out(SweepConfig(keeps=(64,), layer_keeps=(0.75,))) == []


def test_tokens_alone_are_refused_for_a_method_over_layers():
    with pytest.raises(OptionError, match=r"keeps=\(64, 8\) are tokens, expected a float"):
        cells(methods=("naavit",), keeps=(64, 8))


@pytest.mark.parametrize(
    "method",
    ["var", "sink_removal", "sink_removal:mode=mask", "ima_skip", "naavit:layers=(0,2)"],
)
def test_methods_that_decide_by_themselves_run_once(method):
    found = [c for c in cells(methods=(method,)) if c.label == method]
    assert [(c.keep, c.positions, c.seed) for c in found] == [(None, "keep", 0)]


def test_compositions_run_under_all_policies_if_they_drop_tokens_before_the_llm():
    found = cells(methods=("vtc_cls@0.5+shortv@0.5", "sink_removal+shortv@0.5"))
    policies = {c.method: [] for c in found}
    for c in found:
        policies[c.method].append((c.keep, c.positions))
    assert policies["vtc_cls@0.5+shortv@0.5"] == [(None, "keep"), (None, "renumber")]
    assert policies["sink_removal+shortv@0.5"] == [(None, "keep")]


def test_everything_is_the_full_model_only_where_the_method_leaves_it_alone():
    found = cells(methods=("shortv", "yopo", "yopo:heads=1.0,window=None"), keeps=(1.0, 0.5))
    kept = [(c.label, c.keep) for c in found if c.method in ("shortv", "yopo")]
    # neighbors and heads are changed in all layers too
    assert kept == [
        ("shortv", 0.5),
        ("yopo", 1.0),
        ("yopo", 0.5),
        ("yopo:heads=1.0,window=None", 0.5),
    ]


def test_layers_chosen_at_random_are_run_with_every_seed():
    found = cells(methods=("shortv", "shortv:scorer=random"), keeps=(0.5,), seeds=(3, 4))
    seeds = [(c.label, c.seed) for c in found if c.method == "shortv"]
    assert seeds == [("shortv", 3), ("shortv:scorer=random", 3), ("shortv:scorer=random", 4)]


def test_shares_that_come_to_the_same_layers_are_run_once():
    found = cells(methods=("shortv", "vtc_cls", "yopo"), positions=("keep",), seeds=(0,))
    left, notes = distinct(found, 6)
    keeps = {n: [c.keep for c in left if c.method == n] for n in ("shortv", "vtc_cls", "yopo")}
    assert keeps["shortv"] == [0.5, 0.33, 0.22]
    assert keeps["vtc_cls"] == [0.5, 0.33, 0.22, 0.11, 0.055]
    assert keeps["yopo"] == [1.0, 0.5, 0.33, 0.22]
    assert notes[0] == "shortv: keep=0.11, 0.055 not run, the same as keep=0.22 (1 of 6 layers)"
    assert distinct(found, 1000) == (found, [])


def test_another_calibration_is_another_cell(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("{}")
    config = SweepConfig(methods=(f"shortv:calibration='{file}'",), keeps=(0.5,))
    (cell,) = [Cell("m", "t", c) for c in plan(config) if c.method == "shortv"]
    before = settings(config, cell)
    file.write_text("{ }")
    assert settings(config, cell) != before
    assert "calibrations" not in settings(config, Cell("m", "t", plan(config)[0]))


@pytest.mark.parametrize(
    "changes",
    [{"questions": 3}, {"batch_size": 3}, {"metric": "f1"}, {"out": "b"}, {"workers": 3}],
)
def test_a_cell_is_named_by_what_its_answers_depend_on(changes):
    config, cell = SweepConfig(), Cell("m", "t", plan(SweepConfig())[0])
    same = settings(SweepConfig(**changes), cell) == settings(config, cell)
    assert same == (changes.keys() <= {"out", "workers"})
    for other in (Cell("n", "t", cell.compression), Cell("m", "u", cell.compression)):
        assert settings(config, other) != settings(config, cell)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("nope",)}, "'nope' is unknown"),
        ({"methods": ()}, r"methods=\(\): expected at least one"),
        ({"methods": "vtc_cls"}, "methods='vtc_cls': expected at least one, in a tuple"),
        ({"keeps": (0.5, 1.5)}, "out of range"),
        ({"positions": ("up",)}, "positions='up' is unknown"),
        ({"layer_keeps": ()}, r"layer_keeps=\(\): expected at least one"),
        ({"layer_keeps": (0.5, 3)}, "got 3, expected floats in"),
        ({"layer_keeps": (1.5,)}, "out of range"),
        ({"questions": 0}, "questions=0: expected at least 1"),
        ({"timed_samples": -1}, "timed_samples=-1: expected at least 0"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(OptionError, match=message):
        cells(**changes)
