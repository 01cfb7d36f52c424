"""What holds for every registered method: the registry is the list, so a new method is tested by
being there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtc
from tests.methods.views import Rows, run_encoder
from vtc.methods.layer_cuts import LayerCuts
from vtc.plans import layers_as_tokens
from vtc.sites import Facts
from vtc.types import VECTORS, Budget, Tokens

METHODS = list(vtc.methods())
IN_ENCODER = [name for name in METHODS if vtc.method(name).site == "encoder"]
# by a count, or as the picture has it
COUNTING = [name for name in IN_ENCODER if vtc.method(name).count != "adaptive"]
IN_LAYERS = [name for name in METHODS if vtc.method(name).site in ("llm_layer", "llm_rows")]
# between decoder layers, down to a count
CUTTING = [
    name
    for name in IN_LAYERS
    if vtc.method(name).site == "llm_layer" and vtc.method(name).count == "exact"
]
CHOOSING = [name for name in METHODS if name not in IN_ENCODER + IN_LAYERS]
KEEPS = [0.11, 0.5, 7, 1]
# the tiny LLaVA
TINY = Facts(6, 4, True, 1, False, 4, llm_heads=2, llm_width=64, llm_kind="llama")
CALIBRATED = vtc.calibration.Calibration(
    layer_contribution=(0.3, 0.1, 0.4, 0.2), sink_dims=(3, 17), head_ratio=((0.1, 0.2),) * 4
)
# what methods need to be told of a model that nobody knows
OPTIONS: dict[str, dict[str, Any]] = {
    "naavit": {"calibration": CALIBRATED},
    "shortv": {"calibration": CALIBRATED},
    "yopo": {"calibration": CALIBRATED},
    "pixelprune": {"tau": 4.0},
    "sink_removal": {"calibration": CALIBRATED, "tau": 2.0},
    "var": {"calibration": CALIBRATED, "tau": 2.0},
}


def built(name: str) -> vtc.Method:
    return vtc.method(name, **OPTIONS.get(name, {}))


def keeps_of(name: str) -> list[Any]:
    if name == "none" or vtc.method(name).count == "adaptive":
        return [None]
    return [0.5, 0.11, 1.0] if name in IN_LAYERS else KEEPS


@st.composite
def tokens_with_padding(draw: st.DrawFn) -> Tokens:
    """Groups of h×w tokens, padded at the end, with every signal the runtime knows."""
    grids = draw(
        st.lists(
            st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4
        )
    )
    return build_tokens(grids, draw(st.integers(0, 99)), extra=draw(st.integers(0, 3)))


def build_tokens(grids: Any, seed: int, extra: int = 0) -> Tokens:
    lengths = torch.tensor([t * h * w for t, h, w in grids])
    width = int(lengths.max()) + extra
    valid = torch.arange(width) < lengths[:, None]
    features, rows = torch.zeros(len(grids), width, 8), torch.zeros(len(grids), 3, width)
    vectors, early = torch.zeros(len(grids), width, 5), torch.zeros(len(grids), 1, width)
    text = torch.zeros(len(grids), 4, 8)
    for g, n in enumerate(lengths.tolist()):
        draw = torch.Generator().manual_seed(seed + g)
        features[g, :n] = torch.randn(n, 8, generator=draw)
        rows[g, :, :n] = torch.rand(3, n, generator=draw)
        vectors[g, :n] = torch.randn(n, 5, generator=draw)
        early[g, :, :n] = torch.rand(1, n, generator=draw)
        text[g] = torch.randn(4, 8, generator=draw)
    # half of each grid as if it were another crop
    halves = (torch.arange(width) >= lengths[:, None] // 2) & valid & (lengths[:, None] % 2 == 0)
    return Tokens(
        features=features,
        valid=valid,
        grid=tuple(grids),
        parent=torch.tensor([[g, g] for g in range(len(grids))]),
        text=text,
        text_valid=torch.ones(text.shape[:2], dtype=torch.bool),
        signals={
            "image_key": torch.arange(len(grids)) + seed,
            "encoder_row": halves.long(),
            **dict.fromkeys(("cls_row", "cls_row_joint", "received_row"), rows),
            **dict.fromkeys(("early_row", "inner_row"), early),
            **dict.fromkeys(("encoder_features", "keys", "mean_keys"), vectors),
        },
    )


@pytest.mark.parametrize("name", CHOOSING)
@settings(max_examples=25)
@given(tokens=tokens_with_padding())
def test_kept_are_ascending_unique_valid_and_counted(name: str, tokens: Tokens) -> None:
    method = vtc.method(name)
    for keep in keeps_of(name):
        budget = method.check_keep(keep)
        selection = method.select(tokens, budget)
        assert selection.lengths == tokens.lengths
        assert selection.grid == tokens.grid
        for g, n in enumerate(tokens.lengths):
            kept = selection.keep[g, selection.valid[g]].tolist()
            assert kept == sorted(set(kept))
            assert all(0 <= i < n for i in kept)
            slots = int(selection.slots[g])
            if isinstance(method, LayerCuts):
                assert slots >= budget.count(n)  # the rest goes between decoder layers
            elif method.count == "exact":
                assert slots == budget.count(n)
            elif method.count == "at_most":
                assert 1 <= slots <= budget.count(n)
            positions = selection.slot_positions[g]
            assert all(0 <= p < n for p in positions[positions >= 0].tolist())


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("keep", KEEPS)
def test_a_group_decides_as_it_would_alone(name: str, keep: Any) -> None:
    if keep not in keeps_of(name):
        keep = None
    method, budget = vtc.method(name), vtc.method(name).check_keep(keep)
    grids = [(1, 4, 5), (1, 2, 3), (1, 6, 6)]
    together = method.select(build_tokens(grids, 5), budget)
    for g, grid in enumerate(grids):
        alone = method.select(build_tokens([grid], 5 + g, extra=2), budget)
        assert (
            together.keep[g, together.valid[g]].tolist() == alone.keep[0, alone.valid[0]].tolist()
        )
        x = torch.randn(3, 36, 2)
        n = grid[1] * grid[2]
        mine = together.apply(x)[g][together.slot_positions[g] >= 0]
        theirs = alone.apply(x[g : g + 1, : n + 2])[0][alone.slot_positions[0] >= 0]
        # sums of padded tokens are made in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("filler", [0.0, 1e9, float("nan")])
def test_padding_changes_nothing(name: str, filler: float) -> None:
    method, budget = vtc.method(name), vtc.method(name).check_keep(keeps_of(name)[0])
    tokens = build_tokens([(1, 4, 5), (1, 2, 3)], 5, extra=2)
    signals = dict(tokens.signals)
    for key, x in signals.items():
        if x.dim() == 3:
            padding = ~tokens.valid[..., None] if key in VECTORS else ~tokens.valid[:, None]
            signals[key] = x.masked_fill(padding, filler)
    poisoned = dataclasses.replace(
        tokens,
        features=tokens.features.masked_fill(~tokens.valid[..., None], filler),
        signals=signals,
    )
    a, b = method.select(tokens, budget), method.select(poisoned, budget)
    assert torch.equal(a.keep, b.keep)
    assert torch.equal(a.slot_positions, b.slot_positions)


@pytest.mark.parametrize("name", CHOOSING)
def test_same_seed_same_result(name: str) -> None:
    method, budget = vtc.method(name), vtc.method(name).check_keep(keeps_of(name)[0])
    tokens = build_tokens([(1, 6, 6), (1, 3, 5)], 1)
    torch.manual_seed(0)
    first = method.select(tokens, budget).slot_positions
    torch.manual_seed(1)  # the global generator is nobody's seed
    assert torch.equal(first, method.select(tokens, budget).slot_positions)


@st.composite
def rows_of_an_encoder(draw: st.DrawFn) -> Rows:
    units = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    return Rows(
        units,
        seeds=draw(st.lists(st.integers(0, 99), min_size=len(units), max_size=len(units))),
        m=draw(st.sampled_from([1, 4])),
        cls=draw(st.booleans()),
        tap=draw(st.integers(1, 6)),
        extra=draw(st.integers(0, 3)),
    )


@pytest.mark.parametrize("name", COUNTING)
@settings(max_examples=25)
@given(rows=rows_of_an_encoder())
def test_in_the_encoder_rows_shrink_to_their_count(name: str, rows: Rows) -> None:
    method = vtc.method(name)
    model = Facts(rows.tap + 2, rows.tap, rows.cls, rows.m, False, 32)
    for keep in KEEPS:
        left = run_encoder(method, keep, rows.view, rows.tap)
        for r, n in enumerate(rows.units):
            before = list(range(n))
            for after in (units[r] for units in left):
                assert set(after) <= set(before) and after == sorted(set(after))
                before = after
            wanted = method.check_keep(keep).count(n)
            if method.llm_layers(model):
                assert len(before) >= wanted
            elif method.count == "exact":
                assert len(before) == wanted
            assert before


@pytest.mark.parametrize("name", COUNTING)
@settings(max_examples=25)
@given(rows=rows_of_an_encoder(), filler=st.sampled_from([0.0, 1e9, math.nan]))
def test_in_the_encoder_a_row_decides_as_it_would_alone(
    name: str, rows: Rows, filler: float
) -> None:
    method = vtc.method(name)
    together = run_encoder(method, 0.3, rows.view, rows.tap)
    assert together == run_encoder(method, 0.3, rows.view, rows.tap)
    padded = dataclasses.replace(rows, extra=rows.extra + 1, filler=filler)
    assert together == run_encoder(method, 0.3, padded.view, rows.tap)
    for r, n in enumerate(rows.units):
        alone = dataclasses.replace(rows, units=[n], seeds=[rows.seeds[r]], extra=0)
        got = run_encoder(method, 0.3, alone.view, rows.tap)
        assert [units for (units,) in got] == [units[r] for units in together]


@pytest.mark.parametrize("name", IN_LAYERS)
def test_in_the_llm_a_plan_has_a_rule_for_every_layer(name: str) -> None:
    """The share of layers that was asked for does everything; the same seed says the same."""
    for keep in keeps_of(name):
        method = built(name).on(TINY)
        budget = method.check_keep(keep)
        plan, again = (method.plan(layers_as_tokens(4, 0), TINY, budget) for _ in range(2))
        assert len(plan.rules) == 4 and plan.active == again.active
        if name in ("naavit", "shortv"):
            assert sum(plan.active) == budget.count(4)
        for layer in (*method.rule_layers(TINY), *method.llm_layers(TINY, budget)):
            assert 0 <= layer < 4


@pytest.mark.parametrize("name", [name for name in IN_LAYERS if name not in CUTTING])
def test_in_the_llm_keep_is_no_number_of_tokens(name: str) -> None:
    with pytest.raises(vtc.VtcError, match="keep"):
        built(name).check_keep(7)


def test_random_depends_on_seed_and_picture() -> None:
    tokens = build_tokens([(1, 6, 6), (1, 6, 6)], 1)
    method, budget = vtc.method("random"), Budget.of(9)
    keep = method.select(tokens, budget).keep
    assert not torch.equal(keep[0], keep[1])
    assert not torch.equal(keep, method.select(dataclasses.replace(tokens, seed=1), budget).keep)


def test_random_pictures_and_seeds_that_share_low_bits_differ() -> None:
    """torch's CPU generator looks at the lowest 32 bits of its seed alone."""
    tokens = build_tokens([(1, 6, 6)] * 4, 1)
    keys = torch.tensor([1, 1 + 2**12, 1 + 2**31, 5])
    tokens = dataclasses.replace(tokens, signals={"image_key": keys})
    method, budget, seen = vtc.method("random"), Budget.of(9), set()
    for seed in (0, 1, -1, 2**20, 2**32, 2**70):
        selection = method.select(dataclasses.replace(tokens, seed=seed), budget)
        seen |= {tuple(row) for row in selection.keep.tolist()}
    assert len(seen) == 6 * 4


