"""Arguments of a run: refused before a model is loaded, and written so that nothing is lost."""

import pytest

import vtc
from vtc.errors import OptionError
from vtc.evaluation.compression import Compression, build, controls, draws, parse_method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nope", "keep": 0.1}, "'nope' is unknown; expected one of"),
        ({"method": "vtc_cls", "keep": 1}, "write 1.0 or 1tok"),
        ({"method": "vtc_cls", "keep": "1"}, "write 1.0 or 1tok"),
        ({"method": "vtc_cls", "keep": 1.5}, "out of range"),
        ({"method": "vtc_cls", "keep": "half"}, "is not a number"),
        ({"method": "vtc_cls"}, "got keep=None, expected how much is kept"),
        ({"method": "none", "keep": 0.5}, "keeps everything and got keep=0.5"),
        ({"method": "vtc_cls", "keep": 0.1, "positions": "up"}, "positions='up' is unknown"),
        ({"method": "random", "keep": 0.1, "seed": 1.5}, "seed=1.5 is a float"),
        ({"method": "random", "keep": 0.1, "seed": True}, "seed=True is a bool"),
        ({"method": "vtc_cls", "keep": 0.1, "options": {"stop": 8}}, "has no option 'stop'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(OptionError) as caught:
        Compression(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "keep"), [("0.11", 0.11), ("64", 64), ("1tok", 1), ("1.0", 1.0), (64, 64)]
)
def test_keep_as_lmms_eval_hands_it_over(given, keep):
    found = Compression("uniform", given).keep
    assert (type(found), found) == (type(keep), keep)


def test_the_full_model_needs_no_keep():
    assert Compression("none").keep == Compression("none", 1.0).keep == 1.0


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("vtc_cls", {}),
        ("vtc_cls:start=8", {"start": 8}),
        ("vtc_cls:ensemble=max,start=-2", None),
        ("naavit:layers=(0,2)", {"layers": (0, 2)}),
        ("naavit:layers=(3,),skip_ffn=True", {"layers": (3,), "skip_ffn": True}),
        (
            "ima_skip:interval=(2,4),operator=attention",
            {"interval": (2, 4), "operator": "attention"},
        ),
        ("ima_skip:interval=None", {"interval": None}),
        ("shortv:scorer=random", {"scorer": "random"}),
        ("shortv:calibration='a (b), c@d+e.json'", {"calibration": "a (b), c@d+e.json"}),
        ("shortv:calibration='None'", {"calibration": "None"}),
        ("shortv:calibration='7'", {"calibration": "7"}),
    ],
)
def test_a_label_reads_back_as_the_method(text, options):
    name, found = parse_method(text)
    adaptive = vtc.method(name, **found).count == "adaptive"
    cell = Compression(name, None if adaptive else 0.5, options=found)
    assert options is None or found == options
    assert cell.label == text
    assert cell.build() == vtc.method(name, **found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vtc_cls:start", "expected option=value"),
        ("naavit:layers=(0,2", "Field 'layers'"),
        ("naavit:layers=0,2", "got '2', expected option=value"),
        ("flowcut@0.5@0.1+todre@0.1", "has 2 keeps, expected at most one"),
        ("flowcut@1+todre@0.1", "write 1.0 or 1tok"),
        ("flowcut@0.1+todre@0.5", "expected at most as much"),
        ("flowcut@0.5+nope@0.1", "'nope' is unknown"),
        ("flowcut@0.5+todre:objective@0.1", "expected option=value"),
        ("flowcut@0.5+none", "leave it out"),
        ("vtc_cls:start=x", "expected int"),
        ("vtc_cls:stop=8", "has no option 'stop'"),
        ("nope", "is unknown"),
    ],
)
def test_a_method_that_does_not_read(text, message):
    with pytest.raises(OptionError, match=message):
        parse_method(text)


def test_a_composition_is_its_stages_each_with_its_keep():
    text = " flowcut@128tok + todre:objective=k_center@64tok + naavit:layers=(0,2)"
    name, options = parse_method(text)
    assert options == {}
    made = Compression(name).build()
    k_center, layers = {"objective": "k_center"}, {"layers": (0, 2)}
    wanted = vtc.compose(("flowcut", 128), ("todre", 64, k_center), ("naavit", None, layers))
    assert made == wanted and repr(made) == repr(wanted)
    assert parse_method(Compression(name).label) == (name, options)


def test_a_composition_takes_no_keep_and_no_options_beside_its_text():
    with pytest.raises(OptionError, match=r"is a composition and got keep=0\.5"):
        Compression("flowcut@0.5+todre@0.1", 0.5)
    with pytest.raises(OptionError, match=r"options \['start'\] were given beside the composition"):
        Compression("vtc_cls@0.5+todre@0.1", options={"start": 8})


def test_one_method_with_its_keep_is_that_method_at_that_keep():
    made = Compression("shortv:scorer=random@0.5").build()
    assert made == vtc.compose(("shortv", 0.5, {"scorer": "random"}))


def test_lists_stand_for_tuples():
    assert Compression("naavit", options={"layers": [0, 2]}).options == {"layers": (0, 2)}


@pytest.mark.parametrize(
    ("method", "options", "labels"),
    [
        ("vtc_cls", {"start": 8}, ("random",)),
        ("flowcut", {}, ("random",)),
        (
            "shortv",
            {},
            ("shortv:scorer=random", "shortv:scorer=random,selector=top_k"),
        ),
        (
            "sink_removal",
            {"tau": 9.0},
            ("sink_removal:scorer=random,tau=9.0",),
        ),
    ],
)
def test_what_chooses_at_random_in_its_place(method, options, labels):
    assert controls(method, options)[: len(labels)] == labels


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("random", True),
        ("vtc_cls", False),
        ("shortv:scorer=random", True),
        ("vtc_cls@0.5+shortv:scorer=random@0.5", True),
        ("vtc_cls@0.5+var", False),
    ],
)
def test_which_methods_the_seed_matters_to(text, drawn):
    assert draws(build(*parse_method(text))) is drawn
