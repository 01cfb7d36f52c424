"""What a composition is: its stages, what it says of itself, and what cannot be composed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from vtc import steps
from vtc.composition import Composed
from vtc.errors import InputError, OptionError, UnsupportedModeError
from vtc.methods.flowcut import FlowCut
from vtc.methods.todre import ToDre
from vtc.methods.vtc_cls import VtcCls
from vtc.plans import LayerRule, Redistribution
from vtc.sites import Facts, LayerView, RowView
from vtc.types import Budget, Selection, Tokens

TWO = (("flowcut", 0.5), ("todre", 0.1))
FACTS = Facts(24, 22, True, 1, True, 32)


def tokens(*sizes: int, seed: int = 0, **parts: Any) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    width = max(sizes)
    given = {
        "features": torch.randn(len(sizes), width, 4, generator=draw),
        "valid": torch.arange(width) < torch.tensor(sizes)[:, None],
        "grid": tuple((1, 1, n) for n in sizes),
        "parent": torch.tensor([[g, 0] for g in range(len(sizes))]),
        "signals": {
            "cls_row": torch.rand(len(sizes), 2, width, generator=draw),
            "image_key": torch.arange(len(sizes)),
        },
    }
    return Tokens(**(given | parts))  # type: ignore[arg-type]


def test_what_it_says_of_itself() -> None:
    both = vtc.compose(*TWO)
    assert isinstance(both, vtc.Method)
    assert (both.name, both.site, both.count) == ("flowcut+todre", "encoder", "adaptive")
    assert both.exactness == "restatement"
    assert vtc.compose(("vtc_cls", 0.5), ("todre", 0.1)).exactness == "layer_mask"
    assert vtc.compose(("vtc_cls", 0.5), ("random", 0.1)).exactness == "mask"
    assert both.bibtex.count("@") == 2 and both.summary.count(", then ") == 1
    assert both.published_positions == "renumber"
    assert vtc.compose(("vtc_cls", 0.5), ("random", 0.1)).published_positions == "keep"
    assert not both.drops_earlier_kv
    assert vtc.compose(("todre", 0.5, {"earlier_kv": "drop"})).drops_earlier_kv
    assert both == vtc.compose(*TWO) and hash(both) == hash(vtc.compose(*TWO))
    names = {"compose": vtc.compose, "FlowCut": FlowCut, "ToDre": ToDre}
    assert eval(repr(both), names) == both == eval(str(both), names)


def test_stages_in_every_spelling() -> None:
    want = vtc.compose((FlowCut(), 64), (ToDre(tau=0.2), 8), ToDre(stage1=False))
    assert want == vtc.compose(
        ("flowcut", 64), ("todre", 8, {"tau": 0.2}), ("todre", None, {"stage1": False})
    )
    inner = vtc.compose(("flowcut", 64), ("todre", 8, {"tau": 0.2}))
    assert vtc.compose(inner, (ToDre(stage1=False),)) == want
    assert [step.budget for step in want.steps(Budget(None))] == [
        Budget(64),
        Budget(8),
        Budget(None),
    ]


def test_where_the_stages_act() -> None:
    three = vtc.compose(("flowcut", 0.5), ("todre", 0.1), ("naavit", 0.5))
    assert three.encoder_blocks(FACTS) == tuple(range(22))
    assert three.llm_layers(FACTS, Budget(None)) == (1, 27)
    needs = [(s.name, s.blocks) for s in vtc.compose(("vtc_cls", 0.5), ("todre", 0.1)).needs]
    assert needs == [("cls_row", tuple(range(16, 23))), ("cls_row", (-1,))]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "got no stages, expected at least one"),
        (TWO[::-1], "order todre flowcut, expected that in which they act: 'todre' acts before"),
        (TWO[::-1], "'flowcut' acts inside the encoder; write them as flowcut, todre"),
        ((("flowcut", 0.1), ("todre", 0.5)), r"'todre' \(keep=0.5\) behind stage 'flowcut' \(kee"),
        ((("flowcut", 10), ("todre", 11)), "in the beginning; pass at most 10 there"),
        ((("vtc_cls", 0.5), ("random", 9), ("todre", 0.6)), r"behind stage 'vtc_cls' \(keep=0.5\)"),
        ((("flowcut", 0.5), ("flowcut", 0.4)), "both cut inside the encoder, expected at most one"),
        (("none", ("todre", 0.5)), "keeps everything, expected one that does something"),
        ((("none", 0.5),), "keeps everything, expected one that does something: leave it out"),
        ((("downsample", 0.5), ("todre", 0.1)), "makes the picture itself smaller, expected"),
        ((("flowcut", 0.5), ("average_pool", 0.1)), "needs the whole grid of tokens and some of"),
        ((("average_pool", 0.5), ("todre", 0.1)), "merges tokens, expected it to choose among"),
        (("vtc_cls",), "got keep=None, expected how much is kept"),
        ((("todre", 0.5, {"stage1": False}),), "decides by itself how much is kept and got keep"),
        ((("naavit", 64),), r"expected a float in \(0, 1\]: the share of layers"),
        ((("vtc_cls", 0.5, {"stop": 8}),), "has no option 'stop'"),
        ((("nope", 0.5),), "'nope' is unknown; expected one of"),
        ((("vtc_cls", 0.5, 3),), r"got stage \('vtc_cls', 0.5, 3\), expected \(method, keep\)"),
        ((("vtc_cls", 0.5, {}, 3),), r"or a name or method alone"),
        (((),), r"got stage \(\), expected \(method, keep\)"),
        (((vtc.compose(*TWO), 0.5),), "is a composition and got keep=0.5, expected none: its st"),
    ],
)
def test_what_cannot_be_composed(stages: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        vtc.compose(*stages)


def test_keeps_of_layers_and_of_their_own_are_exempt() -> None:
    vtc.compose(("vtc_cls", 0.1), ("naavit", 0.9))
    vtc.compose(("todre", 0.1, {"stage2": False}), ("todre", None, {"stage1": False}))
    vtc.compose(("average_pool", 0.1), ("todre", None, {"stage1": False}))
    vtc.compose(("vtc_cls", 0.5), ("todre", 0.5))


def test_parts_of_a_composition_are_swapped_in_its_stages() -> None:
    with pytest.raises(OptionError, match="it decides by a rule of its own"):
        Composed(stages=vtc.compose(*TWO).stages, scorer="random")
    with pytest.raises(OptionError, match="its stages carry their own; compose it anew"):
        vtc.compose(*TWO).check_keep(0.5)


def test_fractions_and_tokens_are_compared_on_each_image() -> None:
    mixed = vtc.compose(("vtc_cls", 0.5), ("todre", 12))
    mixed.check_lengths((24, 36, 576))
    # an image of 10 tokens has 5, and then all of 12
    with pytest.raises(InputError, match=r"image 1 of the call has 10 tokens: stage 'vtc_cls' \(k"):
        mixed.check_lengths((24, 10))
    with pytest.raises(InputError, match=r"keeps 5 of them and stage 'todre' \(keep=12\) behind"):
        mixed.check_lengths((10,))
    around = vtc.compose(("vtc_cls", 0.5), ("random", 20), ("todre", 0.4))
    with pytest.raises(InputError, match=r"'random' \(keep=20\) behind it 20, expected at most"):
        around.check_lengths((36,))


def test_two_stages_choose_one_after_the_other() -> None:
    given = tokens(20, 9)
    both = vtc.compose(("random", 0.5), ("vtc_cls", 0.2, {"start": -2}), ("todre", 0.1))
    made = both.select(given, Budget(None))
    assert made.valid.sum(-1).tolist() == [2, 1] and made.lengths == (20, 9)
    for g, n in enumerate((20, 9)):
        drawn = vtc.method("random").select(given, Budget.of(0.5))
        left = drawn.keep[g, drawn.valid[g]].tolist()
        rows = given.signals["cls_row"][g].sum(0)
        left = sorted(
            sorted(left, key=lambda i, rows=rows: -float(rows[i]))[: round(0.2 * n + 0.01)]
        )
        x = torch.nn.functional.normalize(given.features[g].double(), dim=-1)
        chosen = [max(left, key=lambda i, rows=rows: float(rows[i]))]
        while len(chosen) < max(1, n // 10):
            rest = [i for i in left if i not in chosen]
            chosen.append(min(rest, key=lambda i, x=x, c=chosen: float((x[i] @ x[c].T).sum())))
        assert made.keep[g, made.valid[g]].tolist() == sorted(chosen)


def test_random_numbers_stay_with_their_tokens() -> None:
    """So that half and a tenth of it are what a twentieth would be."""
    given = tokens(40, 23)
    made = vtc.compose(("random", 0.5), ("random", 0.05)).select(given, Budget(None))
    assert torch.equal(made.keep, vtc.method("random").select(given, Budget.of(0.05)).keep)


def selection_of(keep: list[list[int]], lengths: tuple[int, ...]) -> Selection:
    width = max(map(len, keep))
    valid = torch.arange(width) < torch.tensor([len(k) for k in keep])[:, None]
    index = torch.tensor([[*k, *[0] * (width - len(k))] for k in keep])
    parent = torch.tensor([[g, 0] for g in range(len(keep))])
    return Selection(index, valid, lengths, parent, tuple((1, 1, n) for n in lengths))


def test_what_a_later_stage_sees() -> None:
    given = tokens(6, 6, 4)
    given = dataclasses.replace(
        given,
        grid=((1, 2, 3), (1, 2, 3), (1, 2, 2)),
        parts=(((1, 2, 3),), ((1, 1, 3), (1, 1, 3)), ((1, 2, 2),)),
        overview=((0, 3), (3, 6), (1, 2)),
        signals={**given.signals, "hidden": torch.randn(3, 6, 6)},
    )
    left = selection_of([[1, 2, 5], [0, 1, 2, 3, 4, 5], [0, 3]], (6, 6, 4))
    seen = steps.narrowed(given, left, {"hidden"})
    assert seen.lengths == (3, 6, 2) and seen.valid.shape == (3, 6)
    assert seen.grid == ((1, 1, 3), (1, 2, 3), (1, 1, 2))
    assert seen.parts == (((1, 1, 3),), ((1, 1, 3), (1, 1, 3)), ((1, 1, 2),))
    # nothing of the last one's overview is left
    assert seen.overview == ((0, 2), (3, 6), (0, 2))
    assert torch.equal(seen.features[0, :3], given.features[0, [1, 2, 5]])
    assert torch.equal(seen.signals["cls_row"][2, :, :2], given.signals["cls_row"][2][:, [0, 3]])
    assert torch.equal(seen.signals["hidden"][0, :3], given.signals["hidden"][0, [1, 2, 5]])
    assert seen.signals["image_key"] is given.signals["image_key"]
    assert not seen.features[0, 3:].any() and not seen.signals["hidden"][2, 2:].any()
    assert seen.index is not None and seen.index[0].tolist() == [1, 2, 5, 0, 0, 0]
    again = steps.narrowed(seen, selection_of([[0, 2], [5], [1]], (3, 6, 2)))
    assert again.index is not None and again.index[:, 0].tolist() == [1, 5, 3]
    assert again.index[0].tolist() == [1, 5]


def test_what_a_later_stage_says_is_told_in_original_tokens() -> None:
    left = selection_of([[1, 2, 5], [0, 3]], (6, 4))
    merged = dataclasses.replace(
        selection_of([[0, 2], [1]], (3, 2)),
        scores=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]),
        positions=torch.tensor([[0, 2, 1], [1, -1, -1]]),
        merge=(
            torch.tensor([[2, 2], [0, 0]]),
            torch.tensor([[0, 1], [0, 0]]),
            torch.tensor([[0.5, 0.5], [1.0, 0.0]]),
        ),
    )
    told = steps.widened(merged, left)
    assert told.keep.tolist() == [[1, 5], [3, 0]] and told.valid.tolist() == [
        [True] * 2,
        [True, False],
    ]
    assert told.slot_positions.tolist() == [[1, 5, 2], [3, -1, -1]]
    assert told.merge is not None and told.merge[1].tolist() == [[1, 2], [0, 0]]
    assert (told.lengths, told.grid) == ((6, 4), left.grid)
    low = float("-inf")
    want = [[low, 0.1, 0.2, low, low, 0.3], [0.4, low, low, 0.5, low, low]]
    assert told.scores is not None and told.scores.tolist() == torch.tensor(want).tolist()


def test_counts_behind_a_stage_are_of_what_there_was() -> None:
    budget = steps.Remaining(0.25, (40, 8))
    valid = torch.arange(9) < torch.tensor([9, 3])[:, None]
    assert budget.counts(valid, torch.tensor([[0, 0], [1, 0]])).tolist() == [9, 2]
    assert steps.Remaining(5, (40, 3)).counts(valid[1:], torch.tensor([[1, 0]])).tolist() == [3]
    assert steps.Remaining(5, (40, 3)).count(9) == 5
    with pytest.raises(OptionError, match=r"expected budget.counts\(tokens.valid, tokens.parent\)"):
        budget.count(9)


def test_merged_tokens_are_not_chosen_among() -> None:
    """A method that merges without saying so is found out when it has."""

    class Merging(vtc.Method):
        def select(self, tokens: Tokens, budget: Budget) -> Selection:
            made = vtc.method("average_pool").select(tokens, budget)
            assert made.merge is not None
            return made

    given = dataclasses.replace(tokens(6), grid=((1, 2, 3),))
    both = vtc.compose((Merging(), 0.5), ("random", 0.2))
    with pytest.raises(UnsupportedModeError, match="'random' was to choose among tokens that a st"):
        both.select(given, Budget(None))


def layer_view(rows: list[str]) -> LayerView:
    """Rows of v (visual), n (newline), t (text) and a blank for padding, one image each."""
    kinds = [list(row) for row in rows]
    columns = [[i for i, kind in enumerate(row) if kind == "v"] for row in kinds]
    width = max(map(len, columns))
    valid = torch.arange(width) < torch.tensor([len(c) for c in columns])[:, None]
    newlines = [
        [b, i, b, row[:i].count("v") - 2, row[:i].count("v")]
        for b, row in enumerate(kinds)
        for i, kind in enumerate(row)
        if kind == "n"
    ]
    empty = torch.zeros(len(rows), 1, len(kinds[0]), 2)
    return LayerView(
        layer=1,
        valid=valid,
        index=torch.arange(width).expand(len(rows), -1) * valid,
        columns=torch.tensor([[*c, *[0] * (width - len(c))] for c in columns]),
        parent=torch.tensor([[b, b] for b in range(len(rows))]),
        tokens=tuple(len(c) for c in columns),
        mask=torch.tensor([[kind != " " for kind in row] for row in kinds]),
        visual=torch.tensor([[kind == "v" for kind in row] for row in kinds]),
        query=empty,
        key=empty,
        value=empty,
        scale=1.0,
        newlines=torch.tensor(newlines),
    )


def test_what_a_stage_sees_behind_another_one_at_the_same_layer() -> None:
    view = layer_view(["tvvnvvntt", "   tvvntt"])
    left = view.narrowed(torch.tensor([[True, True, False, False], [False, True, False, False]]))
    assert left.valid.tolist() == [[True, True, False, False], [False, True, False, False]]
    assert left.columns.tolist() == [[1, 2, 0, 0], [0, 5, 0, 0]]
    assert left.index.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    # the second newline went with its row
    there = ["".join("x" if m else "." for m in row) for row in left.mask.tolist()]
    assert there == ["xxxx...xx", "...x.xxxx"]
    assert left.newlines is not None and left.newlines[:, 1].tolist() == [3, 6]
    assert left.visual.sum(-1).tolist() == [2, 1]
    again = left.narrowed(torch.zeros(2, 4, dtype=torch.bool))
    assert not again.visual.any() and again.mask.sum(-1).tolist() == [3, 3]


def test_stages_at_the_same_layer_see_what_is_left() -> None:
    seen: list[list[int]] = []

    class First(vtc.Method):
        site = "llm_layer"
        count = "adaptive"

        def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
            return (1,)

        def layer_cut(self, view: LayerView, budget: Budget) -> torch.Tensor:
            seen.append(view.valid.sum(-1).tolist())
            order = view.valid.long().cumsum(-1)
            return view.valid & (order < order[:, -1:])

    class Other(First):
        def llm_layers(self, facts: Facts, budget: Budget | None = None) -> tuple[int, ...]:
            return (2,)

    made = vtc.compose(First(), Other(), First()).on(FACTS)
    view = layer_view(["tvvnvvntt"])
    assert made.llm_layers(FACTS) == (1, 2)
    assert made.layer_cut(view, Budget(None)).tolist() == [[True, True, False, False]]
    assert seen == [[4], [3]]

    class Wrong(First):
        def layer_cut(self, view: LayerView, budget: Budget) -> torch.Tensor:
            return view.valid[:, :1]

    with pytest.raises(vtc.VtcError, match=r"'Wrong' decided torch.bool of \(1, 1\) after decoder"):
        vtc.compose(Wrong(), First()).on(FACTS).layer_cut(view, Budget(None))
    with pytest.raises(OptionError, match=r"of no model, expected on\(facts\) first"):
        vtc.compose(First()).layer_cut(view, Budget(None))


def test_rules_of_several_stages() -> None:
    class Masking(vtc.Method):
        site = "llm_rows"
        count = "adaptive"
        at: int = 0

        def rule_layers(self, facts: Facts) -> tuple[int, ...]:
            return (1,)

        def layer_rule(self, view: RowView, rule: LayerRule) -> LayerRule:
            unread = torch.zeros_like(view.visual)
            unread[:, self.at] = True
            return dataclasses.replace(rule, unread=unread)

    class Second(Masking):
        at = 2

    class Moving(Masking):
        def layer_rule(self, view: RowView, rule: LayerRule) -> LayerRule:
            how = Redistribution(0.5, 0.5, 0.1)
            return dataclasses.replace(rule, sinks=view.visual.clone(), redistribution=how)

    there = torch.ones(1, 3, dtype=torch.bool)
    view = RowView(
        layer=1,
        hidden=torch.zeros(1, 3, 2),
        mask=there,
        visual=there,
        valid=there,
        columns=torch.arange(3)[None],
        parent=torch.zeros(1, 2, dtype=torch.int64),
    )
    frozen = LayerRule(attention=False)
    rule = vtc.compose(Masking(), Moving(), Second()).on(FACTS).layer_rule(view, frozen)
    assert rule.unread is not None and rule.unread.tolist() == [[True, False, True]]
    assert rule.redistribution is not None and not rule.attention
    other = dataclasses.replace(view, layer=0)
    assert vtc.compose(Masking()).on(FACTS).layer_rule(other, frozen) is frozen
    with pytest.raises(OptionError, match="two stages redistribute the attention of the same la"):
        vtc.compose(Moving(), Moving()).on(FACTS).layer_rule(view, frozen)


def test_plans_are_put_together() -> None:
    both = vtc.compose(("naavit", None, {"layers": (0, 2)}), ("shortv", None, {"layers": (2, 3)}))
    from vtc.plans import layers_as_tokens

    facts = dataclasses.replace(FACTS, llm_depth=4)
    plan = both.plan(layers_as_tokens(4), facts, Budget(None))
    assert [rule.attention for rule in plan.rules] == [False, True, False, False]
    assert [rule.ffn for rule in plan.rules] == [True, True, False, False]
    assert vtc.compose(("vtc_cls", 0.5)).plan(layers_as_tokens(4), facts, Budget(None)).is_stock


def test_stages_know_the_model() -> None:
    """What a stage learns of it is learnt in a composition too."""
    both = vtc.compose(("vtc_cls", 0.5), ("sink_removal", None, {"dims": (3,), "layer": 8}))
    assert both.llm_layers(FACTS) == (7,)
    facts = dataclasses.replace(FACTS, llm_width=2)
    with pytest.raises(OptionError, match=r"expected at least one, each in 0\.\.1"):
        both.on(facts)
    assert isinstance(both.on(dataclasses.replace(FACTS, llm_width=8)).stages[0].method, VtcCls)


def test_the_example_in_the_readme(llava: Any, make_inputs: Any, capsys: Any) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "compose" in b)
    inputs = make_inputs([[3, None, 4]])
    exec(block, {"vtc": vtc, "model": llava, "inputs": inputs})
    # patches, tokens, and behind the second stage's cut in the LLM
    assert capsys.readouterr().out == "[[18], [4], [4]]\n"
