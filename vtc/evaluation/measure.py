"""What lmms-eval writes about every sample beside its score: tokens, evidence and times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmms_eval.api.instance import TokenCounts
from torch import Tensor

from vtc.evaluation.kept import Left
from vtc.types import Selection

# numbers or None; and a list of one per image, and the kernels that ran in words
Numbers = dict[str, Any]

# of one call: meaningful per sample only where the call holds one sample
TIMES = ("encoder_ms", "selector_ms", "ttft_ms", "tpot_ms")
MEMORY = ("kv_bytes", "peak_memory_bytes")


@dataclass
class SampleCounts(TokenCounts):  # type: ignore[misc]
    """lmms-eval's token counts of a sample, with ours beside them in the samples file.

    Attributes:
        numbers: ours.
        left: what was left of its pictures, where that was asked for; for a sweep, which takes it
            out before anything is written.
    """

    numbers: Numbers = field(default_factory=dict)
    left: list[Left] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the samples file holds."""
        found = {**super().to_dict(), **self.numbers}
        return found if self.left is None else {**found, "left": self.left}


def token_numbers(report: Any, images: range, alone: bool) -> Numbers:
    """Tokens of one sample, and its times.

    Args:
        report: `handle.report()` of the call.
        images: the sample's images, counted over the call.
        alone: the call held this sample only and was warm, so that its times are its own.
    """
    visual = sum(report.visual_tokens[i] for i in images)
    kept = sum(report.kept_tokens[i] for i in images)
    # of each image, its tokens in layers that leave them active, averaged over layers
    active = sum(report.active_fractions[i] * report.visual_tokens[i] for i in images)
    numbers: Numbers = {
        "visual_tokens": visual,
        "llm_tokens": sum(report.llm_tokens[i] for i in images),
        "kept_tokens": kept,
        "kept_fraction": kept / visual if visual else None,
        "active_fraction": active / visual if visual else None,
        "layer_mean_tokens": active,
        "image_kept_fractions": [report.kept_fractions[i] for i in images],
        "kernels": _kernels(report.kernels),
    }
    for name in (*TIMES, *MEMORY):
        numbers[name] = getattr(report, name) if alone else None
    return numbers


def _kernels(ran: Mapping[str, str]) -> str:
    """`torch`, or which operations ran in Triton: `triton: gather top_k; torch: entropy`."""
    found: dict[str, list[str]] = {}
    for operation, kind in ran.items():
        found.setdefault(kind, []).append(operation)
    if found.keys() <= {"torch"}:
        return "torch"
    return "; ".join(f"{kind}: {' '.join(found[kind])}" for kind in sorted(found, reverse=True))


def evidence_numbers(
    doc: Mapping[str, Any], size: tuple[int, int], selections: Sequence[Selection], image: int
) -> Numbers:
    """Which share of the tokens that carry the answer survived.

    Read from the question's own boxes after the answer was generated; no method ever sees them.

    Args:
        doc: the question; `doc["evidence"]` holds boxes (x0, y0, x1, y1) in pixels of its picture.
        size: (width, height) of the picture.
        selections: `handle.remaining` of the call that has just returned; the last that left any
            of the picture counts. A method that only skips work leaves everything.
        image: the picture's number in the call.

    Returns:
        `evidence_recall` over tokens kept as they are, absent where a method keeps none; and where
        it merges some, `evidence_covered`, which counts members of merged tokens. Nothing where
        both say nothing: no boxes, no selection, or the picture is several crops.
    """
    boxes = boxes_of(doc)
    found = last_left(selections, image)
    if not boxes or found is None:
        return {}
    selection, group = found
    frames, height, width = selection.grid[group]
    if frames != 1 or selection.lengths[group] != height * width:
        return {}
    wanted = _evidence(boxes, (height, width), size)
    if not bool(wanted.any()):
        return {}
    numbers: Numbers = {}
    if bool(selection.valid[group].any()):
        numbers["evidence_recall"] = _share(selection.mask()[group], wanted)
    if selection.merge is not None:
        numbers["evidence_covered"] = _share(selection.covered()[group], wanted)
    return numbers


def last_left(selections: Sequence[Selection], image: int) -> tuple[Selection, int] | None:
    """The last decision that left any of a picture's tokens, and the picture's group in it.

    None where there is no such decision, or the picture is several groups.
    """
    for selection in reversed(selections):
        groups = (selection.parent[:, 0] == image).nonzero()[:, 0].tolist()
        if len(groups) != 1:
            return None
        if selection.merge is not None or int(selection.slots[groups[0]]):
            return selection, groups[0]
    return None


def boxes_of(doc: Mapping[str, Any]) -> list[Sequence[float]]:
    """The boxes of a question about one picture; other data sets keep other things under that
    name."""
    found = doc.get("evidence")
    if not isinstance(found, list) or not all(_is_box(box) for box in found):
        return []
    return found


def _is_box(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 4
        and all(isinstance(number, (int, float)) for number in value)
    )


def _evidence(
    boxes: Sequence[Sequence[float]], grid: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    from vtc.testbed import evidence_tokens

    tokens: Tensor = evidence_tokens(boxes, grid, size)
    return tokens


def _share(mask: Tensor, wanted: Tensor) -> float:
    return int((mask.cpu()[: len(wanted)] & wanted).sum()) / int(wanted.sum())


def means(samples: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every number over the samples that have it; what is no number is left out."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.items():
            if isinstance(value, (int, float)):
                values.setdefault(name, []).append(float(value))
    return {name: sum(found) / len(found) for name, found in values.items()}
