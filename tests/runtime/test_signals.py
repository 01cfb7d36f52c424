"""What the runtime reads off an encoder, against the stock tower on eager attention."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import vtc
from tests.kit.matrix import cached_inputs, model_of, run
from tests.kit.models import build_model
from vtc.types import Budget, Selection, Signal, Tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


class Reader(vtc.Method):
    """Keeps half and remembers what it saw."""

    count = "adaptive"
    wanted: ClassVar[tuple[Signal, ...]] = ()
    seen: ClassVar[list[Tokens]] = []

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.wanted

    def select(self, tokens: Tokens, budget: Budget) -> Selection:
        self.seen.append(tokens)
        even = torch.arange(tokens.valid.shape[1]) % 2 == 0
        return Selection.of_mask(
            tokens.valid & even, tokens.lengths, tokens.parent, tokens.grid, tokens.parts
        )


def read(family: str, prompt: str, *wanted: Signal) -> Tokens:
    """What a method that needs these signals is given."""
    Reader.wanted, model = wanted, model_of(family)
    Reader.seen.clear()
    with vtc.patch(model, Reader()):
        run(model, cached_inputs(family, prompt), max_new_tokens=1)
    return Reader.seen.pop()


def tower_of(pixels: Tensor) -> Any:
    """Attention and hidden states of the tiny LLaVA's encoder, eager."""
    model = build_model("llava")
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        return tower(pixels, output_attentions=True, output_hidden_states=True), tower


def test_rows_of_attention_and_vectors_are_those_of_the_stock_tower() -> None:
    tokens = read(
        "llava",
        "ragged",
        Signal("received_row", (1, 3)),
        Signal("cls_row", ends_at_tap=True),
        Signal("encoder_features", ends_at_tap=True),
        Signal("keys", (-1,)),
        Signal("mean_keys", (2,)),
        Signal("cls_row_joint", (-1,)),
    )
    out, tower = tower_of(cached_inputs("llava", "ragged")["pixel_values"])
    maps = torch.stack(out.attentions, 1).mean(2)  # [G, L, 1 + N, 1 + N]
    tap = len(out.attentions) - 2
    want = {
        "received_row": maps.mean(2)[:, [1, 3], 1:],
        "cls_row": maps[:, [tap], 0, 1:],
        "encoder_features": out.hidden_states[-2][:, 1:],
    }
    for name, value in want.items():
        torch.testing.assert_close(tokens.signal(name), value, **CLOSE)
    for block, name in ((len(maps[0]) - 1, "keys"), (2, "mean_keys")):
        layer = tower.encoder.layers[block] if hasattr(tower, "encoder") else None
        layer = layer or tower.vision_model.encoder.layers[block]
        x = layer.layer_norm1(out.hidden_states[block])
        key = layer.self_attn.k_proj(x)
        if name == "keys":
            torch.testing.assert_close(tokens.signal("keys"), key[:, 1:].detach(), **CLOSE)
            query = layer.self_attn.q_proj(x)[:, :1]
            joint = (query @ key.mT / key.shape[-1] ** 0.5).softmax(-1)
            got = tokens.signal("cls_row_joint")
            torch.testing.assert_close(got, joint[:, :, 1:].detach(), **CLOSE)
        else:
            heads = key[:, 1:].unflatten(-1, (layer.self_attn.num_heads, -1))
            torch.testing.assert_close(tokens.signal(name), heads.mean(2).detach(), **CLOSE)


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl", "internvl", "llava_next"])
def test_features_through_the_projector_are_the_tokens(family: str) -> None:
    """Packing, windows and merging put vectors where the tokens are."""
    tokens = read(family, "ragged", Signal("encoder_features", ends_at_tap=True))
    found = tokens.signal("encoder_features")
    assert found.shape[:2] == tokens.valid.shape
    assert (found.masked_fill(tokens.valid[..., None], 0) == 0).all()
    model = model_of(family)
    if family in ("llava_siglip", "llava_next"):
        with torch.no_grad():
            through = model.model.multi_modal_projector(found)
        torch.testing.assert_close(through[tokens.valid], tokens.features[tokens.valid], **CLOSE)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "internvl"])
def test_rows_of_the_encoder(family: str) -> None:
    tokens = read(family, "ragged", Signal("encoder_row"))
    rows = tokens.signal("encoder_row")
    assert tokens.parts is not None and tokens.overview is not None
    for g, parts in enumerate(tokens.parts):
        mine = rows[g, : tokens.lengths[g]]
        first, end = tokens.overview[g]
        if len(parts) == 1:
            assert (mine == 0).all()
            continue
        inside = mine[first:end].unique()
        assert len(inside) == 1
        outside = torch.cat([mine[:first], mine[end:]]).unique()
        assert len(outside) > 1 and inside not in outside


def test_frames_of_a_video() -> None:
    for family in ("qwen2_vl", "llava_onevision"):
        tokens = read(family, "video", Signal("encoder_row"))
        t, h, w = tokens.grid[0]
        want = torch.arange(t).repeat_interleave(h * w)
        assert torch.equal(tokens.signal("encoder_row")[0], want)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_text_behind_the_last_image(family: str) -> None:
    prompt = "mixed: two images, one image, text only"
    tokens, inputs = read(family, prompt, Signal("text")), cached_inputs(family, prompt)
    assert tokens.text is not None and tokens.text_valid is not None
    table = model_of(family).get_input_embeddings().weight
    for row, count in ((0, 5), (1, 9)):
        # Qwen has a token of its own behind an image
        got = tokens.text[row, tokens.text_valid[row]][-count:]
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].bool()][-count:]
        assert torch.equal(got, table[ids].detach())
    assert not tokens.text_valid[2].any()


def test_no_text_behind_an_image_is_refused() -> None:
    from tests.kit.prompts import build_inputs

    Reader.wanted, model = (Signal("text"),), model_of("llava")
    inputs = build_inputs("llava", [[4, "image"]])
    with vtc.patch(model, Reader()), pytest.raises(vtc.VtcError, match="row ends with an image"):
        run(model, inputs, max_new_tokens=1)


def test_vectors_of_several_blocks_are_refused() -> None:
    Reader.wanted = (Signal("keys", (1, 2)),)
    with pytest.raises(vtc.VtcError, match=r"'keys' was asked for of 2 blocks, expected one"):
        vtc.patch(model_of("llava"), Reader())
