"""Two turns on one cache, of every family × method, equal one pass over the whole conversation."""

from __future__ import annotations

import pytest
import torch

from tests.kit.matrix import SPECS, Spec, cells, patched, refused_turn, run
from tests.kit.models import WITH_VIDEO
from tests.kit.turns import CONVERSATIONS, VIDEOS, in_one_piece, parts, two_turns

pytestmark = pytest.mark.filterwarnings("ignore:.*(do_sample|max_length).*")

PIXELS = ["whole conversation", "new part"]


def compare(family: str, spec: Spec, conversation: str, pixels_of: str) -> None:
    model = spec.model(family)
    first, second = parts(family, conversation)
    if refusal := refused_turn(family, spec.name, conversation, pixels_of):
        error, message = refusal
        with patched(spec, family), pytest.raises(error, match=message):
            list(two_turns(model, family, first, second, run, pixels_of))
        return
    with patched(spec, family) as decision:
        turns = two_turns(model, family, first, second, run, pixels_of)
        answer = next(turns)
        one = decision()
        got = next(turns)
        two = decision()
    want = in_one_piece(spec, family, [(first, one), (second, two)], answer, {})
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "family, spec, conversation, pixels_of", cells(SPECS, list(CONVERSATIONS), PIXELS), ids=str
)
def test_two_turns(family: str, spec: Spec, conversation: str, pixels_of: str) -> None:
    compare(family, spec, conversation, pixels_of)


@pytest.mark.parametrize(
    "family, spec, conversation, pixels_of",
    [cell for cell in cells(SPECS, list(VIDEOS), PIXELS, full=()) if cell.values[0] in WITH_VIDEO],
    ids=str,
)
def test_two_turns_with_videos(family: str, spec: Spec, conversation: str, pixels_of: str) -> None:
    compare(family, spec, conversation, pixels_of)
