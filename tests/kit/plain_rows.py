"""Decoder layers in plain words: which rows do what, and who reads whom. A stock model runs with
its layers written out, one head after the other, in float32. Nothing here looks at the package.

Letters: B batch rows, S entries of the prompt, Q rows of a call, T keys, H heads, d of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Sinks:
    """An entry is a sink where one of these dimensions is this many times the entry's RMS."""

    dims: tuple[int, ...]
    tau: float


@dataclass(frozen=True)
class Var:
    """In heads that look at the image enough and at its sinks not too much, sinks give away."""

    rho: float
    p: float
    least: float


@dataclass(frozen=True)
class Rule:
    """What one layer does differently.

    Attributes:
        attention: whether visual rows attend.
        ffn: whether visual rows go through the FFN.
        radius: how far a visual row sees in its own part of its picture; None: as stock.
        heads: which heads have to do with visual tokens; None: all.
        renormalize: whether what the others would read of visual tokens goes to text.
        sinks: what counts as a sink in this layer's input.
        blind: whether text rows do not read visual sinks.
        var: how text rows behind the last visual token share out what sinks take.
    """

    attention: bool = True
    ffn: bool = True
    radius: int | None = None
    heads: tuple[bool, ...] | None = None
    renormalize: bool = True
    sinks: Sinks | None = None
    blind: bool = False
    var: Var | None = None


@dataclass(frozen=True)
class Prompt:
    """Where things stand in the prompt.

    Attributes:
        visual: `bool[B, S]`, visual tokens that are there; newline tokens are text.
        cells: `int64[B, S, 3]`, of visual tokens: which part of which picture (counted over all),
            row and column there.
        written: `bool[B, S]`, what may be a sink: neither padding nor an answer.
        behind: `bool[B, S]`, entries behind the last visual token of their batch row.
    """

    visual: Tensor
    cells: Tensor
    written: Tensor
    behind: Tensor


@dataclass
class Record:
    """What happened: by layer, the sinks `bool[B, S]` of the prompt and, of every row (one batch
    row, one head, one entry) that redistribution looked at, (portion, visual attention, done)."""

    sinks: dict[int, Tensor] = field(default_factory=dict)
    rows: dict[int, list[tuple[float, float, bool]]] = field(default_factory=dict)


def is_sink(x: Tensor, sinks: Sinks) -> Tensor:
    """`[..., D]` -> `bool[...]`."""
    x = x.float()
    rms = (x.pow(2).mean(-1) + 1e-6).sqrt()
    phi = torch.stack([x[..., d].abs() / rms for d in sinks.dims])
    return phi.amax(0) > sinks.tau


