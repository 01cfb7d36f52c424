"""A recipe's settings are those of the published row: as text, as a call, and as what is kept."""

from __future__ import annotations

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vtc
from vtc.errors import OptionError, UnsupportedModelError
from vtc.recipes import names, recipe
from vtc.recipes.data import data
from vtc.runtime.tower import facts_of
from vtc.types import Budget

NAMES = names()
BUILT = [name for name in NAMES if not recipe(name).setting.refused]
REFUSED = sorted({*NAMES} - {*BUILT})


def test_every_row_of_every_table_is_in_one_recipe() -> None:
    cells = sum(c != "-" for t in data().tables for row in t.rows for c in row[2:])
    assert cells == sum(len(r.numbers) for name in NAMES for r in recipe(name).results)
    assert len({*NAMES}) == len(NAMES)
    known = {(recipe(n).method, recipe(n).model.slug, recipe(n).budget) for n in NAMES}
    assert len(known) == len(NAMES)
    assert len({m.slug for m in data().models.values()}) == len(data().models)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_have_lineage_and_unit_and_methods_a_citation(name: str) -> None:
    found = recipe(name)
    assert re.fullmatch(r"[a-z0-9_]+-[a-z0-9.-]+-[a-z0-9.]+", name)
    assert found.name == name and name.startswith(f"{found.method}-{found.model.slug}-")
    assert found.results
    for result in found.results:
        assert result.lineage.title and result.lineage.kind and result.numbers
        for number in result.numbers:
            assert number.benchmark and number.unit
            if number.unit == "% of full" and number.full is not None:
                assert number.full == 100
    assert found.bibtex.startswith("@") or "baseline" in vtc.method(found.method).summary
    assert bool(found.setting.refused) != bool(found.setting.follows)


@pytest.mark.parametrize("name", BUILT)
def test_the_printed_call_is_the_recipe(name: str) -> None:
    found, model = recipe(name), object()

    def patch(
        given: object, method: str, keep: Any = None, *, positions: str, **options: Any
    ) -> Any:
        assert given is model
        return vtc.method(method, **options), keep, positions

    called = eval(found.call, {"vtc": SimpleNamespace(patch=patch), "model": model})
    assert called == (found.build(), found.keep, found.positions)
    assert found.build().check_keep(found.keep).keep == found.keep


@pytest.mark.eval
@pytest.mark.parametrize("name", BUILT)
def test_the_printed_command_is_the_recipe(name: str) -> None:
    parse = pytest.importorskip("lmms_eval.utils").simple_parse_args_string
    from vtc.evaluation.compression import Compression

    found = recipe(name)
    words = found.command.split()
    arguments = parse(words[words.index("--model_args") + 1])
    assert arguments.pop("pretrained") == found.model.id
    given = {key: arguments.pop(key, None) for key in ("method", "keep", "positions")}
    read = Compression(**given, options=arguments)
    assert (read.build(), read.keep, read.positions) == (found.build(), found.keep, found.positions)


@pytest.mark.parametrize("name", BUILT)
def test_the_method_works_on_the_rows_model(name: str) -> None:
    found, facts = recipe(name), recipe(name).model.facts
    method = found.build().on(dataclasses.replace(facts, name=found.model.id))
    method.check_facts(facts)
    assert all(0 <= layer < facts.llm_depth for layer in method.llm_layers(facts))
    for signal in method.needs:
        assert max(signal.resolve(facts.encoder_depth, facts.tap), default=0) < facts.encoder_depth


@pytest.mark.parametrize(
    ("name", "layer"), [("hiprune-llava1.5-64", 9), ("hiprune-qwen2.5vl-128", 16)]
)
def test_hiprune_reads_the_published_object_layer_counted_from_1(name: str, layer: int) -> None:
    found = recipe(name)
    (inner,) = (s for s in found.build().needs if s.key == "inner_row")
    assert inner.resolve(found.model.facts.encoder_depth, found.model.facts.tap) == (layer - 1,)


