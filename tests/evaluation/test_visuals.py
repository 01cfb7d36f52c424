"""Questions about two pictures and about clips, through lmms-eval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from vtc.errors import UnsupportedModeError
from vtc.evaluation.visuals import Visuals, evidence, for_processor, numbered, visuals_of
from vtc.types import Selection

pytestmark = pytest.mark.eval
# a question for every eight about single pictures
N = 2
GRAY = Image.new("RGB", (112, 112))


@pytest.fixture(scope="module")
def stories(tasks_folder):
    """The tasks about several pictures."""
    from vtc.evaluation.evaluate import load_tasks, quiet

    with quiet():
        return load_tasks(("vtc_pairs", "vtc_videos"), tasks_folder)


@pytest.fixture(
    scope="module", params=["qwen2_vl", pytest.param("internvl", marks=pytest.mark.slow)]
)
def family(request: pytest.FixtureRequest) -> Any:
    from vtc.evaluation.loading import load
    from vtc.testbed import model_folder

    return request.param, load(str(model_folder(request.param)), "cpu")


def run(loaded: Any, tasks: Any, **arguments: Any) -> dict[str, list[dict[str, Any]]]:
    from vtc.evaluation.evaluate import evaluate, flat_sample, quiet
    from vtc.evaluation.model import Vtc

    with quiet():
        results = evaluate(Vtc(loaded, **arguments), tasks, N)
    return {
        task: [flat_sample(task, sample) for sample in samples]
        for task, samples in results["samples"].items()
    }


def test_pairs_and_clips_are_answered_and_counted(family: Any, stories: Any) -> None:
    name, loaded = family
    full = run(loaded, stories, method="none")
    right = [sample["score"] for samples in full.values() for sample in samples]
    assert len(right) == 2 * N and sum(right) >= 2 * N - 1
    grids = {"vtc_pairs": 2, "vtc_videos": 2 if name == "qwen2_vl" else 4}
    half = run(loaded, stories, method="random", keep=0.5, batch_size=2, timed_samples=1)
    alone = run(loaded, stories, method="random", keep=0.5)
    for task, samples in half.items():
        for sample in samples:
            assert sample["visual_tokens"] == 196 * grids[task]
            assert sample["kept_fraction"] == 0.5
            assert 0 < sample["evidence_recall"] < 1
        # one by one or in a batch: the same tokens
        assert [s["answer"] for s in alone[task]] == [s["answer"] for s in samples]


def messages(*content: dict[str, Any]) -> Any:
    from lmms_eval.protocol import ChatMessages

    return ChatMessages(messages=[{"role": "user", "content": list(content)}])


@pytest.mark.parametrize(
    "content, said",
    [
        ([{"type": "audio", "url": "a.wav"}], "1 sounds"),
        ([{"type": "video", "url": "a.mp4"}], "got a video as str"),
        (
            [{"type": "image", "url": GRAY}, {"type": "video", "url": [GRAY]}],
            "1 pictures and 1 clips",
        ),
    ],
)
def test_what_cannot_be_asked(content: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(UnsupportedModeError, match=said):
        visuals_of(messages(*content))


def test_visuals_are_numbered_as_families_count_them() -> None:
    pair, clip, text = Visuals((GRAY, GRAY)), Visuals(videos=((GRAY,) * 4,)), Visuals()
    asked = [clip, pair, text, clip]
    # a clip is one, behind all pictures
    assert numbered(asked, 4) == [range(2, 3), range(0, 2), range(2, 2), range(3, 4)]
    # its frames are pictures
    assert numbered(asked, 10) == [range(0, 4), range(4, 6), range(6, 6), range(6, 10)]
    given = for_processor(asked)
    assert len(given["images"]) == 2 and [len(v) for v in given["videos"]] == [4, 4]
    assert for_processor([text]) == {"images": None}


def test_evidence_of_a_clip_is_looked_for_in_its_grids() -> None:
    """Two grids of 2×2 tokens, four frames: the object is in the first grid's first token and in
    the second grid's last one."""
    frames = (Image.new("RGB", (16, 16)),) * 4
    boxes = [[[0, 0, 8, 8]], [], [], [[8, 8, 16, 16]]]
    kept = torch.tensor([[0, 1, 2, 3]])
    selection = Selection(
        kept, torch.ones(1, 4, dtype=torch.bool), (8,), torch.tensor([[0, 0]]), ((2, 2, 2),)
    )
    clip = Visuals(videos=(frames,))
    found = evidence({"evidence": boxes}, clip, [selection], range(1))
    assert found == {"evidence_recall": 0.5}
    assert evidence({"evidence": []}, clip, [selection], range(1)) == {}