def shared_out(
    a: Tensor, sinks: Tensor, visual: Tensor, rule: Var
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention `[..., T]` afterwards; and of each row the portion of its visual attention that
    falls on sinks, its visual attention, and whether anything was done."""
    own = visual & sinks
    others = visual & ~sinks
    seen = (a * visual).sum(-1)
    portion = (a * own).sum(-1) / ((a + 1e-6) * visual).sum(-1)
    theirs = a * others
    # nobody to give to is nothing to give
    done = own.any(-1) & (portion <= rule.rho) & (seen >= rule.least) & (theirs.sum(-1) > 0)
    budget = (1 - rule.p) * (a * sinks).sum(-1, keepdim=True)
    raised = a + budget * theirs / theirs.sum(-1, keepdim=True).clamp_min(1e-30)
    new = torch.where(sinks, a * rule.p, torch.where(others, raised, a))
    return torch.where(done[..., None], new, a), portion, seen, done


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Over what is seen; nothing where nothing is."""
    logits = logits.masked_fill(~seen, -torch.inf)
    highest = logits.detach().amax(-1, keepdim=True).clamp_min(-1e30)
    e = (logits - highest).exp()
    return e / e.sum(-1, keepdim=True).clamp_min(1e-30)


def _near(cells: Tensor, rows: Tensor, radius: int) -> Tensor:
    """`[B, Q, 3]`, `[B, T, 3]` -> `bool[B, Q, T]`."""
    apart = rows[:, :, None] - cells[:, None]
    return (apart[..., 0] == 0) & (apart[..., 1:].abs() <= radius).all(-1)


@dataclass
class _Layer:
    """One decoder layer of a stock model."""

    module: Any
    index: int
    prompt: Prompt
    rule: Rule
    record: Record
    sinks: Tensor | None = None

    def wide(self, x: Tensor, batch: int, width: int) -> Tensor:
        """A fact about prompts `[B, S, ...]` for the keys of so many rows."""
        x = x.repeat_interleave(batch // len(x), 0)[:, :width]
        return pad(x, [0, 0] * (x.dim() - 2) + [0, width - x.shape[1]])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        layer, x = self.module, hidden_states
        start = 0 if past_key_values is None else int(past_key_values.get_seq_length(self.index))
        q, k, v = self.projected(layer.input_layernorm(x), position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.index)
        batch, rows, width = len(x), x.shape[1], k.shape[2]
        at = slice(start, start + rows)
        visual = self.wide(self.prompt.visual, batch, width)
        if start == 0:
            self.look_for_sinks(x)
        seen = self.causal(attention_mask, start, rows, width).expand(batch, rows, width)
        seen = self.read(seen, visual, at)
        attended = self.attention(q, k, v, seen, visual, at)
        mine = visual[:, at, None]
        x = x + attended * (self.rule.attention | ~mine)
        y = layer.mlp(layer.post_attention_layernorm(x))
        return x + y * (self.rule.ffn | ~mine)

    def projected(self, x: Tensor, where: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q `[B, H, Q, d]`, k and v with the heads that are kept."""
        attn = self.module.self_attn

        def heads(x: Tensor, norm: str = "") -> Tensor:
            x = x.unflatten(-1, (-1, attn.head_dim))
            return (getattr(attn, norm)(x) if hasattr(attn, norm) else x).transpose(1, 2)

        cos, sin = (part[:, None] for part in where)
        q, k = heads(attn.q_proj(x), "q_norm"), heads(attn.k_proj(x), "k_norm")
        return _turned(q, cos, sin), _turned(k, cos, sin), heads(attn.v_proj(x))

    def look_for_sinks(self, x: Tensor) -> None:
        """In the prompt alone: what is said later is none."""
        if self.rule.sinks is None:
            return
        written = self.wide(self.prompt.written, len(x), x.shape[1])
        self.sinks = is_sink(x, self.rule.sinks) & written
        self.record.sinks[self.index] = self.sinks

    def causal(self, mask: Tensor | None, start: int, rows: int, width: int) -> Tensor:
        """Which keys a row sees in the stock model, `bool[B or 1, Q, T]`."""
        if mask is not None:
            return (mask if mask.dtype == torch.bool else mask >= 0)[:, 0]
        return (torch.arange(width) <= start + torch.arange(rows)[:, None])[None]

    def read(self, seen: Tensor, visual: Tensor, at: slice) -> Tensor:
        """Which keys a row sees here, whatever the head."""
        batch, _, width = seen.shape
        row = visual[:, at, None]
        if self.rule.radius is not None:
            cells = self.wide(self.prompt.cells, batch, width)
            near = _near(cells, cells[:, at], self.rule.radius)
            seen = seen & ~(row & visual[:, None] & ~near)
        if self.rule.blind:
            assert self.sinks is not None
            away = visual & self.wide(self.sinks, batch, width)
            seen = seen & ~(~row & away[:, None])
        return seen

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, visual: Tensor, at: slice
    ) -> Tensor:
        """What attention adds, `[B, Q, D]`."""
        attn, rule = self.module.self_attn, self.rule
        group = q.shape[1] // k.shape[1]
        out = []
        for h in range(q.shape[1]):
            keys, values = k[:, h // group].float(), v[:, h // group].float()
            logits = q[:, h].float() @ keys.transpose(-1, -2) * attn.head_dim**-0.5
            pruned = rule.heads is not None and not rule.heads[h]
            text = seen & ~visual[:, None] if pruned and rule.renormalize else seen
            a = _softmax(logits, text)
            if pruned:
                a = a * ~visual[:, None] * ~visual[:, at, None]
            if rule.var is not None:
                a = self.redistributed(a, seen, visual, at, rule.var)
            out.append((a @ values).to(q.dtype))
        return attn.o_proj(torch.cat(out, -1))

    def redistributed(self, a: Tensor, seen: Tensor, visual: Tensor, at: slice, var: Var) -> Tensor:
        """In text rows behind the last visual token of their batch row."""
        assert self.sinks is not None
        batch, _, width = a.shape
        sinks = self.wide(self.sinks, batch, width)[:, None]
        # what is generated is behind it too
        later = torch.arange(width) >= self.prompt.visual.shape[1]
        behind = self.wide(self.prompt.behind, batch, width) | later
        rows = (behind & visual.any(-1, keepdim=True))[:, at]
        new, portion, looked, done = shared_out(a, sinks, visual[:, None] & seen, var)
        noted = self.record.rows.setdefault(self.index, [])
        what = portion[rows].tolist(), looked[rows].tolist(), done[rows].tolist()
        noted += zip(*what, strict=True)
        return torch.where(rows[..., None], new, a)


@contextmanager
def restated(model: Any, prompt: Prompt, rules: Mapping[int, Rule]) -> Iterator[Record]:
    """Within it a stock model attends eagerly, and these layers run as said here."""
    language = model.model.language_model
    before, record = language.config._attn_implementation, Record()
    changed = {language.layers[i]: i for i in rules}
    language.config._attn_implementation = "eager"
    for module, i in changed.items():
        vars(module)["forward"] = _Layer(module, i, prompt, rules[i], record).forward
    try:
        yield record
    finally:
        language.config._attn_implementation = before
        for module in changed:
            del vars(module)["forward"]
