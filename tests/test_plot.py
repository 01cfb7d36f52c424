"""`handle.plot` shows what a call did to a picture, whatever the method does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import vtc
from vtc import viz
from vtc.errors import InputError, PatchError
from vtc.runtime.pictures import sink_layers

N = 36
EVERY = tuple(range(64))


@pytest.fixture
def picture():
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture
def asked(llava, make_inputs):
    """A handle after one call with two images in two rows, the first padded."""

    def run(method, keep=None, **options):
        with vtc.patch(llava, method, keep, **options) as handle:
            llava.generate(
                **make_inputs([[3, None, 4], [5, None, 9]]), max_new_tokens=2, suppress_tokens=[90]
            )
        return handle

    return run


def test_of_a_method_that_drops_tokens_it_is_the_overlay(asked, picture):
    handle = asked("vtc_cls", 0.3)
    wanted = viz.overlay(picture, handle.selections[0], group=1)
    assert handle.plot(picture, group=1).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("thing", [np.zeros((24, 24, 3), np.uint8), "a.png", None])
def test_what_is_no_picture_is_refused(asked, thing):
    handle = asked("vtc_cls", 0.3)
    with pytest.raises(InputError, match=f"image is a {type(thing).__name__}, expected a PIL"):
        handle.plot(thing)


@pytest.mark.parametrize(
    "method, options",
    [
        ("naavit", {"layers": (0, 2)}),
        ("shortv", {"layers": (1,)}),
        ("ima_skip", {"start": -1}),
        ("sink_removal", {"mode": "mask", "dims": (3,), "tau": 1e6}),
    ],
)
def test_of_a_method_that_only_skips_it_is_all_of_the_picture_above_the_plan(
    asked, picture, method, options
):
    handle = asked(method, **options)
    assert handle.selections == [] and len(handle.plans) == 1
    drawn = np.asarray(handle.plot(picture))
    everything = np.asarray(viz.overlay(picture, handle.remaining[0]))
    chart = np.asarray(viz.layer_chart(handle.plans[0]))
    for part in (everything, chart):
        h, w, _ = part.shape
        windows = ((y, (drawn.shape[1] - w) // 2) for y in range(drawn.shape[0] - h + 1))
        assert any((drawn[y : y + h, x : x + w] == part).all() for y, x in windows)


def test_layers_behind_a_cut_that_leaves_nothing_are_drawn_empty(asked, picture):
    handle = asked("yopo", 0.5, heads=1.0)
    drawn = np.asarray(handle.plot(picture))
    chart = np.asarray(viz.layer_chart(handle.plans[0], [1.0, 1.0, 0.0, 0.0]))
    h, w, _ = chart.shape
    x = (drawn.shape[1] - w) // 2
    windows = (drawn[y : y + h, x : x + w] for y in range(drawn.shape[0] - h + 1))
    assert any((window == chart).all() for window in windows)


@pytest.mark.parametrize("method, options", [("var", {}), ("sink_removal", {"mode": "mask"})])
def test_sinks_are_the_tokens_whose_activation_is_above_tau_in_each_layer(
    llava, make_inputs, picture, method, options
):
    inputs, seen = make_inputs([[3, None, 4], [5, None, 9]]), {}

    def see(layer):
        def hook(module, args, kwargs):
            seen[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    layers = llava.model.language_model.layers
    hooks = [m.register_forward_pre_hook(see(i), with_kwargs=True) for i, m in enumerate(layers)]
    with vtc.patch(llava, method, dims=EVERY, tau=3.0, **options) as handle, torch.no_grad():
        llava(**inputs)
    for hook in hooks:
        hook.remove()
    call, plan = handle._session.last, handle.plans[0]
    for group in (0, 1):
        wanted = [0] * N
        places = (inputs["input_ids"][group] == 90).nonzero()[:, 0].tolist()
        for layer in range(1, 4):  # no sinks are looked for in the first of four
            x = seen[layer][group].float()
            strength = x.abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
            for token, column in enumerate(places):
                wanted[token] += int(strength[column] > 3.0)
        assert sink_layers(call, plan, group) == wanted
        assert 0 < sum(wanted) < 3 * N
        tinted = viz.sink_map(picture, handle.remaining[0], wanted, group)
        drawn = np.asarray(handle.plot(picture, group))
        h, w = tinted.height, tinted.width
        x0 = (drawn.shape[1] - w) // 2
        assert any(
            (drawn[y : y + h, x0 : x0 + w] == np.asarray(tinted)).all()
            for y in range(drawn.shape[0] - h + 1)
        )


def test_a_call_that_was_left_alone_is_the_whole_picture(asked, picture):
    handle = asked("naavit", 1.0, scorer="random")
    assert handle.plans == []
    wanted = viz.overlay(picture, handle.remaining[0])
    assert handle.plot(picture).tobytes() == wanted.tobytes()


def test_without_a_call_there_is_nothing_to_draw(llava, picture):
    with vtc.patch(llava, "vtc_cls", 0.3) as handle, pytest.raises(PatchError, match="no call"):
        handle.plot(picture)


def test_what_remains_is_told_site_by_site_also_where_nothing_was_selected(asked):
    rows = asked("shortv", layers=(1,))
    assert [s.is_identity for s in rows.remaining] == [True]
    cut = asked("yopo", 0.5, heads=1.0)
    assert [s.slots.tolist() for s in cut.remaining] == [[N, N], [0, 0]]
    assert [s.slots.tolist() for s in cut.token_selections] == [[0, 0]]
    both = asked("todre", 0.25)
    assert [s.slots.tolist() for s in both.remaining] == [
        s.slots.tolist() for s in both.token_selections
    ]
