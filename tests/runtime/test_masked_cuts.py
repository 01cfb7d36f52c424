"""Cuts inside a captured encoder: what is hidden is as good as gone, and the host reads nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vtc
from tests.kit.models import PLACEHOLDERS, build_model
from tests.kit.prompts import build_inputs
from vtc import ops
from vtc.errors import VtcError
from vtc.runtime.short import gather_groups
from vtc.scorers import ClsAttention, Scorer
from vtc.types import Budget, Signal

# rows of their own, and packed in one sequence, within windows
CAPTURED = (
    "llava", "llava_siglip", "llava_next", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl",
)  # fmt: skip
CASES: dict[str, list[list[Any]]] = {
    "one": [[3, ("image", 24, 48), 5]],
    "ragged": [[4, ("image", 48, 48), 5], [2, ("image", 24, 24), 9]],
    "several": [[4, ("image", 24, 24), 2, ("image", 48, 24), 5], [2, ("image", 24, 40), 9], [7]],
}
# OneVision makes canvases smaller, but for those of two crops and images that are not alone
OWN = {"llava_onevision": {"ragged": [[4, ("image", 16, 32), 5], [2, ("image", 32, 16), 9]]}}


@cache
def model_of(family: str, blocks: int = 8) -> Any:
    return build_model(family, blocks=blocks)


def inputs_of(family: str, case: str, seed: int = 0) -> dict[str, Any]:
    rows = OWN.get(family, {}).get(case, CASES[case])
    if family == "llava_onevision" and case == "several":
        rows = [row for row in rows if len(row) != 3]
    return build_inputs(family, rows, seed=seed)


def generated(model: Any, inputs: Any) -> Tensor:
    return model.generate(  # type: ignore[no-any-return]
        **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=PLACEHOLDERS
    )


def features_of(handle: vtc.Handle) -> Tensor:
    """What a captured encoder gave, `[G, N, D]`."""
    session = handle._session
    images, encoded = session.last.images, session.encoded  # type: ignore[union-attr]
    assert encoded is not None
    there = images.places.amax(0) + 1
    embeds = encoded.features.new_zeros(*there.tolist(), encoded.features.shape[-1])
    return gather_groups(images, encoded.into(embeds, images))


def compare(
    model: Any, inputs: Any, keep: Any, encoder: str = "eager", **options: Any
) -> tuple[vtc.Handle, Tensor]:
    """Captured, then replayed, against the plain path; returns the handle and features."""
    seen: list[Tensor] = []
    with vtc.patch(model, "flowcut", keep, **options) as plain:
        session = plain._session
        decide = session.decide

        def spy(images: Any, features: Tensor, given: Any) -> Any:
            seen.append(features)
            return decide(images, features, given)

        session.decide = spy  # type: ignore[method-assign]
        tokens = generated(model, inputs)
        want = plain.report()
    with vtc.patch(model, "flowcut", keep, fast="eager", **options) as fast:
        for _ in range(2):
            assert torch.equal(generated(model, inputs), tokens)
            got = fast.report()
            assert got.block_patches == want.block_patches
            assert got.llm_tokens == want.llm_tokens and got.kept_tokens == want.kept_tokens
            assert len(fast.selections) == len(plain.selections)
            both = [*fast.selections, *fast.token_selections]
            expected = [*plain.selections, *plain.token_selections]
            for mine, theirs in zip(both, expected, strict=True):
                assert torch.equal(mine.mask(), theirs.mask())
                assert (mine.lengths, mine.grid) == (theirs.lengths, theirs.grid)
        assert got.fast["encoder"] == encoder
        if encoder == "eager":
            left = fast.token_selections[0].mask()
            torch.testing.assert_close(
                features_of(fast)[left], seen[-1][left], atol=2e-5, rtol=1e-4
            )
    return fast, seen[-1]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("keep", [5, 0.3])
@pytest.mark.parametrize("family", CAPTURED)
def test_hidden_is_as_good_as_gone(family: str, keep: Any, case: str) -> None:
    fast, _ = compare(model_of(family), inputs_of(family, case), keep, llm_cut="off")
    report = fast.report()
    assert report.block_patches[0] > report.block_patches[-1]
    assert set(report.fast.values()) == {"eager"}


@pytest.mark.parametrize("family", CAPTURED)
def test_with_a_cut_in_the_llm(family: str) -> None:
    fast, _ = compare(model_of(family), inputs_of(family, "ragged"), 0.2)
    told = fast.report().fast
    assert told["prefill"] == "eager"
    assert ("decides between decoder layers" in told["decode"]) == (family != "llava")


@pytest.mark.parametrize("keep", [2, 3, 0.2, 0.5, 0.9, 35])
def test_any_budget(keep: Any) -> None:
    fast, _ = compare(model_of("llava"), inputs_of("llava", "several"), keep, llm_cut="off")
    assert fast.report().kept_tokens == (Budget.of(keep).count(36),) * 3


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_few_blocks(blocks: int) -> None:
    compare(model_of("llava", blocks), inputs_of("llava", "ragged"), 0.3)


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_copies_of_an_image_are_cut_alike(family: str) -> None:
    inputs = build_inputs(family, [[3, ("image", 24, 24), 5], [4, ("image", 24, 24), 2]])
    inputs["pixel_values"][1] = inputs["pixel_values"][0]
    fast, _ = compare(model_of(family), inputs, 0.3, llm_cut="off")
    for selection in fast.selections:
        assert torch.equal(selection.keep[0], selection.keep[1])
    inputs["pixel_values"][:] = 0.5  # and all patches of one picture are alike
    compare(model_of(family), inputs, 0.3, llm_cut="off")


def test_rows_that_drop_together() -> None:
    inputs = inputs_of("llava", "several")
    fast, _ = compare(model_of("llava"), inputs, 0.2, llm_cut="off", batch_coupled=True)
    alone, _ = compare(model_of("llava"), inputs, 0.2, llm_cut="off")
    assert fast.report().block_patches != alone.report().block_patches


class _Norms(Scorer):
    """Long values first."""

    name = "norms"

    def __call__(self, tokens: Any) -> Tensor:
        return tokens.features.float().norm(dim=-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scorer", [_Norms(), ClsAttention(Signal("cls_row", (-1,)))])
@pytest.mark.parametrize("family", ["llava", "internvl", "qwen2_5_vl"])
def test_other_scorers(family: str, scorer: Scorer) -> None:
    fast, _ = compare(model_of(family), inputs_of(family, "ragged"), 0.3, scorer=scorer)
    own, _ = compare(model_of(family), inputs_of(family, "ragged"), 0.3)
    assert not torch.equal(fast.selections[0].mask(), own.selections[0].mask())


class _Nan(Scorer):
    """Scores that are not numbers in the beginning."""

    name = "nan"

    def __call__(self, tokens: Any) -> Tensor:
        zeros = torch.zeros(tokens.valid.shape)
        return zeros / zeros if bool(tokens.valid.all()) else zeros


def test_scores_that_are_not_numbers_are_found() -> None:
    model, inputs = model_of("llava"), inputs_of("llava", "one")
    with (
        vtc.patch(model, "flowcut", 6, scorer=_Nan(), fast="eager"),
        pytest.raises(VtcError, match="NaN scores"),
    ):
        generated(model, inputs)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"selector": "uniform"}, "'uniform'"), ({"scorer": "random"}, "draws numbers on the host")],
)
def test_what_the_host_decides_runs_as_before(options: dict[str, Any], reason: str) -> None:
    model, inputs = model_of("llava"), inputs_of("llava", "ragged")
    with vtc.patch(model, "flowcut", 0.3, fast="eager", **options) as handle:
        generated(model, inputs)
    said = handle.report().fast["encoder"]
    assert reason in said
    compare(model, inputs, 0.3, encoder=said, **options)


def test_calls_and_budgets_take_turns() -> None:
    """What one call left is not another's, whichever is replayed."""
    model = model_of("llava")
    with vtc.patch(model, "flowcut", 0.5, fast="eager") as handle:
        for _ in range(2):
            for keep in (0.5, 1.0, 4):
                handle.set(keep=keep)
                for seed in (1, 2):
                    inputs = inputs_of("llava", "ragged", seed)
                    got, report = generated(model, inputs), handle.report()
                    found = handle.selections
                    with vtc.patch(build_model("llava", blocks=8), "flowcut", keep) as plain:
                        want = generated(plain._model, inputs)
                    assert torch.equal(got, want)
                    assert report.block_patches == plain.report().block_patches
                    assert len(found) == len(plain.selections)
                    for mine, theirs in zip(found, plain.selections, strict=True):
                        assert torch.equal(mine.mask(), theirs.mask())


