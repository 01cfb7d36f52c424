"""What text looks at in a decoder layer, for methods that cut between layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vtc import ops
from vtc.checks import require_none
from vtc.errors import InputError
from vtc.scorers.base import Scorer
from vtc.scorers.flow import last_entry
from vtc.sites import LayerView
from vtc.types import Signal, Tokens


@dataclass(frozen=True)
class LastRow(Scorer):
    """Attention that the last entry of the prompt pays to each visual token of it, heads averaged.

    The softmax runs over all that the entry may attend to, text and cache included. Only methods
    that cut between decoder layers can give it.

    Args:
        ahead: that of the layer behind the cut instead, as it would be without it.
    """

    name: ClassVar[str] = "last_row"
    ahead: bool = False

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The row of one layer."""
        return (Signal("next_last_row" if self.ahead else "last_row"),)

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        return tokens.signal(self.needs[0].key)


def last_row(view: LayerView) -> Tensor:
    """The row of `LastRow`, `float32[G, N]`, 0 on padding.

    Raises:
        InputError: a prompt ends with its image.
    """
    last = last_entry(view)
    row = view.parent[:, 1]
    require_none(
        view.visual.gather(1, last[:, None])[row],
        InputError(
            "the method asks the last token of a prompt what it looks at, expected text after the "
            "image, got a prompt that ends with it: put text there"
        ),
    )
    at = last[:, None, None, None].expand(-1, view.query.shape[1], 1, view.query.shape[3])
    query = view.query.gather(2, at)
    return of_tokens(view, ops.attention_rows(query, view.key, view.scale, view.reachable)[:, 0])


def next_last_row(view: LayerView) -> Tensor:
    """The same of the layer behind the cut."""
    return last_row(view.next_layer())


def text_after(view: LayerView) -> Tensor:
    """The entries of each row behind its last visual token, `bool[B, S]`; none in rows without."""
    seen = view.visual & view.mask
    so_far = seen.cumsum(-1)
    everything = so_far[:, -1:]
    return view.mask & ~seen & (so_far == everything) & (everything > 0)


def asked_text(view: LayerView) -> Tensor:
    """`text_after`, where a method cannot do without.

    Raises:
        InputError: a prompt ends with its image.
    """
    text, seen = text_after(view), view.visual & view.mask
    if bool((seen.any(-1) & ~text.any(-1)).any()):
        raise InputError(
            "the method asks the text behind an image what it looks at, expected some, got a "
            "prompt that ends with its image: put text there"
        )
    return text


def of_tokens(view: LayerView, row: Tensor) -> Tensor:
    """Numbers of keys `[B, T]` as those of the visual tokens `[G, N]`, 0 on padding."""
    past = row.shape[1] - view.mask.shape[1]
    return row[view.parent[:, 1:], view.columns + past].masked_fill(~view.valid, 0)
