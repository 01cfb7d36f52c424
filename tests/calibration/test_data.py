"""Calibrations as files, and which one a method gets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtc.calibration import FILE, Activations, Calibration, calibration_of
from vtc.errors import InputError, OptionError, SignalError
from vtc.sites import Facts

FACTS = Facts(6, 4, True, 1, False, 2, llm_heads=3, llm_width=64, llm_kind="llama", llm_kv_heads=3)
WHOLE = Calibration(
    model="tiny",
    layer_contribution=(0.25, math.inf),
    sink_dims=(3, 63),
    head_ratio=((0.1, 0.2, 0.3), (math.inf, 0.0, 1e-9)),
    samples=4,
    source="4 scenes ‖ drawn",
    contribution_error=(0.125, 0.0),
    activations=Activations(
        4.0, (1.0, 2.0), (3, 3), (1.5, 1.0), (0, 1), (7.0, 5.0), (9, 9), (1.0, 0.5), (2.25, 0.0)
    ),
)

numbers = st.floats(0, allow_nan=False)


def rows(draw: Any, depth: int, of: Any) -> Any:
    return tuple(draw(of) for _ in range(depth))


@st.composite
def calibrations(draw: Any) -> Calibration:
    depth, heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    heads_of = st.tuples(*[numbers] * heads)
    return Calibration(
        model=draw(st.text()),
        layer_contribution=draw(st.none() | st.just(rows(draw, depth, numbers))),
        sink_dims=draw(st.none() | st.lists(st.integers(0, 5000), max_size=3).map(tuple)),
        head_ratio=draw(st.none() | st.just(rows(draw, depth, heads_of))),
        samples=draw(st.integers(0, 100)),
        source=draw(st.text()),
    )


@given(calibrations())
def test_a_file_gives_back_what_was_saved(tmp_path_factory: Any, found: Calibration) -> None:
    path = tmp_path_factory.mktemp("saved") / "a.json"
    found.save(path)
    assert Calibration.load(path) == found


def test_infinity_is_null_and_the_rest_plain_json(tmp_path: Path) -> None:
    WHOLE.save(tmp_path / FILE)
    written = (tmp_path / FILE).read_text(encoding="utf-8")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(written, parse_constant=refuse)
    assert found["layer_contribution"] == [0.25, None]
    assert found == json.loads(json.dumps(WHOLE.to_dict()))
    assert Calibration.load(tmp_path / FILE) == Calibration.load(tmp_path) == WHOLE


FAULTS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "is not JSON"),
    "a list": ([1], "holds a list, expected an object"),
    "unknown key": ({"layers": [1.0]}, "key 'layers' is unknown, expected model"),
    "text for numbers": ({"layer_contribution": "high"}, "layer_contribution: got 'high'"),
    "text among numbers": ({"layer_contribution": [1, "x"]}, "layer_contribution: got 'x'"),
    "not a number": ('{"layer_contribution": [NaN]}', "layer_contribution: got nan"),
    "true among numbers": ({"layer_contribution": [True]}, "got True, expected a number"),
    "negative dimension": ({"sink_dims": [-1]}, "sink_dims: got -1, expected a whole number"),
    "half a dimension": ({"sink_dims": [1.5]}, "sink_dims: got 1.5, expected a whole number"),
    "number for a name": ({"model": 3}, "model: got 3, expected text"),
    "lengths": (
        {"layer_contribution": [1, 2], "head_ratio": [[1]]},
        "layer_contribution has 2, head_ratio has 1 layers, expected the same number",
    ),
    "ragged heads": ({"head_ratio": [[1], [1, 2]]}, "rows of [1, 2] heads, expected the same"),
    "part of the activations": ({"activations": {"tau": 8}}, "activations: 'first' is missing"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    given, message = FAULTS[name]
    path = tmp_path / "a.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    with pytest.raises(InputError, match=r"a\.json.*name a file that vtc calibrate wrote") as error:
        Calibration.load(path)
    assert message in str(error.value)


def test_places_that_hold_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there, expected a JSON file"):
        Calibration.load(tmp_path)
    (tmp_path / FILE).mkdir()
    with pytest.raises(InputError, match="is a folder, expected a JSON file"):
        Calibration.load(tmp_path)
    for place in (tmp_path, tmp_path / "gone" / "a.json"):
        with pytest.raises(InputError, match="expected a file in a folder that exists"):
            WHOLE.save(place)


@pytest.mark.parametrize("what", ["layer_contribution", "sink_dims", "head_ratio"])
def test_an_object_a_file_and_a_folder_are_taken(what: str, tmp_path: Path) -> None:
    WHOLE.save(tmp_path / FILE)
    assert calibration_of(WHOLE, FACTS, what) is WHOLE
    for place in (tmp_path, str(tmp_path), tmp_path / FILE, str(tmp_path / FILE)):
        assert calibration_of(place, FACTS, what) == WHOLE
    # beside the weights
    beside = replace(FACTS, name=str(tmp_path))
    assert calibration_of(None, beside, what) == WHOLE


@pytest.mark.parametrize("name", ["", "some/model", "folder"])
def test_without_one_the_error_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    facts = replace(FACTS, name=str(tmp_path) if name == "folder" else name)
    with pytest.raises(SignalError) as error:
        calibration_of(None, facts, "head_ratio")
    told = str(error.value)
    assert "no head_ratio is known for" in told and "(llama, 2 layers of width 64)" in told
    assert f"`vtc calibrate --model {facts.name or 'MODEL'} --what heads ...`" in told
    assert "calibration=" in told


def test_one_without_what_is_asked_for_is_refused() -> None:
    with pytest.raises(SignalError, match="calibration of 'tiny' holds no sink_dims"):
        calibration_of(replace(WHOLE, sink_dims=None), FACTS, "sink_dims")
    nothing = replace(WHOLE, sink_dims=())
    assert calibration_of(nothing, FACTS, "sink_dims") is nothing


UNFIT = {
    "layer_contribution": ({"llm_depth": 3}, "for 2 layers, expected 3 layers"),
    "head_ratio": ({"llm_heads": 4}, "2 layers of 3 heads, expected 2 layers of 4 heads"),
    "sink_dims": ({"llm_width": 63}, "for dimensions [3, 63], expected dimensions below 63"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_one_of_another_model_is_refused(what: str) -> None:
    change, message = UNFIT[what]
    with pytest.raises(SignalError) as error:
        calibration_of(WHOLE, replace(FACTS, **change), what)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_something_else_is_refused() -> None:
    with pytest.raises(OptionError, match=r"calibration=3 is a int, expected a vtc\.Calibration"):
        calibration_of(3, FACTS, "sink_dims")  # type: ignore[arg-type]