def test_behind_it_other_stages_choose() -> None:
    model, inputs = model_of("llava"), inputs_of("llava", "several")
    method = vtc.compose(("flowcut", 0.5, {"llm_cut": "off"}), ("vtc_cls", 0.2))
    with vtc.patch(model, method) as plain:
        want = generated(model, inputs)
    with vtc.patch(model, method, fast="eager") as fast:
        for _ in range(2):
            assert torch.equal(generated(model, inputs), want)
    said = fast.report().fast
    assert said["encoder"] == said["prefill"] == "eager"
    assert "what cuts inside the encoder left" in said["selection"]
    for mine, theirs in zip(fast.selections, plain.selections, strict=True):
        assert torch.equal(mine.mask(), theirs.mask())


@pytest.mark.parametrize("n", [1, 7, 63])
def test_a_mask_by_counts_of_the_device_is_that_of_the_host(n: int) -> None:
    g = torch.Generator().manual_seed(n)
    scores = torch.randint(0, 4, (5, n), generator=g).float()  # ties
    scores[0] = float("-inf")
    valid = torch.rand(5, n, generator=g) < 0.8
    counts = (valid.sum(-1) * torch.rand(5, generator=g)).round().long()
    keep, there = ops.group_topk(scores, valid, counts)
    want = torch.zeros(5, n + 1).scatter(1, keep.masked_fill(~there, n), 1)[:, :-1].bool()
    assert torch.equal(ops.topk_mask(scores, valid, counts), want)


