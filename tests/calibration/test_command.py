"""`vtc calibrate`: from pictures, scenes and tasks to a file and a picture of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vtc
from tests.kit.models import build_model
from vtc.calibration import FILE
from vtc.calibration.figure import picture
from vtc.cli import main
from vtc.commands.samples import of_folder, of_task
from vtc.testbed.model import FAMILIES, model_folder

ASK = ["--images", "shown", "--question", "what color is the star?"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with three pictures and a text beside them; its cache is inside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("shown").mkdir()
    for i, ending in enumerate(("png", "JPG", "png")):
        Image.effect_noise((112, 112), 60 + i).convert("RGB").save(f"shown/{i}.{ending}")
    Path("shown/0.txt").write_text("not a picture")
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/0.png").write_bytes(Path("shown/0.png").read_bytes()[:2000])
    return tmp_path


def run(*arguments: str) -> Any:
    try:
        return main(["calibrate", *arguments])
    except SystemExit as stop:
        return stop.code


def test_a_folder_of_pictures_becomes_a_file_and_a_picture(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", "llava", *ASK, "--samples", "2") == 0
    found = vtc.Calibration.load("vtc_calibration_llava.json")
    assert (found.model, found.samples) == ("llava", 2)
    assert found.source == "2 pictures of a folder, 'what color is the star?'"
    assert found.layer_contribution and len(found.layer_contribution) == 6
    assert found.head_ratio and {len(row) for row in found.head_ratio} == {8}
    with Image.open("vtc_calibration_llava.png") as drawn:
        assert drawn.width > 3 * drawn.height
    out = capfd.readouterr().out
    assert "sink dimensions  none" in out and "layers, lowest contribution first  5 " in out
    assert str(folder) not in Path("vtc_calibration_llava.json").read_text()
    assert not list(folder.glob(".vtc-*"))


def test_results_may_lie_beside_the_pictures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("shown")
    # what is being written there is a hidden file, and no picture yet
    asked = ["--images", ".", "--question", "what color is the star?", "--what", "layers"]
    assert run("--model", "llava", *asked, "--out", "a.json", "--plot", "a.png") == 0
    assert "3 pictures of a folder" in capfd.readouterr().out


def test_a_model_of_the_testbed_has_scenes_of_its_own(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--samples", "1", "--what", "sinks", "--out", "a.json", "--plot", "b.png"]
    assert run(*arguments, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["out"], found["picture"]) == ("a.json", "b.png")
    assert found["source"] == "1 validation scenes of the testbed"
    assert "layer_contribution" not in found and found["activations"]["tau"] == 8
    assert found == json.loads(Path("a.json").read_text()) | {"out": "a.json", "picture": "b.png"}
    assert Path("b.png").is_file()


def test_the_function_says_the_same(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from vtc.evaluation.loading import load

    loaded = load(str(model_folder()), "cpu")
    samples = of_folder(loaded.processor, Path("shown"), "what color is the star?", 3)
    assert len(samples) == 3 and samples[1:][0]["input_ids"].shape[0] == 1
    want = vtc.calibrate(loaded.model, samples, what="heads", progress=False)
    assert run(*ASK, "--samples", "8", "--what", "heads", "--device", "cpu") == 0
    assert vtc.Calibration.load("vtc_calibration_llava.json").head_ratio == want.head_ratio


@pytest.mark.eval
def test_questions_of_a_task(folder: Path) -> None:
    pytest.importorskip("lmms_eval")
    from transformers import AutoProcessor

    from vtc import testbed

    include = testbed.write_tasks(folder / "tasks", questions=8)
    processor = AutoProcessor.from_pretrained(model_folder("internvl"))
    samples = of_task(processor, "vtc_pairs", include, 3)
    # as many as there are, of two pictures each
    assert len(samples) == 1 and len(samples[0]["pixel_values"]) == 2
    task = ["--task", "vtc_scenes", "--include-path", str(include)]
    assert run(*task, "--samples", "2", "--what", "sinks") == 0
    assert vtc.Calibration.load("vtc_calibration_llava.json").source == "2 questions of vtc_scenes"


@pytest.mark.eval
@pytest.mark.slow
def test_an_unknown_task(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """All tasks of lmms-eval are looked through for it."""
    pytest.importorskip("lmms_eval")
    from vtc import testbed

    include = testbed.write_tasks(folder / "tasks", questions=8)
    assert run("--task", "vtc_nothing", "--include-path", str(include)) == 2
    assert "task 'vtc_nothing' is unknown" in capfd.readouterr().err


WRONG = {
    "no pictures": (["--images", "shown"], "--images and --question belong together"),
    "no folder": (["--images", "gone", "--question", "what?"], "'gone' is not a folder"),
    "empty folder": (["--images", "empty", "--question", "what?"], "'empty' holds no picture"),
    "no question": (["--images", "shown", "--question", " "], "the question is empty"),
    "damaged picture": (["--images", "damaged", "--question", "what?"], "is damaged"),
    "two sources": ([*ASK, "--task", "gqa"], "got --task and --images, expected one of them"),
    "task files alone": (["--include-path", "empty"], "--include-path came without --task"),
    "nothing to ask": (["--model", "empty"], "nothing to calibrate 'empty' with, expected --task"),
    "no model": (["--model", "empty", *ASK], "holds no config.json"),
    "special tokens": ([*ASK[:3], "<image> what?"], "expected plain text about pictures"),
    "samples": (["--samples", "0"], "expected a whole number of at least 1"),
    "what": (["--what", "dims"], "invalid choice: 'dims'"),
    "picture's ending": (["--plot", "a.pdf"], "ends in '.pdf', expected .png"),
    "out in no folder": (["--out", "gone/a.json"], "'gone' is not a folder, expected one"),
    "picture in no folder": ([*ASK, "--plot", "gone/a.png"], "'gone' is not a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_leaves_nothing(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, message = WRONG[name]
    before = sorted(folder.rglob("*"))
    assert run("--samples", "1", "--what", "sinks", *arguments) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("vtc: error: ") and message in line
    assert sorted(folder.rglob("*")) == before


def test_without_matplotlib_there_is_no_picture(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["--samples", "1", "--what", "sinks"]
    assert run(*arguments) == 0
    assert Path("vtc_calibration_llava.json").is_file() and not list(folder.glob("*.png"))
    assert run(*arguments, "--plot", "a.png") == 1
    assert "expected the eval extra for --plot" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["layers", "sinks", "heads"])
def test_a_picture_has_a_panel_for_each_part(what: str, tmp_path: Path) -> None:
    from tests.kit.prompts import build_inputs

    samples = [build_inputs("llava", [[4, "image", 5]])]
    found = vtc.calibrate(build_model("llava"), samples, what=what, progress=False)
    (tmp_path / "a.png").write_bytes(picture(found))
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.width < 1.5 * drawn.height
    assert picture(found) == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_model_of_the_testbed_comes_with_one(family: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder(family)).text_config
    found = vtc.Calibration.load(model_folder(family) / FILE)
    assert found.model == family and found.samples == 256
    assert len(found.layer_contribution or ()) == config.num_hidden_layers
    assert [len(row) for row in found.head_ratio or ()] == (
        [config.num_attention_heads] * config.num_hidden_layers
    )
    assert found.layer_contribution and found.layer_contribution[-1] == 0
