"""What encoder blocks say of patches, for methods that decide before the LLM: rows of attention,
keys and features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vtc import ops
from vtc.adapters.base import Encoder
from vtc.errors import SignalError
from vtc.runtime.layouts import RowLayout
from vtc.runtime.packed_layout import PackedLayout
from vtc.runtime.rows import Run
from vtc.types import CLS_FEATURES, ENCODER_ROW, LLM_HIDDEN, TEXT, Signal

_PIXELS = "image_key"
_FEATURES = "encoder_features"
_OF_CLS = ("cls_row", "cls_row_joint")
_KEYS = ("keys", "mean_keys")
_OUTPUTS = (_FEATURES, CLS_FEATURES)
_OF_BLOCKS = (*_OF_CLS, "received_row", *_KEYS, *_OUTPUTS)
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
        SignalError: the encoder cannot give one of them, a block window is empty on its depth, or
            vectors were asked for of several blocks.
    """

    def __init__(self, encoder: Encoder, needs: tuple[Signal, ...]) -> None:
        self._encoder = encoder
        self.windows = {
            s: s.resolve(encoder.depth, encoder.tap) for s in needs if s.name in _OF_BLOCKS
        }
        known = (*_OF_BLOCKS, _PIXELS, LLM_HIDDEN, TEXT, ENCODER_ROW)
        if unknown := sorted({s.name for s in needs} - set(known)):
            raise SignalError(f"signal {unknown[0]!r} is unknown; expected one of {known}")
        self.kinds = {s: self._kind(s) for s in self.windows}
        self._check_vectors()
        asked = [(k, s) for s, k in self.kinds.items() if s.name in _OF_CLS]
        stand_ins = [STAND_INS[k] for k, s in asked if k != s.name]
        self.stand_in = " and ".join(dict.fromkeys(stand_ins)) or None
        # by block and run: the rows `[R, U]` of each kind
        self._found: dict[tuple[int, str], list[Tensor]] = {}
        self._chunks: dict[int, list[tuple[Tensor, Tensor, float]]] = {}
        self._outputs: dict[int, list[Tensor]] = {}

    def _check_vectors(self) -> None:
        for signal, window in self.windows.items():
            if signal.name in (*_KEYS, *_OUTPUTS) and len(window) != 1:
                raise SignalError(
                    f"signal {signal.name!r} was asked for of {len(window)} blocks, expected one: "
                    "it is a vector for each token"
                )

    def _kind(self, signal: Signal) -> str:
        if self._encoder.has_cls or signal.name not in _OF_CLS:
            return signal.name
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
        unprobed = ("random_row", *_OUTPUTS)
        read = [w for s, w in self.windows.items() if self.kinds[s] not in unprobed]
        return tuple(sorted({b for window in read for b in window}))

    @property
    def feature_blocks(self) -> tuple[int, ...]:
        """The encoder blocks whose output is read."""
        read = [w for s, w in self.windows.items() if self.kinds[s] in _OUTPUTS]
        return tuple(sorted({b for window in read for b in window}))

    @property
    def needed(self) -> set[tuple[int, str]]:
        """What `read` goes by: blocks and kinds."""
        return {
            (block, kind)
            for signal, kind in self.kinds.items()
            if kind != "random_row"
            for block in self.windows[signal]
        }

    @property
    def found(self) -> dict[tuple[int, str], list[Tensor]]:
        """What the runs of the tower left, by block and kind."""
        return self._found

    def recall(self, found: Mapping[tuple[int, str], list[Tensor]]) -> None:
        """Take what runs over the same pixels left, instead of running once more."""
        self.clear()
        self._found.update(found)

    @property
    def draws(self) -> tuple[Signal, ...]:
        """The signals that are random numbers on this encoder."""
        return tuple(s for s, kind in self.kinds.items() if kind == "random_row")

    def clear(self) -> None:
        """Forget what an earlier call left."""
        self._found.clear()
        self._chunks.clear()
        self._outputs.clear()

    def see(self, block: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Note one attention call of a block; a [CLS] needs one query of it alone."""
        if self._encoder.has_cls and "received_row" not in self._kinds_of(block):
            query = query[:, :, :1]
        self._chunks.setdefault(block, []).append((query, key, scale))

    def see_output(self, block: int, hidden: Tensor) -> None:
        """Note the output of a block, `[R, c + P, D]`, or packed `[T, D]`."""
        self._outputs.setdefault(block, []).append(hidden.detach())

    def _kinds_of(self, block: int) -> tuple[str, ...]:
        """What is read off the attention of a block."""
        found = (k for s, k in self.kinds.items() if block in self.windows[s])
        return tuple(sorted(set(found) - {"random_row", *_OUTPUTS}))

    def finish(self, run: Run) -> None:
        """The tower has run over `run`: turn what was seen into rows and vectors."""
        for block, chunks in self._chunks.items():
            query = run.assembled([q for q, _, _ in chunks])
            key = run.assembled([k for _, k, _ in chunks])
            valid = run.patches_valid
            if valid is None:
                patches = key.shape[2] - int(self._encoder.has_cls)
                valid = torch.ones(len(key), patches, dtype=torch.bool, device=key.device)
            for kind in self._kinds_of(block):
                found = self._read_off(kind, query, key, chunks[0][2], valid)
                self._note(block, kind, _by_unit(run, found))
        for block, outputs in self._outputs.items():
            hidden = outputs[0]
            if self._encoder.packed:
                hidden = run.assembled([h.view(1, 1, -1, h.shape[-1]) for h in outputs])[:, 0]
            self._note(block, _FEATURES, _by_unit(run, hidden[:, int(self._encoder.has_cls) :]))
            if self._encoder.has_cls:
                self._note(block, CLS_FEATURES, hidden[:, 0])
        self._chunks.clear()
        self._outputs.clear()

    def _read_off(
        self, kind: str, query: Tensor, key: Tensor, scale: float, valid: Tensor
    ) -> Tensor:
        """Numbers `[R, P]` or vectors `[R, P, D]` of the patches that are `valid [R, P]`."""
        first = int(self._encoder.has_cls)
        if kind in _KEYS:
            keys = key[:, :, first:].float()
            return keys.mean(1) if kind == "mean_keys" else keys.transpose(1, 2).flatten(2)
        there = torch.cat([valid.new_ones(len(valid), first), valid], 1)
        if kind in _OF_CLS:
            query = query[:, :, :1]
            if kind == "cls_row_joint":
                # all heads side by side as one
                scale *= query.shape[1] ** -0.5
                query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
            return ops.attention_rows(query, key, scale, there)[:, 0, first:]
        return _ROWS[kind](query, key, scale, there)[:, first:]

    def finish_block(self, block: int, layout: RowLayout | PackedLayout) -> None:
        """A block of a tower that is being cut has run: turn what was seen into rows.

        Attention is among the patches that are left; units that are gone get 0.
        """
        chunks = self._chunks.pop(block, None)
        if chunks is None:
            return
        queries = [query.to(layout.device) for query, _, _ in chunks]
        key = layout.assembled([key.to(layout.device) for _, key, _ in chunks])
        query = queries[0] if self._encoder.has_cls else layout.assembled(queries)
        scale = chunks[0][2]
        patches = layout.valid.repeat_interleave(layout.m, 1)
        for kind in self._kinds_of(block):
            found = self._read_off(kind, query, key, scale, patches)
            rows = found.unflatten(1, (-1, layout.m)).mean(2)
            self._note(block, kind, _spread(layout, rows))

    def _note(self, block: int, kind: str, rows: Tensor) -> None:
        self._found.setdefault((block, kind), []).append(rows)

    def read(
        self, runs: list[Run], needs: Iterable[Signal] | None = None
    ) -> dict[str, list[Tensor]]:
        """By key, for each image and video `float32[L, N]` in LLM tokens; vectors are `[D, N]`.

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
                found = [self._found[b, kind][i].to(device) for b in window]
                if kind == CLS_FEATURES:
                    parts += [x.T for x in found[0].split([v.rows for v in run.visuals])]
                    continue
                # [L, R, U], or of vectors [D, R, U]
                rows = torch.stack(found) if found[0].dim() == 2 else found[0].movedim(-1, 0)
                parts += run.to_tokens(rows)
            out[signal.key] = parts
        return out


def _by_unit(run: Run, values: Tensor) -> Tensor:
    """Numbers `[R, P]` or vectors `[R, P, D]` of patches as means over units."""
    if values.dim() == 2:
        return run.by_unit(values)
    wide = run.by_unit(values.transpose(1, 2).flatten(0, 1))  # [R·D, U]
    return wide.reshape(len(values), -1, wide.shape[1]).transpose(1, 2)


def _spread(layout: RowLayout | PackedLayout, values: Tensor) -> Tensor:
    """Numbers `[R, U]` or vectors `[R, U, D]` of the units left among all, 0 for the others."""
    if values.dim() == 2:
        return layout.spread(values)
    return torch.stack([layout.spread(part) for part in values.unbind(-1)], -1)