def test_random_is_uniform() -> None:
    tokens = build_tokens([(1, 1, 10)] * 2000, 0)
    kept = vtc.method("random").select(tokens, Budget.of(3)).mask().float().mean(0)
    # 2000 draws of 0.3: four standard deviations
    assert (kept - 0.3).abs().max() < 4 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.parametrize("name", METHODS)
def test_public_facts_are_declared(name: str) -> None:
    method = vtc.method(name)
    assert method.name == name
    assert method.summary and "\n" not in method.summary
    assert method.site in ("pixels", "encoder", "llm_input", "llm_layer", "llm_rows")
    assert method.bibtex.startswith("@") or method.summary.startswith("baseline")
    assert method.count in ("exact", "at_most", "adaptive")
    assert method.exactness in ("mask", "layer_mask", "restatement")
    assert method.published_positions in ("keep", "renumber", "median")
    assert type(method).__doc__
    assert eval(repr(method), {type(method).__name__: type(method)}) == method


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("positions", ["keep", "renumber", "median", "published"])
def test_every_position_policy_runs_and_batch_rows_equal_rows_alone(
    llava: Any, make_inputs: Any, name: str, positions: str
) -> None:
    rows = [[4, None, 5], [2, None, None, 9], [7]]
    batch = make_inputs(rows)
    pixels, start = batch["pixel_values"], 0
    with vtc.patch(llava, built(name), keeps_of(name)[0], positions=positions) as handle:
        together = llava.generate(**batch, max_new_tokens=5, do_sample=False, suppress_tokens=[90])[
            :, -5:
        ]
        layers = handle.method.llm_layers(TINY, Budget.of(keeps_of(name)[0]))
        assert len(handle.selections) == (name not in IN_LAYERS) + len(layers)
        for b, row in enumerate(rows):
            width, images = int(batch["attention_mask"][b].sum()), row.count(None)
            alone = {
                "input_ids": batch["input_ids"][b : b + 1, -width:],
                "attention_mask": torch.ones(1, width).long(),
            }
            if images:
                alone["pixel_values"] = pixels[start : start + images]
                start += images
            got = llava.generate(**alone, max_new_tokens=5, do_sample=False, suppress_tokens=[90])[
                0, -5:
            ]
            assert torch.equal(got, together[b])


