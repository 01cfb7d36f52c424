"""The widget without a browser: its controls are set, what it shows is read."""

from __future__ import annotations

import asyncio
import io
import sys
from base64 import b64decode
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtc
from vtc import testbed, widget
from vtc.errors import InputError, OptionError

pytest.importorskip("ipywidgets", reason="needs the notebook extra")
# ipywidgets asks for a kernel's comm package, which says what it finds
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def loaded() -> Any:
    folder = testbed.model_folder("llava")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def scene() -> testbed.Example:
    return testbed.examples(1, kinds=["color"])[0]


def explore(loaded: Any, scene: testbed.Example, *methods: Any, **more: Any) -> widget.Explorer:
    chosen = list(methods) or ["vtc_cls", "random"]
    return widget.explore(
        *loaded, scene.image, scene.question, methods=chosen, max_new_tokens=4, **more
    )


def colored(explorer: widget.Explorer) -> float:
    """The share of pixels that are not gray."""
    pixels = np.asarray(Image.open(io.BytesIO(explorer.picture.value)).convert("RGB"), np.int64)
    return float((np.ptp(pixels, axis=-1) > 8).mean())


def test_dragging_keep_makes_tokens_vanish(loaded: Any, scene: testbed.Example) -> None:
    explorer = explore(loaded, scene)
    shares = []
    for keep in reversed(widget.KEEPS):
        explorer.keep.value = keep
        shares.append(colored(explorer))
        n = max(1, int(keep * 196 + 0.5))
        assert f"{n} of 196" in explorer.status.value
    assert shares == sorted(shares, reverse=True) and shares[0] > 2 * shares[-1]


def test_the_answer_is_that_of_the_patched_model(loaded: Any, scene: testbed.Example) -> None:
    explorer = explore(loaded, scene)
    for method in explorer.method.options:
        explorer.method.value = method[1]
        explorer.keep.value = 0.02
        expected = explorer._asked.compressed(method[1], 0.02)
        assert f">{expected.answer}  " in explorer.status.value
        assert explorer.picture.value == expected.picture
    explorer.keep.value = 1.0
    assert f">{scene.answer}  " in explorer.status.value and "as with all" in explorer.status.value


def test_each_answer_is_computed_once(loaded: Any, scene: testbed.Example, monkeypatch) -> None:
    explorer = explore(loaded, scene)
    calls = []
    stock = loaded[0].generate
    monkeypatch.setattr(loaded[0], "generate", lambda **k: calls.append(1) or stock(**k))
    for keep in (0.5, 0.11, 0.5, 0.11, widget.START):
        explorer.keep.value = keep
    assert len(calls) == 2


def test_nothing_is_computed_while_the_slider_moves(
    loaded: Any, scene: testbed.Example, monkeypatch
) -> None:
    monkeypatch.setattr(widget, "REST", 0.05)
    explorer = explore(loaded, scene)
    calls = []
    stock = loaded[0].generate
    monkeypatch.setattr(loaded[0], "generate", lambda **k: calls.append(1) or stock(**k))

    async def drag() -> None:
        for keep in (0.33, 0.5, 0.7, 1.0):
            explorer.keep.value = keep
            assert not calls and "…" in explorer.status.value
            await asyncio.sleep(0)
        before = explorer.picture.value
        explorer.keep.value = widget.START  # known already: shown at once
        assert not calls and "22 %" in explorer.status.value
        explorer.keep.value = 0.11
        assert explorer.picture.value == before
        for _ in range(100):
            await asyncio.sleep(0.02)
            if calls:
                return

    asyncio.run(drag())
    assert len(calls) == 1 and "11 %" in explorer.status.value


def test_the_model_is_stock_between_answers(loaded: Any, scene: testbed.Example) -> None:
    explorer = explore(loaded, scene)
    with pytest.raises(vtc.errors.PatchError):
        vtc.unpatch(loaded[0])
    with vtc.patch(loaded[0], "none", 1.0):
        explorer.keep.value = 0.08
        assert "PatchError" in explorer.status.value and "unpatch" in explorer.status.value
    explorer.refresh()
    assert "PatchError" not in explorer.status.value and "16 of 196" in explorer.status.value


def test_what_is_refused_is_shown_and_the_widget_goes_on(
    loaded: Any, scene: testbed.Example
) -> None:
    # this model is 256 wide
    explorer = explore(loaded, scene, vtc.method("var", dims=(5000,)), "vtc_cls")
    assert "Error: " in explorer.status.value and "dims=(5000,)" in explorer.status.value
    assert explorer.keep.disabled
    explorer.method.value = explorer.method.options[1][1]
    assert "43 of 196" in explorer.status.value and not explorer.keep.disabled


def test_methods_over_layers_show_their_layers(loaded: Any, scene: testbed.Example) -> None:
    explorer = explore(loaded, scene, "ima_skip", "random")
    alone = Image.open(io.BytesIO(explorer.picture.value)).height
    assert explorer.keep.disabled and "decoder layer" in explorer.status.value
    explorer.method.value = explorer.method.options[1][1]
    assert Image.open(io.BytesIO(explorer.picture.value)).height < alone


def test_all_methods_are_offered_and_two_of_a_name_are_told_apart(
    loaded: Any, scene: testbed.Example
) -> None:
    by_default = widget.explore(*loaded, scene.image, scene.question)
    assert [label for label, _ in by_default.method.options] == list(vtc.methods())
    two = explore(loaded, scene, vtc.method("todre"), vtc.method("todre", objective="k_center"))
    labels = [label for label, _ in two.method.options]
    assert len(set(labels)) == 2 and "k_center" in labels[1]


def test_evidence_is_outlined(loaded: Any, scene: testbed.Example) -> None:
    plain, boxed = explore(loaded, scene), explore(loaded, scene, evidence=scene.evidence)
    assert plain.picture.value != boxed.picture.value


def test_a_viewer_without_a_kernel_gets_a_picture(loaded: Any, scene: testbed.Example) -> None:
    bundle = explore(loaded, scene)._repr_mimebundle_()
    assert Image.open(io.BytesIO(b64decode(bundle["image/png"]))).width >= 500
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_html_in_a_question_stays_text(loaded: Any, scene: testbed.Example) -> None:
    shown = widget.explore(*loaded, scene.image, "<i>what</i> color?", methods=["random"])
    assert "&lt;i&gt;what" in shown.view.children[0].value


def test_wrong_arguments_say_what_is_wrong(loaded: Any, scene: testbed.Example) -> None:
    with pytest.raises(OptionError, match="'nothing' is unknown"):
        explore(loaded, scene, "nothing")
    with pytest.raises(OptionError, match="at least one"):
        widget.explore(*loaded, scene.image, scene.question, methods=[])
    with pytest.raises(InputError, match="special tokens"):
        widget.explore(*loaded, scene.image, "what is <image> here?")


def test_without_ipywidgets_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(vtc.VtcError, match=r"\[notebook\]"):
        widget._ipywidgets()