def test_a_window_that_is_all_hidden_gives_numbers_in_half_precision() -> None:
    """Its logits are far below 0, as biases make them: -65504 and less than -16 is -inf."""
    model = build_model("qwen2_5_vl", blocks=8).half()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for block in model.model.visual.blocks:
            block.attn.qkv.bias.view(3, -1)[:2] += torch.tensor([[3.0], [-3.0]])
    inputs = build_inputs("qwen2_5_vl", [[3, ("image", 72, 72), 5]])
    inputs["pixel_values"] = inputs["pixel_values"].half()
    with vtc.patch(model, "flowcut", 2, llm_cut="off", fast="eager") as fast:
        generated(model, inputs)
        # of nine by nine units in windows of two by two fewer are left than there are windows, in
        # front of a block that attends over all
        assert fast.report().block_patches[6] < 4 * 25
        assert features_of(fast).isfinite().all()


class Unread(TorchDispatchMode):
    """Within it, numbers made from given tensors must not be looked at: not as Python numbers, and
    not as shapes."""

    reads = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique", "bincount")

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}  # held, so that no address comes twice
        self.add(given)

    def add(self, tensors: Any) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                self.made[x.untyped_storage()._cdata] = x

    def holds(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self.made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if any(map(self.holds, tree_leaves((args, kwargs)))):
            assert not any(word in name for word in self.reads), f"{func} reads"
            if name in ("index", "index_put", "index_put_"):
                at = [x for x in args[1] if self.holds(x)]
                assert all(x.dtype != torch.bool for x in at), f"{func} takes a mask"
            assert not (name == "repeat_interleave" and "Tensor" in str(func)), f"{func} reads"
            out = func(*args, **kwargs)
            self.add(out)
            return out
        return func(*args, **kwargs)

    def refusing(self, name: str, stock: Callable[..., Any]) -> Callable[..., Any]:
        def read(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert not self.holds(x), f"Tensor.{name} reads"
            return stock(x, *args, **kwargs)

        return read


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Unread]:
    def make(*given: Tensor) -> Unread:
        mode = Unread(*given)
        for name in ("cpu", "tolist", "numpy", "item", "__bool__", "__int__", "__float__"):
            stock = getattr(Tensor, name)
            monkeypatch.setattr(Tensor, name, mode.refusing(name, stock))
        return mode

    return make


def test_the_guard_sees_who_reads(unread: Callable[..., Unread]) -> None:
    x = torch.tensor([1.0, 2.0])
    guard = unread(x)
    looks: list[Callable[[Tensor], Any]] = [
        lambda y: y.tolist(),
        lambda y: bool(y.any()),
        lambda y: int(y.sum()),
        lambda y: y[y > 1],
        lambda y: y.cpu(),
        lambda y: torch.equal(y, y),
        lambda y: (y > 1).nonzero(),
    ]
    with guard:
        _ = (x + torch.arange(2)).sort().values * 2
        for look in looks:
            with pytest.raises(AssertionError, match=r"reads|mask"):
                look(x * 2)


@pytest.mark.parametrize("case", ["one", "ragged"])
@pytest.mark.parametrize("family", CAPTURED)
@torch.no_grad()
def test_nothing_is_read(family: str, case: str, unread: Callable[..., Unread]) -> None:
    """Of the encoder with its cuts, and of the decision before the LLM."""
    model, inputs = model_of(family), inputs_of(family, case)
    with vtc.patch(model, "flowcut", 0.3, llm_cut="off", fast="eager") as handle:
        graphs = handle._session.fast.graphs  # type: ignore[union-attr]
        runs: list[Any] = []
        run = graphs.run

        def watched(key: Any, function: Any, given: list[Tensor], **more: Any) -> Any:
            runs.append((key[0], partial(function, *[x.clone() for x in given]), given))
            return run(key, function, given, **more)

        graphs.run = watched  # type: ignore[method-assign]
        generated(model, inputs)
        found = {name: (function, given) for name, function, given in runs}
        for name in ("encoder", "selection"):
            function, _ = found[name]
            guard = unread(*function.args)
            with guard:
                function()
            assert len(guard.made) > 20


def test_masks_begin_where_kernels_want_them() -> None:
    model, inputs = model_of("llava"), inputs_of("llava", "ragged")
    masks: list[Tensor] = []
    stock = F.scaled_dot_product_attention

    def see(*args: Any, **kwargs: Any) -> Any:
        if (mask := kwargs.get("attn_mask")) is not None and mask.shape[-1] == 37:
            masks.append(mask)
        return stock(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patched, vtc.patch(model, "flowcut", 4, fast="eager"):
        patched.setattr(F, "scaled_dot_product_attention", see)
        generated(model, inputs)
    assert masks and all(m.stride(0) % 16 == 0 and m.stride(-1) == 1 for m in masks)
    assert all(m[..., 0].eq(0).all() for m in masks)  # [CLS] is always there