def test_a_method_of_ones_own_needs_no_more_than_select(llava: Any, make_inputs: Any) -> None:
    class First(vtc.Method):
        def select(self, tokens: Tokens, budget: Budget) -> vtc.Selection:
            count = int(budget.counts(tokens.valid, tokens.parent)[0])
            keep = torch.arange(count).expand(len(tokens.valid), -1)
            return vtc.Selection(
                keep, torch.ones_like(keep).bool(), tokens.lengths, tokens.parent, tokens.grid
            )

    with vtc.patch(llava, First(), 4) as handle:
        llava.generate(**make_inputs([[4, None, None, 5]]), max_new_tokens=1, do_sample=False)
    assert handle.report().method == "First"
    assert handle.selections[0].keep.tolist() == [[0, 1, 2, 3]] * 2


def test_a_decision_over_something_else_is_refused(llava: Any, make_inputs: Any) -> None:
    class Other(vtc.Method):
        def select(self, tokens: Tokens, budget: Budget) -> vtc.Selection:
            parent, grid = torch.zeros(1, 2).long(), [(1, 1, 3)]
            return vtc.Selection.everything([3], parent, grid)  # type: ignore[list-item]

    inputs = make_inputs([[4, None, 5]])
    with (
        vtc.patch(llava, Other(), 4),
        pytest.raises(vtc.VtcError, match=r"decided over \(3,\), expected .* \(36,\) tokens"),
    ):
        llava.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("positions", ["keep", "renumber", "median", "published"])
