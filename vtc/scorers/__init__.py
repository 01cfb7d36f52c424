"""Scorers: Tokens -> scores `[G, N]`, float32, higher = keep."""

from vtc.scorers.base import Scorer
from vtc.scorers.center import Center
from vtc.scorers.cls_attention import ClsAttention
from vtc.scorers.flow import Flow
from vtc.scorers.frame_change import FrameChange
from vtc.scorers.isolation import Isolation
from vtc.scorers.layer_contribution import LayerContribution
from vtc.scorers.layer_rows import LastRow
from vtc.scorers.overview import Overview
from vtc.scorers.random_scores import RandomScores
from vtc.scorers.raters import RaterRows
from vtc.scorers.sink_filter import SinkFilter
from vtc.scorers.sink_norm import SinkNorm
from vtc.scorers.text_relevance import TextRelevance

SCORERS: dict[str, type[Scorer]] = {
    s.name: s
    for s in (
        ClsAttention,
        RandomScores,
        Center,
        Overview,
        Flow,
        LayerContribution,
        LastRow,
        RaterRows,
        SinkNorm,
        SinkFilter,
        Isolation,
        FrameChange,
        TextRelevance,
    )
}

__all__ = [
    "SCORERS",
    "Center",
    "ClsAttention",
    "Flow",
    "FrameChange",
    "Isolation",
    "LastRow",
    "LayerContribution",
    "Overview",
    "RandomScores",
    "RaterRows",
    "Scorer",
    "SinkFilter",
    "SinkNorm",
    "TextRelevance",
]
