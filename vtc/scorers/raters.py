"""What the words that an image has something to do with look at (SparseVLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtc import ops
from vtc.entrance import Entrance
from vtc.errors import UnsupportedModeError, VtcError
from vtc.scorers.base import Scorer
from vtc.scorers.layer_rows import asked_text, of_tokens
from vtc.sites import LayerView
from vtc.types import Signal, Tokens, round_half_up

# of the 32 heads of the models it was published for, those that look at the image most
_HEADS, _OF_HEADS = 14, 32


@dataclass(frozen=True)
class RaterRows(Scorer):
    """Attention of a decoder layer, heads averaged, of the raters to each visual token: the mean
    over raters.

    Raters are the text tokens behind the last image whose input embedding answers to the visual
    tokens': with M the mean over visual tokens of softmax over text of v·t, those above the mean of
    M. Only methods that cut between decoder layers can give it.

    Args:
        corrected: attention is divided by what rotary positions alone make of it (q·k of all-ones
            queries and keys), and of the heads only 14 of 32, those with the largest sum over
            raters and visual tokens, count.
    """

    name: ClassVar[str] = "rater_rows"
    corrected: bool = False

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The rows of one layer."""
        return (Signal("rater_rows_corrected" if self.corrected else "rater_rows"),)

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        return tokens.signal(self.needs[0].key)


def raters(view: LayerView) -> Tensor:
    """Entries of each row that rate, `bool[B, S]`; none in rows without images.

    All text where no token is above the mean, such as a single one.
    """
    text, entrance = asked_text(view), _entrance(view)
    found = torch.zeros_like(text)
    for b in text.any(-1).nonzero()[:, 0].tolist():
        embeds = entrance.embeds[b].float()
        visual = embeds[entrance.visual[b] & entrance.mask[b]]
        words = embeds[entrance.entry[b][text[b]]]
        share = (visual @ words.T).softmax(-1).mean(0)  # [M]
        above = share > share.mean()
        found[b, text[b]] = above if bool(above.any()) else torch.ones_like(above)
    return found


def rater_rows(view: LayerView) -> Tensor:
    """`float32[G, N]`, heads averaged, 0 on padding."""
    rows = ops.causal_rows(
        view.query, view.key, view.scale, view.mask, raters(view), view.held
    )  # [B, H, T]
    return of_tokens(view, rows.mean(1))


def rater_rows_corrected(view: LayerView) -> Tensor:
    """`float32[G, N]` of the heads that look at visual tokens most, 0 on padding."""
    turned = _turned_ones(_entrance(view).angles)
    rows = ops.causal_rows(
        view.query, view.key, view.scale, view.mask, raters(view), view.held, turned
    )
    heads = rows.shape[1]
    seen = (view.visual & view.mask)[:, None]
    looks = rows[..., rows.shape[2] - seen.shape[2] :].masked_fill(~seen, 0).sum(-1)  # [B, H]
    count = max(1, round_half_up(heads * _HEADS / _OF_HEADS))
    chosen = looks.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return of_tokens(view, rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[2])).mean(1))


def _turned_ones(angles: tuple[Tensor, Tensor]) -> Tensor:
    """All-ones vectors at the rotary positions of the entries, `[B, S, d]`."""
    cosine, sine = (x.float() for x in angles)
    if cosine.dim() != 3:
        raise UnsupportedModeError(
            f"this version of transformers gives rotary angles {tuple(cosine.shape)} for three "
            "axes, expected them joined, [B, S, d]: use transformers 5.17 or later"
        )
    half = cosine.shape[-1] // 2
    sign = torch.ones(cosine.shape[-1], device=cosine.device)
    sign[:half] = -1
    return cosine + sine * sign


def _entrance(view: LayerView) -> Entrance:
    if view.entrance is None:
        raise VtcError(
            f"the view of decoder layer {view.layer} does not know the input embeddings, expected "
            "one made by vtc.patch"
        )
    return view.entrance()