@pytest.mark.parametrize("name", METHODS)
def test_position_ids(llava: Any, make_inputs: Any, name: str, positions: str) -> None:
    """The position ids that the language model gets, worked out from the selection."""
    rows: list[list[int | None]] = [[None, 5], [3, None, 2, None, 1], [4]]
    seen: list[torch.Tensor] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    llava.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    with vtc.patch(llava, built(name), keeps_of(name)[0], positions=positions) as handle:
        llava.generate(**make_inputs(rows), max_new_tokens=1, do_sample=False)
    policy = vtc.method(name).published_positions if positions == "published" else positions
    image = 0
    for row, got in zip(rows, seen[-1].tolist(), strict=True):
        want: list[int] = []
        column = 0
        for part in row:
            if part is None:
                # what acts between or in decoder layers leaves their entrance whole
                whole = name in IN_LAYERS
                found = (
                    list(range(36))
                    if whole
                    else image_positions(handle.selections[0], image, policy)
                )
                want += [column + p for p in found]
                image += 1
            else:
                want += range(column, column + part)
            column += part or 36
        if policy == "renumber":
            want = list(range(len(want)))
        assert got[-len(want) :] == want


def image_positions(selection: vtc.Selection, group: int, policy: str) -> list[int]:
    found = selection.slot_positions[group].tolist()
    if policy == "median" and selection.merge is not None:
        slot, token, weight = (part[group] for part in selection.merge)
        for s in range(len(found)):
            if len(members := sorted(token[(slot == s) & (weight != 0)].tolist())):
                found[s] = members[(len(members) - 1) // 2]
    return [p for p in found if p >= 0]


@pytest.mark.parametrize("name", ["vtc_cls", "random", "uniform"])
def test_scorer_and_selector_can_be_swapped(llava: Any, make_inputs: Any, name: str) -> None:
    with vtc.patch(llava, name, 9, scorer="random", selector="top_k") as handle:
        llava.generate(**make_inputs([[4, None, 5]]), max_new_tokens=1, do_sample=False)
        got = handle.selections[0].keep
    with vtc.patch(llava, "random", 9) as handle:
        llava.generate(**make_inputs([[4, None, 5]]), max_new_tokens=1, do_sample=False)
        assert torch.equal(got, handle.selections[0].keep)
