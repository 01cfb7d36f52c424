"""Models spread over devices, or offloaded: the same answers, and no tensor where it should not be.

The two devices of `tests.kit.devices` are not real, but as strict: whatever meets a tensor of
another device raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.devices import two_devices
from tests.kit.models import PLACEHOLDERS, build_model
from tests.kit.prompts import Inputs, build_inputs
from vtc.adapters.registry import adapter_of
from vtc.errors import UnsupportedModeError

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl")
SLOW = [pytest.mark.slow]
# the last layer drops all visual tokens under any tau above 1
METHODS: dict[str, tuple[float | None, dict[str, Any]]] = {
    "vtc_cls": (0.4, {}),
    "todre": (0.4, {"tau": 1.1}),
    "flowcut": (0.4, {"llm_cut": "on"}),
    "downsample": (4, {}),
    "naavit": (None, {"layers": (1, 2)}),
    "shortv": (None, {"layers": (0, 3)}),
    "yopo": (0.5, {"heads": 1.0}),
    "var": (None, {"dims": (3, 17), "tau": 1.5, "rho": 1.0, "least": 0.0}),
    "sink_removal": (None, {"mode": "mask", "dims": (3, 17), "tau": 1.5}),
}
PART = {"all": [*METHODS], "even": [*METHODS][::2], "odd": [*METHODS][1::2]}
ROWS: list[list[Any]] = [[4, ("image", 24, 24), 5], [2, ("image", 24, 48), 9]]
GREEDY = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": PLACEHOLDERS}


def inputs_of(family: str) -> Inputs:
    given = build_inputs(family, ROWS)
    return {**given, "labels": given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)}


@torch.no_grad()
def answers(model: Any, inputs: Inputs, method: str) -> dict[str, Tensor]:
    """Everything a patched model gives, on the CPU."""
    keep, options = METHODS[method]
    labels = inputs["labels"]
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with vtc.patch(model, method, keep, **options) as handle:
        greedy = model.generate(**given, **GREEDY)
        out = model(**given, labels=labels)
        kept = [selection.keep for selection in handle.selections]
        if not (plans := handle.plans):
            assert handle.report().kept_fraction < 1
        assert all(not plan.is_stock for plan in plans)
    found = {"greedy": greedy, "logits": out.logits, "loss": out.loss}
    found |= {f"cut {i}": k for i, k in enumerate(kept)}
    return {name: value.cpu() for name, value in found.items()}


@cache
def expected(family: str, method: str) -> dict[str, Tensor]:
    return answers(build_model(family), inputs_of(family), method)


def check(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        if value.is_floating_point():
            # another implementation of attention, as on any other device
            assert torch.allclose(got[name], value, rtol=0, atol=1e-5), name
        else:
            assert torch.equal(got[name], value), name


@pytest.fixture
def devices() -> Iterator[tuple[torch.device, torch.device]]:
    with two_devices() as pair:
        yield pair


def test_the_devices_are_strict(devices: tuple[torch.device, torch.device]) -> None:
    a, b = (torch.arange(3.0).to(device) for device in devices)
    assert (a + 1).device == devices[0] and torch.ones(2, device=devices[1]).device == devices[1]
    for clash in (
        lambda: a + b,
        lambda: a + torch.ones(3),
        lambda: torch.cat([a, b]),
        lambda: a[b.long()],
        lambda: torch.arange(3)[a.long()],
        lambda: a.masked_fill(b > 0, 0),
        lambda: a.scatter(0, torch.tensor([0]), 1.0),
        lambda: torch.nn.functional.linear(a[None], b[None]),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            clash()
    # these work on CUDA too
    assert a[torch.tensor([2])].tolist() == [2.0]
    assert (a + torch.tensor(1.0)).tolist() == (a.to(devices[1]) + 1).tolist() == [1.0, 2.0, 3.0]
    a[1:] += 5
    assert a.cpu().tolist() == [0.0, 6.0, 7.0]


def placed(model: Any, split: str, first: torch.device, second: torch.device) -> Any:
    """The model as accelerate dispatches it by a map of its leaves."""
    from accelerate import dispatch_model

    adapter = adapter_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    layers = [names[id(layer)] for layer in model.model.language_model.layers]
    blocks = [names[id(block)] for block in adapter.encoder().blocks]
    tower, language = names[id(adapter.tower)], names[id(model.model.language_model)]

    def on_second(name: str) -> bool:
        if split == "encoder | LLM":
            return not name.startswith(tower) and "projector" not in name
        if any(name.startswith(f"{b}.") for b in blocks[3:]):
            return True
        return name.startswith((*(f"{layer}." for layer in layers[2:]), f"{language}.norm"))

    tensors = [*dict(model.named_parameters()), *dict(model.named_buffers())]
    owners = {*layers, *blocks, *(name.rpartition(".")[0] for name in tensors)}
    owners |= {tower} if split == "encoder | LLM" else set()
    units = {o for o in owners if not any(o.startswith(f"{other}.") for other in owners)}
    where = {u: second if on_second(f"{u}.") else first for u in sorted(units)}
    return dispatch_model(model, where, force_hooks=True)


@pytest.mark.parametrize(
    "family, split, part",
    # the second split cuts the LLM in two as well; by default a run of each kind of tower, and of
    # the first split each method in one family
    [
        ("llava", "encoder | LLM", "even"),
        ("qwen3_vl", "encoder | LLM", "odd"),
        pytest.param("llava", "encoder | LLM", "odd", marks=SLOW),
        pytest.param("qwen3_vl", "encoder | LLM", "even", marks=SLOW),
    ]
    + [
        pytest.param(
            *(family, "inside the encoder", "all"),
            marks=[] if family in ("llava", "qwen2_5_vl") else SLOW,
        )
        for family in FAMILIES
    ],
)
def test_spread_over_two_devices(
    family: str, split: str, part: str, devices: tuple[torch.device, torch.device]
) -> None:
    want = {method: expected(family, method) for method in PART[part]}
    model = placed(build_model(family), split, *devices)
    assert len({weight.device for weight in model.parameters()}) == 2
    entrance = model.get_input_embeddings().weight.device
    inputs = {name: value.to(entrance) for name, value in inputs_of(family).items()}
    for method in PART[part]:
        check(answers(model, inputs, method), want[method])


def test_a_window_of_blocks_on_two_devices(devices: tuple[torch.device, torch.device]) -> None:
    inputs = build_inputs("llava", ROWS)
    with vtc.patch(build_model("llava"), "vtc_cls", 0.4, start=4) as handle:
        handle._model(**inputs)
        want = handle.selections[0]
        assert len(set(handle.method.needs[0].resolve(6, 4)) & {2, 3}) == 2
    model = placed(build_model("llava"), "inside the encoder", *devices)
    with vtc.patch(model, "vtc_cls", 0.4, start=4) as handle:
        model(**{name: value.to(devices[0]) for name, value in inputs.items()})
        assert torch.equal(handle.selections[0].keep.cpu(), want.keep)


# older stock versions compare the device of ids with that of offloaded weights
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
@pytest.mark.parametrize(
    "family, how",
    [(family, how) for family in FAMILIES for how in ("dispatched", "on the CPU")]
    + [("qwen3_vl", "on disk")],
)
def test_hooks_and_offloading_of_accelerate(family: str, how: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload, dispatch_model

    model, inputs, cpu = build_model(family), inputs_of(family), torch.device("cpu")
    if how == "dispatched":
        model = dispatch_model(model, {"": cpu}, force_hooks=True)
    elif how == "on the CPU":
        model = cpu_offload(model, execution_device=cpu)
    else:
        model = disk_offload(model, str(tmp_path), execution_device=cpu)
    for method in METHODS:
        if method == "downsample" and how != "dispatched":
            keep, options = METHODS[method]
            with vtc.patch(model, method, keep, **options):
                for call in (lambda: model.generate(**inputs), lambda: model(**inputs)):
                    with pytest.raises(UnsupportedModeError, match="weights are offloaded"):
                        call()
            continue
        got, want = answers(model, inputs, method), expected(family, method)
        assert all(torch.equal(got[name], value) for name, value in want.items())
