"""Scorers: Tokens -> scores `[G, N]`, float32, higher = keep."""

from vtc.scorers.base import Scorer
from vtc.scorers.cls_attention import ClsAttention
from vtc.scorers.random_scores import RandomScores

SCORERS: dict[str, type[Scorer]] = {s.name: s for s in (ClsAttention, RandomScores)}

__all__ = ["SCORERS", "ClsAttention", "RandomScores", "Scorer"]