@pytest.mark.parametrize("name", BUILT)
def test_keep_is_the_published_budget_in_this_librarys_convention(name: str) -> None:
    found = recipe(name)
    if found.setting.counts == "content":
        assert found.keep is None
    elif found.budget.endswith("%"):
        assert found.keep == pytest.approx(float(found.budget[:-1]) / 100)
    elif found.method == "dart":
        assert found.keep == 4 + 8 * (int(found.budget) // 8)
    elif found.method != "sparsevlm":
        assert found.keep == int(found.budget) == Budget.of(found.keep).count(found.tokens or 10**6)


@pytest.mark.parametrize("name", [n for n in BUILT if recipe(n).spans()])
def test_spans_cover_all_layers_once_and_never_grow(name: str) -> None:
    found = recipe(name)
    layers = [layer for a, b, _ in found.spans() for layer in range(a, b + 1)]
    counts = [count for _, _, count in found.spans()]
    assert layers == list(range(found.model.layers))
    assert counts[0] == found.tokens and counts == sorted(counts, reverse=True)
    if found.setting.counts == "layer_mean":
        mean = sum((b - a + 1) * n for a, b, n in found.spans()) / found.model.layers
        # one token more or less in the layers behind the cut
        assert abs(mean - int(found.budget)) <= 0.5
    elif found.setting.counts == "last":
        assert counts[-1] == found.keep


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_built_says_why_and_what_is_nearest(name: str) -> None:
    found = recipe(name)
    with pytest.raises(OptionError) as error:
        found.patch(torch.nn.Linear(1, 1))
    assert f"recipe {name!r} cannot be built" in str(error.value)
    assert found.setting.refused in str(error.value) and "Nearest: " in str(error.value)
    assert found.spans() == [] and found.to_dict()["call"] is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("fastv-llava-1.5-64", "fastv-llava1.5-64"),
        ("FastV-LLaVA1.5-64", "fastv-llava1.5-64"),
        ("visionzip-llava1.5-65", "visionzip-llava1.5-64"),
        ("divprune-qwen2.5vl-33.3", "divprune-qwen2.5vl-33.3pct"),
    ],
)
def test_an_unknown_name_suggests_near_ones(given: str, meant: str) -> None:
    with pytest.raises(OptionError, match=re.escape(f"recipe {given!r} is unknown")) as error:
        vtc.recipe(given)
    assert meant in str(error.value).partition("did you mean")[2]


def test_a_name_like_none_suggests_nothing() -> None:
    for given in ("", "%%%%", None):
        with pytest.raises(OptionError, match="is unknown") as error:
            vtc.recipe(given)  # type: ignore[arg-type]
        assert "did you mean" not in str(error.value)


def test_only_places_and_how_it_runs_may_differ() -> None:
    with pytest.raises(OptionError, match="got 'k', expected nothing but fast, kernels, seed"):
        vtc.recipe("fastv-llava1.5-64").patch(torch.nn.Linear(1, 1), k=3)
    found = vtc.recipe("cdpruner-llava1.5-64")
    with pytest.raises(OptionError, match="got 'faithful'"):
        found.build(faithful=False)
    moved = found.build(clip="elsewhere")
    assert dataclasses.replace(moved, clip=found.options["clip"]) == found.build()  # type: ignore[call-arg]


def skeleton(shape: str) -> Any:
    """A model of real size without weights."""
    from transformers import AutoModelForImageTextToText

    from vtc.bench.families import SHAPES

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(SHAPES[shape].config())


SHAPE_OF = {
    "llava1.5": "llava-1.5-7b",
    "llavanext": "llava-next-7b",
    "qwen2.5vl": "qwen2.5-vl-7b",
    "internvl3": "internvl3-8b",
}


@pytest.mark.parametrize("slug", SHAPE_OF)
def test_models_are_what_the_file_says(slug: str) -> None:
    from vtc.adapters.registry import adapter_of

    (of,) = (m for m in data().models.values() if m.slug == slug)
    model = skeleton(SHAPE_OF[slug])
    real = facts_of(adapter_of(model))
    for name in ("encoder_depth", "tap", "has_cls", "patches_per_token", "tiled", "llm_depth"):
        assert getattr(real, name) == getattr(of.facts, name), name
    for name in ("first_layer_cut", "llm_width", "llm_kind", "llm_kv_heads", "projects"):
        assert getattr(real, name) == getattr(of.facts, name), name
    assert model.config.model_type == of.type


def test_patch_builds_exactly_that_and_is_undone() -> None:
    model = skeleton("llava-1.5-7b")
    for name in ("fastv-llava1.5-64", "visionzip-llava1.5-128", "sparsevlm-llava1.5-192"):
        found = vtc.recipe(name)
        with found.patch(model, seed=3) as handle:
            assert handle._session.budget.keep == found.keep
            assert handle._positions == found.positions and handle._session.seed == 3
            assert handle.method == found.build().on(facts_of(handle._session.adapter))
        with pytest.raises(vtc.errors.PatchError):
            vtc.unpatch(model)


def test_another_family_or_size_is_refused_and_left_alone() -> None:
    from tests.kit.models import build_model

    next_7b, tiny = skeleton("llava-next-7b"), build_model("llava")
    found = vtc.recipe("fastv-llava1.5-64")
    for model, got in ((next_7b, "llava_next with llama of 32"), (tiny, "llava with llama of 4")):
        with pytest.raises(UnsupportedModelError) as error:
            found.patch(model)
        message = str(error.value)
        assert got in message and "expected LLaVA-1.5-7B" in message and "vtc.patch" in message
        with pytest.raises(vtc.errors.PatchError):
            vtc.unpatch(model)
    with pytest.raises(UnsupportedModelError):
        found.patch(torch.nn.Linear(1, 1))


def test_another_language_model_of_the_same_size_is_another_model() -> None:
    from transformers import (
        AutoModelForImageTextToText,
        LlamaConfig,
        LlavaNextConfig,
        MistralConfig,
    )

    found = vtc.recipe("vispruner-llavanext-320")
    for text in (LlamaConfig(num_key_value_heads=8), MistralConfig()):
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(LlavaNextConfig(text_config=text))
        with pytest.raises(UnsupportedModelError, match="8 key/value heads"):
            found.patch(model)
