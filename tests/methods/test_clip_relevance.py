"""CDPruner by CLIP's text tower: relevance against a statement of it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

import vtc
from tests.kit.matrix import cached_inputs, model_of, run
from vtc.scorers import clip_relevance

WORDS = [f"w{i}" for i in range(120)]
PROMPT = "mixed: two images, one image, text only"


def tokenizer(folder: Path, **special: str) -> None:
    """Each word is its number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w119"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> tuple[str, str]:
    from transformers import CLIPConfig, CLIPModel

    clip, llm = (tmp_path_factory.mktemp(name) for name in ("clip", "llm"))
    torch.manual_seed(1)
    small = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {**small, "vocab_size": 120, "max_position_embeddings": 6}
    text |= {"bos_token_id": 117, "eos_token_id": 118, "pad_token_id": 119}
    vision = {**small, "image_size": 24, "patch_size": 4}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).save_pretrained(clip)
    tokenizer(clip, bos_token="w117", eos_token="w118")
    tokenizer(llm, bos_token="w2", pad_token="w0")
    return str(clip), str(llm)


def test_relevance_is_minus_the_mean_cosine_to_stretches_of_the_question(
    folders: tuple[str, str],
) -> None:
    from transformers import CLIPModel

    model, inputs = model_of("llava"), cached_inputs("llava", PROMPT)
    with vtc.patch(model, "cdpruner", 9, clip=folders[0], tokenizer=folders[1]) as handle:
        run(model, inputs, max_new_tokens=1)
    (selection,) = handle.selections
    assert selection.scores is not None
    clip = CLIPModel.from_pretrained(folders[0]).eval()
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    with torch.no_grad():
        features = clip.vision_model.post_layernorm(tower.hidden_states[-2][:, 1:])
        seen = clip.visual_projection(features)
    for image, row, count in ((0, 0, 5), (1, 0, 5), (2, 1, 9)):
        ids = [i for i in inputs["input_ids"][row][-count:].tolist() if i not in (0, 2)]
        cosines = []
        for start in range(0, len(ids), 4):
            part = torch.tensor([[117, *ids[start : start + 4], 118]])
            with torch.no_grad():
                said = clip.text_projection(clip.text_model(input_ids=part).pooler_output)
            cosines.append(cosine_similarity(seen[image], said, dim=-1))
        want = -torch.stack(cosines).mean(0)
        torch.testing.assert_close(selection.scores[image], want, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_read_is_an_error(folders: tuple[str, str], tmp_path: Path) -> None:
    model, inputs = model_of("llava"), cached_inputs("llava", "batch 1")
    clip_relevance._loaded.cache_clear()
    for options, message in (
        ({"clip": str(tmp_path), "tokenizer": folders[1]}, "the CLIP model could not be read"),
        ({"clip": folders[0], "tokenizer": str(tmp_path)}, "the LLM's tokenizer could not be"),
        ({"clip": folders[0]}, "the LLM's tokenizer could not be"),
    ):
        with (
            vtc.patch(model, "cdpruner", 4, **options),
            pytest.raises(vtc.VtcError, match=message),
        ):
            run(model, inputs, max_new_tokens=1)


def test_another_tower_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 120, "max_position_embeddings": 6}
    text |= {"bos_token_id": 117, "eos_token_id": 118, "pad_token_id": 119}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": 24, "patch_size": 4})
    ).save_pretrained(tmp_path)
    tokenizer(tmp_path, bos_token="w117", eos_token="w118")
    model = model_of("llava")
    with (
        vtc.patch(model, "cdpruner", 4, clip=str(tmp_path), tokenizer=folders[1]),
        pytest.raises(vtc.VtcError, match=r"has features of 32 numbers, expected 64"),
    ):
        run(model, cached_inputs("llava", "batch 1"), max_new_tokens=1)
