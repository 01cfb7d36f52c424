"""What the report says of cuts inside the encoder and the LLM is what really ran there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtc
from tests.kit.matrix import (
    SPECS,
    Spec,
    accepted,
    cached_inputs,
    cells,
    model_of,
    run,
    specs_of,
)
from tests.kit.models import FAMILIES, QWEN
from vtc.adapters.registry import adapter_of

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

ONE_ROW = {"llava", "llava_siglip", *QWEN}


def blocks_seen(model: Any, patches: dict[int, int]) -> list[Any]:
    """Hooks that add up the patches of every block's output, a [CLS] not counted."""
    encoder = adapter_of(model).encoder()

    def see(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            rows = 1 if encoder.packed else len(hidden)
            length = hidden.shape[0 if encoder.packed else 1] - int(encoder.has_cls)
            patches[index] = patches.get(index, 0) + rows * length

        return hook

    return [block.register_forward_hook(see(i)) for i, block in enumerate(encoder.blocks)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_encoder_processes_fewer_patches_block_by_block(family: str) -> None:
    (spec,) = specs_of("flowcut")
    model, inputs = spec.model(family), cached_inputs(family, "batch 1")
    whole: dict[int, int] = {}
    seen: dict[int, int] = {}
    for counted, patched in ((whole, False), (seen, True)):
        hooks = blocks_seen(model, counted)
        try:
            if not patched:
                run(model, inputs, max_new_tokens=1)
                continue
            with vtc.patch(model, spec.method(family), spec.keep) as handle:
                run(model, inputs, max_new_tokens=1)
        finally:
            for hook in hooks:
                hook.remove()
    said = list(handle.report().block_patches)
    assert said == sorted(said, reverse=True)
    tap = adapter_of(model).encoder().tap
    assert said[0] == whole[0]
    assert said[tap] < whole[tap] and said[tap] < said[0]
    if family in ONE_ROW:
        assert said == [seen[block] for block in sorted(seen)]
    else:
        # rows of unequal length are padded to the longest
        assert all(n <= seen[block] <= whole[block] for block, n in enumerate(said))
        assert seen[tap] < whole[tap]


def test_other_methods_say_nothing_of_blocks() -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    with vtc.patch(model, "uniform", 0.5) as handle:
        run(model, inputs, max_new_tokens=1)
    assert handle.report().block_patches == ()


@pytest.mark.parametrize("family, spec", cells(SPECS), ids=str)
def test_caches_are_as_long_as_what_each_layer_saw(family: str, spec: Spec) -> None:
    model = spec.model(family)
    inputs = cached_inputs(family, accepted(family, spec)[0])
    text = int((~torch.isin(inputs["input_ids"], torch.tensor([90, 91]))).sum())
    options = {"return_dict_in_generate": True, "max_new_tokens": 1}
    with vtc.patch(model, spec.method(family), spec.keep) as handle:
        cache = run(model, inputs, **options).past_key_values
        report, later = handle.report(), dict(handle._session.last.later)
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert list(report.kv_lengths) == lengths
    there = sum(report.llm_tokens)
    for layer, length in enumerate(lengths):
        # newline tokens stay with their row
        assert text + there <= length <= inputs["input_ids"].shape[1]
        if family not in ("llava_next", "llava_onevision"):
            assert length == text + there
        if later:
            assert report.layer_tokens[layer] == there
        if layer in later:
            there = int(later[layer].slots.sum())
            assert lengths[layer + 1] <= length
    assert (lengths[-1] < lengths[0]) == any(
        int(cut.slots.sum()) < sum(report.llm_tokens) for cut in later.values()
    )
    assert report.layer_mean_tokens <= sum(report.llm_tokens) / len(report.llm_tokens)


def test_some_caches_get_shorter() -> None:
    """With text that looks away, later layers hold text alone."""
    for family in FAMILIES:
        model, inputs = model_of(family, layers=8), cached_inputs(family, "batch 1")
        with vtc.patch(model, "todre", 0.4, tau=1.0) as handle:
            run(model, inputs, max_new_tokens=1)
        report = handle.report()
        assert report.layer_tokens == (*[report.llm_tokens[0]] * 7, 0)
        assert report.kv_lengths[7] < report.kv_lengths[6] == report.kv_lengths[0]
        assert report.kept_tokens == report.llm_tokens
        assert report.layer_mean_tokens == report.llm_tokens[0] * 7 / 8


@pytest.mark.parametrize("name", ["vtc_cls", "todre"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stand_in_is_named_where_there_is_no_cls(family: str, name: str) -> None:
    spec = specs_of(name)[0]
    model, has_cls = spec.model(family), adapter_of(spec.model(family)).encoder().has_cls
    with vtc.patch(model, spec.method(family), spec.keep) as handle:
        run(model, cached_inputs(family, "batch 1"), max_new_tokens=1)
    report = handle.report()
    assert (report.stand_in is None) == has_cls
    line = next(line for line in str(report).splitlines() if line.startswith("stand in "))
    assert line.split(maxsplit=2)[2] == (report.stand_in or "-")


def test_the_printed_report_of_a_method_with_cuts_in_the_llm() -> None:
    model = model_of("internvl", layers=8)
    with vtc.patch(model, "todre", 0.4, tau=1.0) as handle:
        run(model, cached_inputs("internvl", "batch 1"), max_new_tokens=2)
    report = handle.report()
    lines = {
        line[: line.index("  ")]: line[line.index("  ") :].strip()
        for line in str(report).splitlines()
    }
    assert lines["method"] == "todre" and lines["keep"] == "0.4"
    assert lines["layer tokens"] == f"{report.llm_tokens[0]}×7 0×1"
    assert lines["kv lengths"] == f"{report.kv_lengths[0]}×7 {report.kv_lengths[7]}×1"
    assert lines["block patches"] == "-"
    assert set(lines) == {name.replace("_", " ") for name in report.to_dict()}
