"""Arguments of a run: refused before a model is loaded, and written so that nothing is lost."""

import pytest

import vtc
from vtc.errors import OptionError
from vtc.evaluation.compression import Compression, parse_method


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
    [("vtc_cls", {}), ("vtc_cls:start=8", {"start": 8}), ("vtc_cls:ensemble=max,start=-2", None)],
)
def test_a_label_reads_back_as_the_method(text, options):
    name, found = parse_method(text)
    cell = Compression(name, 0.5, options=found)
    assert options is None or found == options
    assert cell.label == text
    assert cell.build() == vtc.method(name, **found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vtc_cls:start", "expected option=value"),
        ("vtc_cls:start=x", "expected int"),
        ("vtc_cls:stop=8", "has no option 'stop'"),
        ("nope", "is unknown"),
    ],
)
def test_a_method_that_does_not_read(text, message):
    with pytest.raises(OptionError, match=message):
        parse_method(text)
