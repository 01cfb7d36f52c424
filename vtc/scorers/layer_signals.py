"""What scorers may ask of a decoder layer, by the name of the signal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from vtc.scorers.layer_rows import last_row, next_last_row
from vtc.scorers.raters import rater_rows, rater_rows_corrected
from vtc.sites import LayerView
from vtc.types import Signal, Tokens

READERS: Mapping[str, Callable[[LayerView], Tensor]] = {
    "last_row": last_row,
    "next_last_row": next_last_row,
    "rater_rows": rater_rows,
    "rater_rows_corrected": rater_rows_corrected,
}


def seen_tokens(view: LayerView, needs: Iterable[Signal] = ()) -> Tokens:
    """The visual tokens of every group, their hidden states as features, with what is needed.

    Args:
        view: of one decoder layer.
        needs: named as in `READERS`, or `"image_key"`.
    """
    signals = {need.key: READERS[need.name](view) for need in needs if need.name in READERS}
    hidden = view.query.new_zeros(*view.mask.shape, 0) if view.hidden is None else view.hidden
    return view.as_tokens(hidden[view.parent[:, 1:], view.columns], signals)
