"""What models are called, and which of them stay loaded."""

from types import SimpleNamespace

import pytest
import torch

from vtc.evaluation import models as module
from vtc.evaluation.models import Models, short_names
from vtc.testbed import model_folder

pytestmark = pytest.mark.eval


def test_models_are_called_by_family_or_by_the_last_part_of_their_name(tmp_path):
    given = ("llava", "org/Model-7B", str(model_folder("internvl")), str(tmp_path / "mine"))
    assert short_names(given) == {
        "llava": str(model_folder("llava")),
        "Model-7B": "org/Model-7B",
        "internvl": str(model_folder("internvl")),
        "mine": str(tmp_path / "mine"),
    }


def test_names_are_unique_and_one_model_has_one():
    assert list(short_names(("a/m", "b/m", "a/m", "c/m"))) == ["m", "m-2", "m-3"]
    assert len(short_names(("llava", str(model_folder("llava"))))) == 1


@pytest.mark.parametrize(("elements", "loads"), [(8, "abc"), (2**29, "abcab")])
def test_small_models_stay_and_large_ones_make_room(monkeypatch, elements, loads):
    loaded = []

    def load(source, device, dtype):
        loaded.append(source)
        parameter = torch.empty(elements, device="meta")
        return SimpleNamespace(model=SimpleNamespace(parameters=lambda: [parameter]))

    monkeypatch.setattr(module, "load", load)
    models = Models({name: name for name in "abc"}, "cpu", "auto")
    assert list(models) == ["a", "b", "c"] and len(models) == 3
    for name in "aabccab":
        assert models[name].model
    assert "".join(loaded) == loads
