"""Attention in which visual tokens are read otherwise than in stock: heads that do not see them,
neighbors only, keys that text does not read, and attention that sinks hand on.

Letters: B batch rows, H query heads, R queries of a run, T keys, S keys that something is said of
(those behind them are text), d head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vtc.plans import LayerRule, Redistribution
from vtc.runtime.probe import Stock
from vtc.runtime.short_rows import Split

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Reread:
    """The rule of one layer with what it must know of one run.

    Attributes:
        rule: what is in force; its `unread` and `sinks` are `bool[B, S]`.
        visual: `bool[B, S]`, the visual keys.
        asking: which queries are visual rows, as a split of the R; None: none is.
        near: `bool[B, 1, R, T]`, for visual rows the keys within the radius; None: no radius.
        behind: the queries behind the last visual key, as the text rows of a split; None: all.
        held: keys before the first query's own; None: the queries' own keys are the last.
        masked: whether the mask given is one that the implementation that was there cannot take.
    """

    rule: LayerRule
    visual: Tensor
    asking: Split | None = None
    near: Tensor | None = None
    behind: Split | None = None
    held: int | None = None
    masked: bool = False

    def attend(
        self,
        stock: Stock,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        """The output `[B, R, H, d]` in the place of stock's."""
        rule = self.rule
        visible = visible_keys(mask, query.shape[2], key.shape[2], key.device, self.held)
        visual = over_keys(self.visual, key)
        seen = self._seen(visible, key)
        groups = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
        if rule.heads is not None and not bool(rule.heads.all()):
            out = self._by_head(query, keys, values, seen, visual, scale)
        elif seen is not visible or self.masked:
            out = attended(query, keys, values, seen, scale)
        else:
            out, _ = stock(query, key, value, mask)
        if rule.redistribution is None or rule.sinks is None:
            return out
        rows = _Rows(self.behind, query, out, seen)
        sinks = over_keys(rule.sinks, key)
        weights = attention_weights(rows.query, keys, rows.seen, scale)
        moved, chosen = handed_on(weights, visual, sinks, rule.redistribution)
        new = torch.einsum("bhrt,bhtd->brhd", moved, values.float()).to(out.dtype)
        return rows.put(torch.where(chosen.transpose(1, 2)[..., None], new, rows.out))

    def _seen(self, visible: Tensor, key: Tensor) -> Tensor:
        """`bool[B, 1, R, T]`, what each query sees; `visible` itself where it sees it all."""
        rule, seen = self.rule, visible
        asks = None if self.asking is None else self.asking.is_visual.to(key.device)
        if rule.unread is not None:
            hidden = over_keys(rule.unread, key)[:, None, None]
            if asks is not None:
                hidden = hidden & ~_copies(asks, len(key))[:, None, :, None]
            seen = seen & ~hidden
        if self.near is not None and asks is not None:
            near = F.pad(self.near, (0, key.shape[2] - self.near.shape[-1]))
            near = _copies(near.to(key.device), len(key))
            seen = seen & (near | ~_copies(asks, len(key))[:, None, :, None])
        return seen

    def _by_head(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, visual: Tensor, scale: float
    ) -> Tensor:
        """Heads that look at visual tokens, and those in which only text looks at text."""
        heads: Tensor = self.rule.heads.to(query.device)  # type: ignore[union-attr]
        out = query.new_zeros(len(query), query.shape[2], query.shape[1], query.shape[3])
        if bool(heads.any()):
            q, k, v = (x[:, heads] for x in (query, key, value))
            out[:, :, heads] = attended(q, k, v, seen, scale)
        query, key, value = (x[:, ~heads] for x in (query, key, value))
        rows = _Rows(self.asking, query, out[:, :, ~heads], seen)
        if self.rule.renormalize:
            rest = attended(rows.query, key, value, rows.seen & ~visual[:, None, None], scale)
        else:
            gone = value.masked_fill(visual[:, None, :, None], 0)
            rest = attended(rows.query, key, gone, rows.seen, scale)
        out[:, :, ~heads] = rows.put(rest)
        return out


