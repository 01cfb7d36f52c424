"""How much a patch is like the question to CLIP, whose vision tower the model has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtc.errors import OptionError, SignalError
from vtc.scorers.base import Scorer
from vtc.sites import Facts
from vtc.types import TEXT, Signal, Tokens

_FEATURES = Signal("encoder_features", ends_at_tap=True)


@dataclass(frozen=True)
class ClipRelevance(Scorer):
    """−mean_s cos(u_i, t_s): u_i = visual_projection(post_layernorm(v_i)) of encoder features v_i,
    t_s CLIP's embedding of each stretch of the text behind the row's last image that its text tower
    can read at once (77 tokens with its own begin and end). Negated as in CDPruner's official code:
    patches are least like the text that they show.

    The text is the prompt's own, special tokens left out: what a template puts behind the question
    is part of it.

    Args:
        folder: of the CLIP model that the vision tower is from.
        tokenizer: folder of the LLM's tokenizer; None: that of the model.
    """

    name: ClassVar[str] = "clip_relevance"
    folder: str
    tokenizer: str | None = None

    @property
    def needs(self) -> tuple[Signal, ...]:
        """The text and the encoder's features."""
        return (Signal(TEXT), _FEATURES)

    def on(self, facts: Facts) -> ClipRelevance:
        """With the tokenizer of the model, where none is given."""
        return self if self.tokenizer is not None else replace(self, tokenizer=facts.name)

    def __call__(self, tokens: Tokens) -> Tensor:
        """Scores `float32[G, N]`."""
        if tokens.text_ids is None or tokens.text_valid is None:
            raise SignalError(
                "scorer 'clip_relevance' reads the question, expected a prompt of input_ids: pass "
                "the processor's output"
            )
        v = tokens.signal(_FEATURES.key)
        clip, tokenizer, words = _loaded(self.folder, self.tokenizer or "", v.device)
        width = clip.vision_model.post_layernorm.weight.shape[0]
        if v.shape[-1] != width:
            raise OptionError(
                f"the CLIP model in {self.folder} has features of {width} numbers, expected "
                f"{v.shape[-1]} as in this model's vision tower: pass the one that it is from"
            )
        with torch.no_grad():
            seen = clip.visual_projection(clip.vision_model.post_layernorm(v.float()))
            seen, rows = normalize(seen, dim=-1), tokens.parent[:, 1].tolist()
            texts = {r: self._text(tokens, r, clip, tokenizer, words) for r in dict.fromkeys(rows)}
            scores = [-(u @ texts[row].T).mean(-1) for u, row in zip(seen, rows, strict=True)]
        return torch.stack(scores) if scores else v.new_zeros(v.shape[:2])

    def _text(self, tokens: Tokens, row: int, clip: Any, tokenizer: Any, words: Any) -> Tensor:
        """Embeddings of the stretches of one row's text, `[s, D]`."""
        assert tokens.text_ids is not None and tokens.text_valid is not None
        ids = tokens.text_ids[row, tokens.text_valid[row].to(tokens.text_ids.device)]
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
        found = words(text, add_special_tokens=False)["input_ids"]
        most = clip.config.text_config.max_position_embeddings - 2
        parts = [found[i : i + most] for i in range(0, max(len(found), 1), most)]
        out = []
        for part in parts:
            whole = [words.bos_token_id, *part, words.eos_token_id]
            given = torch.tensor([whole], device=clip.device)
            out.append(clip.get_text_features(input_ids=given))
        vectors = [x if isinstance(x, Tensor) else x.pooler_output for x in out]
        return normalize(torch.cat(vectors), dim=-1)


@lru_cache(maxsize=2)
def _loaded(folder: str, tokenizer: str, device: torch.device) -> tuple[Any, Any, Any]:
    """CLIP, the LLM's tokenizer and CLIP's."""
    from transformers import AutoTokenizer, CLIPModel

    def read(kind: Any, what: str, where: str) -> Any:
        try:
            return kind.from_pretrained(where, local_files_only=True)
        except (OSError, ValueError) as error:
            raise OptionError(
                f"{what} could not be read from {where!r} ({error}), expected a folder that "
                "from_pretrained reads"
            ) from None

    clip = read(CLIPModel, "the CLIP model", folder).to(device).float().eval()
    return (
        clip,
        read(AutoTokenizer, "the LLM's tokenizer", tokenizer),
        read(AutoTokenizer, "CLIP's tokenizer", folder),
    )
