"""Attention rows of encoder blocks for methods that decide before the LLM."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vtc import ops
from vtc.adapters.base import Encoder
from vtc.errors import SignalError
from vtc.runtime.layouts import PackedLayout, RowLayout
from vtc.runtime.rows import Run
from vtc.types import LLM_HIDDEN, Signal

_PIXELS = "image_key"
_ROWS = {"mean_query_row": ops.mean_query_row, "received_row": ops.attention_received}
# what is computed in the place of a [CLS] row, where a method declares it
STAND_INS = {
    "mean_query_row": "attention of the mean query",
    "received_row": "attention received, mean over queries",
    "random_row": "random numbers",
}


class EncoderSignals:
    """Captures exactly the encoder signals that a method needs.

    Args:
        encoder: the tower's description.
        needs: the method's signals.

    Attributes:
        stand_in: what is read instead of [CLS] rows, or None.

    Raises:
        SignalError: the encoder cannot give one of them, or a block window is empty on its depth.
    """

    def __init__(self, encoder: Encoder, needs: tuple[Signal, ...]) -> None:
        self._encoder = encoder
        self.windows = {
            s: s.resolve(encoder.depth, encoder.tap) for s in needs if s.name == "cls_row"
        }
        known = ("cls_row", _PIXELS, LLM_HIDDEN)
        if unknown := sorted({s.name for s in needs} - set(known)):
            raise SignalError(f"signal {unknown[0]!r} is unknown; expected one of {known}")
        self.kinds = {s: self._kind(s) for s in self.windows}
        stand_ins = [STAND_INS[k] for k in self.kinds.values() if k != "cls_row"]
        self.stand_in = " and ".join(dict.fromkeys(stand_ins)) or None
        # by block and run: the rows `[R, U]` of each kind
        self._found: dict[tuple[int, str], list[Tensor]] = {}
        self._chunks: dict[int, list[tuple[Tensor, Tensor, float]]] = {}

    def _kind(self, signal: Signal) -> str:
        if self._encoder.has_cls:
            return "cls_row"
        if signal.stand_in is None:
            raise SignalError(
                "this method scores patches by the attention of [CLS], expected an encoder with a "
                "[CLS] token but this one has none; choose a method without it (see `vtc methods`)"
            )
        if signal.stand_in not in STAND_INS:
            raise SignalError(
                f"stand-in {signal.stand_in!r} for [CLS] is unknown; expected one of "
                f"{sorted(STAND_INS)}"
            )
        return signal.stand_in

    @property
    def blocks(self) -> tuple[int, ...]:
        """The encoder blocks that are probed."""
        read = [w for s, w in self.windows.items() if self.kinds[s] != "random_row"]
        return tuple(sorted({b for window in read for b in window}))

    @property
    def draws(self) -> tuple[Signal, ...]:
        """The signals that are random numbers on this encoder."""
        return tuple(s for s, kind in self.kinds.items() if kind == "random_row")

    def clear(self) -> None:
        """Forget what an earlier call left."""
        self._found.clear()
        self._chunks.clear()

    def see(self, block: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Note one attention call of a block; a [CLS] needs one query of it alone."""
        if self._encoder.has_cls:
            query = query[:, :, :1]
        self._chunks.setdefault(block, []).append((query, key, scale))

    def finish(self, run: Run) -> None:
        """The tower has run over `run`: turn what was seen into rows."""
        for block, chunks in self._chunks.items():
            scale = chunks[0][2]
            key = run.assembled([k for _, k, _ in chunks])
            if self._encoder.has_cls:
                rows = ops.attention_rows(run.assembled([q for q, _, _ in chunks]), key, scale)
                self._note(block, "cls_row", run.by_unit(rows[:, 0, 1:]))
                continue
            query = run.assembled([q for q, _, _ in chunks])
            valid = run.patches_valid
            if valid is None:
                valid = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
            for kind in {k for s, k in self.kinds.items() if block in self.windows[s]}:
                if kind != "random_row":
                    rows = _ROWS[kind](query, key, scale, valid)
                    self._note(block, kind, run.by_unit(rows))
        self._chunks.clear()

    def finish_block(self, block: int, layout: RowLayout | PackedLayout) -> None:
        """A block of a tower that is being cut has run: turn what was seen into rows.

        Attention is among the patches that are left; units that are gone get 0.
        """
        chunks = self._chunks.pop(block, None)
        if chunks is None:
            return
        queries = [query.to(layout.device) for query, _, _ in chunks]
        keys = [key.to(layout.device) for _, key, _ in chunks]
        key, scale = layout.assembled(keys), chunks[0][2]
        patches = layout.valid.repeat_interleave(layout.m, 1)
        found = {}
        if self._encoder.has_cls:
            there = torch.cat([patches.new_ones(len(patches), 1), patches], 1)
            found["cls_row"] = ops.attention_rows(queries[0], key, scale, there)[:, 0, 1:]
        else:
            query = layout.assembled(queries)
            for kind in {k for s, k in self.kinds.items() if block in self.windows[s]}:
                if kind != "random_row":
                    found[kind] = _ROWS[kind](query, key, scale, patches)
        for kind, rows in found.items():
            self._note(block, kind, layout.spread(rows.unflatten(1, (-1, layout.m)).mean(-1)))

    def _note(self, block: int, kind: str, rows: Tensor) -> None:
        self._found.setdefault((block, kind), []).append(rows)

    def read(
        self, runs: list[Run], needs: Iterable[Signal] | None = None
    ) -> dict[str, list[Tensor]]:
        """By key, for each image and video `float32[L, N]` in LLM tokens.

        Args:
            runs: of the tower in this call.
            needs: the signals that are read; None: all.

        Raises:
            SignalError: a block was not run in this call.
        """
        out = {}
        for signal in self.windows if needs is None else needs:
            if (kind := self.kinds.get(signal, "random_row")) == "random_row":
                continue
            window = self.windows[signal]
            missing = [b for b in window if len(self._found.get((b, kind), [])) != len(runs)]
            if missing:
                raise SignalError(
                    f"signal {signal.name!r}: encoder blocks {missing} were not run in this call; "
                    "pass pixel_values, not features computed before"
                )
            parts: list[Tensor] = []
            for i, run in enumerate(runs):
                # blocks of a tower spread over devices leave them in several places
                device = self._found[window[-1], kind][i].device
                rows = torch.stack([self._found[b, kind][i].to(device) for b in window])
                parts += run.to_tokens(rows)  # [L, R, U]
            out[signal.key] = parts
        return out