class _Rows:
    """Some queries of a run, with what they see and what they got so far.

    Args:
        split: those queries as its text rows; None: all.
        query: `[B, H, R, d]`.
        out: `[B, R, H, d]`.
        seen: `bool[B, 1, R, T]`.
    """

    def __init__(self, split: Split | None, query: Tensor, out: Tensor, seen: Tensor) -> None:
        self._whole = out
        self._split = None if split is None else split.repeated(len(query)).to(query.device)
        if self._split is None:
            self.query, self.out, self.seen = query, out, seen
            return
        self.query = self._split.texts(query.transpose(1, 2)).transpose(1, 2)
        self.out = self._split.texts(out)
        seen = seen.expand(len(query), -1, -1, -1)[:, 0]
        # what is padding may see anything
        self.seen = (self._split.texts(seen) | ~self._split.text_valid[..., None])[:, None]

    def put(self, rows: Tensor) -> Tensor:
        """The output with these rows `[B, R', H, d]` in it."""
        if self._split is None:
            return rows
        return self._split.joined(rows, self._split.visuals(self._whole))


def handed_on(
    weights: Tensor, visual: Tensor, sinks: Tensor, how: Redistribution
) -> tuple[Tensor, Tensor]:
    """Attention of image-centric heads, with what sinks take given to the other visual tokens.

    With A a row's weights, v its sum over visual keys: a head is chosen where v ≥ `least` and the
    sum of A over visual sinks is at most `rho` of the sum of A + 1e-6 over visual keys. There all
    sinks keep `p` of their weight; the rest goes to visual keys that are none, in proportion to
    theirs. A row without visual sinks is left alone.

    Args:
        weights: `float32[B, H, R, T]`, rows sum to 1.
        visual: `bool[B, T]`.
        sinks: `bool[B, T]`.
        how: the thresholds.

    Returns:
        What the weights of chosen heads become, `[B, H, R, T]`, and `bool[B, H, R]`, which are.
    """
    visual, sinks = visual[:, None, None], sinks[:, None, None]
    others = visual & ~sinks
    onto = (weights * visual).sum(-1)
    within = ((weights + 1e-6) * visual).sum(-1)
    share = (weights * (visual & sinks)).sum(-1) / within.clamp_min(_TINY)
    rest = (weights * others).sum(-1, keepdim=True)
    chosen = (share <= how.rho) & (onto >= how.least) & (rest[..., 0] > 0)
    chosen = chosen & (visual & sinks).any(-1)
    freed = (1 - how.p) * (weights * sinks).sum(-1, keepdim=True)
    kept = torch.where(sinks, how.p * weights, weights)
    return kept + freed * (weights * others) / rest.clamp_min(_TINY), chosen


def attention_weights(query: Tensor, key: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Softmax weights `float32[B, H, R, T]` over what is seen."""
    logits = torch.einsum("bhrd,bhtd->bhrt", query.float(), key.float()) * scale
    return logits.masked_fill(~_something(seen), float("-inf")).softmax(-1)


def attended(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention `[B, R, H, d]` over what is seen."""
    out = F.scaled_dot_product_attention(query, key, value, _something(seen), scale=scale)
    return out.transpose(1, 2)


def _something(seen: Tensor) -> Tensor:
    """What a padding row sees does not matter, as long as it is something."""
    return seen | ~seen.any(-1, keepdim=True)


def by_mask(
    stock: Stock,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attention by the 4-D mask given, whatever the implementation that was there."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    seen = visible_keys(mask, query.shape[2], key.shape[2], key.device)
    return attended(query, key, value, seen, scale)


def visible_keys(
    mask: Tensor | None,
    queries: int,
    keys: int,
    device: torch.device,
    held: int | None = None,
) -> Tensor:
    """`bool[B or 1, 1, R, T]` from the mask that a layer is given: 4-D, of the keys alone as for
    flash attention, or None.

    None is causal. A static cache gives keys behind the queries' own, so that `held`, how many
    keys are before them, has to be known then.
    """
    first = keys - queries if held is None else held
    last = torch.arange(first, first + queries, device=device)
    causal = torch.arange(keys, device=device) <= last[:, None]
    if mask is None:
        return causal[None, None]
    if mask.dim() == 2:
        return causal & (mask[:, None, None, :keys] != 0)
    mask = mask[..., :keys].to(device)
    return mask if mask.dtype == torch.bool else mask == 0


def over_keys(what: Tensor, key: Tensor) -> Tensor:
    """`bool[B, S]` as `bool[k·B, T]`: keys behind the S are text."""
    keys = key.shape[2]
    wide = F.pad(what, (0, max(keys - what.shape[1], 0)))[:, :keys]
    return _copies(wide, len(key)).to(key.device)


def _copies(x: Tensor, batch: int) -> Tensor:
    return x if len(x) in (1, batch) else x.repeat_interleave(batch // len(x), 0)
