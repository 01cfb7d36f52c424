"""Models by folder: ready to answer in batches, or refused in words that name the folder."""

import shutil
from pathlib import Path

import pytest
import torch

from vtc.errors import InputError, OptionError
from vtc.evaluation.loading import load

pytestmark = pytest.mark.eval


@pytest.fixture
def copied(model_name, tmp_path):
    """The testbed's model, to be damaged."""
    return Path(shutil.copytree(model_name, tmp_path / "model"))


def test_ready_to_answer(loaded):
    assert not loaded.model.training
    # a CPU computes bfloat16 slowly, and the shipped weights are bfloat16
    assert loaded.model.dtype == torch.float32
    # only so do answers of a batch start at the same column
    assert loaded.processor.tokenizer.padding_side == "left"


def test_a_dtype_by_name(model_name):
    assert load(model_name, "cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(OptionError, match="dtype='float7' is unknown; expected auto"):
        load(model_name, "cpu", dtype="float7")


@pytest.mark.parametrize("name", ["./gone", "/gone", "~/gone"])
def test_no_folder(name):
    with pytest.raises(OptionError, match="is not a folder; pass one, or a hub id"):
        load(name, "cpu")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "gpt2"}'),
        ("config.json", '{"model_type": "no_such_model"}'),
        ("model.safetensors", "not weights"),
        ("tokenizer.json", "{}"),
    ],
)
def test_damaged_folder(copied, file, content):
    (copied / file).write_text(content)
    with pytest.raises(InputError, match="could not be loaded as an image-text-to-text model"):
        load(str(copied), "cpu")


def test_no_chat_template(copied):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template"):
        load(str(copied), "cpu")
