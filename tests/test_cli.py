"""The commands: what they print, and one line for every wrong use, with nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vtc
from vtc.cli import main
from vtc.commands.files import read_picture
from vtc.errors import InputError, OptionError
from vtc.evaluation.benchmarks import BENCHMARKS
from vtc.keep import parse_keep
from vtc.testbed.model import build_model, build_processor

QUESTION = ["--image", "picture.png", "--question", "what color is the star?"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A stock LLaVA with random weights and 3 encoder blocks, saved with its processor."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    processor = build_processor()
    build_model(processor.tokenizer, small=True).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
    """A working folder with good and bad files; its cache is inside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model").symlink_to(tiny)
    Image.effect_noise((150, 112), 60).save("picture.png")
    Path("damaged.png").write_bytes(Path("picture.png").read_bytes()[:2000])
    Path("notes.txt").write_text("not a picture")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/mine.txt").write_text("precious")
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    Path("text").mkdir()
    Path("text/config.json").write_text('{"model_type": "gpt2"}')
    return tmp_path


def run(*arguments):
    """The exit status, also of argparse's own errors."""
    try:
        return main(list(arguments))
    except SystemExit as stop:
        return stop.code


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def demo(*arguments, image=True):
    picture = QUESTION if image else []
    return ["demo", "--model", "model", "--method", "random", *picture, *arguments]


WRONG = {
    "no command": ([], "arguments are required: COMMAND"),
    "unknown command": (["dmeo"], "invalid choice: 'dmeo' (choose from 'demo'"),
    "unknown flag": (["demo", "--kep", "1.0"], "unrecognized arguments: --kep"),
    "unknown method": (demo("--method", "vtc-cls"), "'vtc-cls' is unknown; expected one of"),
    "unknown option": (demo("--method", "vtc_cls:strat=1"), "has no option 'strat'; it has"),
    "option type": (demo("--method", "vtc_cls:start=high"), "expected int"),
    "option without value": (demo("--method", "vtc_cls:start"), "expected option=value"),
    "keep 0": (demo("--keep", "0"), "keep=0 tokens is out of range, expected at least 1"),
    "keep 1.5": (demo("--keep", "1.5"), "keep=1.5 is out of range, expected (0, 1]"),
    "keep -3": (demo("--keep", "-3"), "keep=-3 tokens is out of range"),
    "keep half": (demo("--keep", "half"), "keep='half' is not a number: write a fraction"),
    "keep 1": (demo("--keep", "1"), "everything or one token: write 1.0 or 1tok"),
    "keep of none": (demo("--method", "none", "--keep", "0.5"), "'none' keeps everything"),
    "positions": (demo("--positions", "sideways"), "invalid choice: 'sideways'"),
    "seed": (demo("--seed", "-1"), "got '-1', expected a whole number of at least 0"),
    "new tokens": (demo("--max-new-tokens", "0"), "expected a whole number of at least 1"),
    "device": (demo("--device", "tpu9"), "device 'tpu9' cannot be used here"),
    "no image file": (demo("--image", "gone.png"), "'gone.png' is not there, expected a picture"),
    "image is a folder": (demo("--image", "empty"), "'empty' is a folder, expected a picture"),
    "image is text": (demo("--image", "notes.txt"), "'notes.txt' is not a picture, expected"),
    "damaged image": (demo("--image", "damaged.png"), "'damaged.png' is damaged"),
    "image alone": (demo("--image", "picture.png", image=False), "expected both: add --question"),
    "empty question": (demo("--question", "  "), "the question is empty, expected some text"),
    "two pictures": (demo("--question", "<image> where?"), "expected plain text about one picture"),
    "no model folder": (demo("--model", "./gone"), "'./gone' is not a folder, expected"),
    "model is a file": (demo("--model", "notes.txt"), "'notes.txt' is not a folder, expected"),
    "folder without model": (demo("--model", "empty"), "holds no config.json, expected one"),
    "broken configuration": (demo("--model", "broken"), "'broken' could not be loaded"),
    "language model": (demo("--model", "text"), "'text' could not be loaded"),
    "unknown hub id": (demo("--model", "no/such"), "was not found on the hub or in its cache"),
    "shallow encoder": (demo("--method", "vtc_cls"), "choose a start of at most 11"),
    "out is a folder": (demo("--out", "empty"), "ends in '', expected a picture's ending"),
    "out ending": (demo("--out", "a.doc"), "ends in '.doc', expected a picture's ending"),
    "out in no folder": (demo("--out", "gone/a.png"), "'gone' is not a folder, expected one"),
    "methods model": (["methods", "--model", "empty"], "holds no config.json"),
    "tasks count": (["tasks", "--questions", "few"], "got 'few', expected a whole number"),
    "tasks into a full folder": (["tasks", "--out", "full"], "not an empty folder"),
    "tasks into a file": (["tasks", "--out", "notes.txt"], "not an empty folder"),
    "sweep method": (["sweep", "--model", "model", "--methods", "nope"], "'nope' is unknown"),
    "sweep keep": (["sweep", "--keep", "0.5", "1"], "write 1.0 or 1tok"),
    "sweep questions": (["sweep", "--questions", "0"], "whole number of at least 1"),
    "sweep model": (["sweep", "--model", "./gone"], "'./gone' is not a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_leaves_nothing(name, folder, capfd):
    arguments, message = WRONG[name]
    before = files(folder)
    assert run(*arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("vtc: error: ") and message in line
    assert files(folder) == before


@pytest.fixture
def read_only(folder):
    """A folder that even root cannot write to, if need be."""
    place = folder / "locked"
    place.mkdir(mode=0o555)
    if os.access(place, os.W_OK):
        place = Path("/sys")
    if not place.is_dir() or not sys.platform.startswith("linux"):
        pytest.skip("no folder is read-only here")
    return place


@pytest.mark.parametrize("command", ["demo", "tasks", "sweep"])
def test_a_read_only_folder_fails_before_any_work(command, folder, read_only, capfd):
    arguments = {
        "demo": demo("--out", str(read_only / "a.png")),
        "tasks": ["tasks", "--out", str(read_only / "tasks")],
        "sweep": ["sweep", "--model", "model", "--out", str(read_only / "sweep")],
    }
    before = files(folder)
    assert run(*arguments[command]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("vtc: error: ") and "expected a" in line
    assert files(folder) == before


@pytest.mark.parametrize("tolerant", [True, False])
def test_a_damaged_image_is_refused_whatever_others_told_pillow(folder, monkeypatch, tolerant):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    with pytest.raises(InputError, match="is damaged"):
        read_picture(Path("damaged.png"))
    assert tolerant == ImageFile.LOAD_TRUNCATED_IMAGES


def test_demo_answers_and_draws(folder, capfd):
    assert run(*demo("--keep", "22", "--out", "seen.PNG", "--max-new-tokens", "4")) == 0
    out = capfd.readouterr().out
    assert "what color is the star?" in out and "kept fraction" in out
    with Image.open("seen.PNG") as drawn:
        assert drawn.size == (560, 560)
    assert not list(folder.glob(".vtc-*"))


def test_demo_as_json(folder, capfd):
    arguments = ["--keep", "1.0", "--method", "vtc_cls:start=1", "--max-new-tokens", "4", "--json"]
    assert run(*demo(*arguments)) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["answer"] == found["full"]
    assert found["report"]["llm_tokens"] == [196]


def test_demo_shows_a_scene_and_its_answer(folder, capfd):
    assert run(*demo("--scene", "3", "--json", image=False)) == 0
    found = json.loads(capfd.readouterr().out)
    scene = vtc.testbed.examples(4, split="test", seed=0)[3]
    assert (found["question"], found["expected"]) == (scene.question, scene.answer)


def test_methods_lists_all_and_resolves_their_layers(folder, capfd):
    assert run("methods", "--json") == 0
    rows = json.loads(capfd.readouterr().out)
    assert [row["method"] for row in rows] == list(vtc.methods())
    assert run("methods", "--model", "model") == 0
    lines = capfd.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("vtc_cls")]
    assert "choose a start of at most 11" in line


def test_doctor_names_versions_and_families(folder, capfd):
    run("doctor", "--json", "--model", "model")
    found = json.loads(capfd.readouterr().out)
    rows = {row["what"]: row for row in found}
    assert rows["torch"]["found"] == torch.__version__.partition("+")[0]
    families = [row["found"] for row in found if row["what"] == "can patch"]
    assert len(families) == 7
    assert any("LlavaForConditionalGeneration" in name for name in families)
    assert rows["model"]["found"] == "can be patched: 3 encoder blocks with [CLS]"
    assert run("doctor", "--model", "text") == 1


def test_doctor_sees_a_folder_that_shadows_another_package(folder, capfd):
    Path("kernels").mkdir()
    Path("kernels/__init__.py").touch()
    run("doctor")
    assert "import ./kernels" in capfd.readouterr().out


def test_tasks_prints_a_folder_and_reuses_it(folder, capfd):
    assert run("tasks", "--questions", "16") == 0
    path = Path(capfd.readouterr().out.rstrip("\n"))
    assert path.is_relative_to(folder / "cache" / "vtc")
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert any(p.suffix == ".yaml" for p in before)
    assert run("tasks", "--questions", "16") == 0
    assert capfd.readouterr().out == f"{path}\n"
    assert before == {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_benchmarks_without_the_extra(folder, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "lmms_eval.utils", raising=False)
    for of in BENCHMARKS.values():
        for read in ("file", "config"):
            vars(of).pop(read, None)
    assert run("tasks", "--list") == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "lmms_eval is not installed, expected the eval extra; pip install" in line


def test_the_console_script_is_the_same_program(folder):
    script = Path(sys.executable).with_name("vtc")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"vtc {vtc.__version__}\n"
    wrong = subprocess.run([script, *demo("--keep", "1")], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("vtc: error: ") and wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("0.11", 0.11),
        (".5", 0.5),
        ("1.0", 1.0),
        ("64", 64),
        ("64tok", 64),
        ("1tok", 1),
        (7, 7),
        (1.0, 1.0),
    ],
)
def test_keep_as_text(text, keep):
    parsed = parse_keep(text)
    assert (type(parsed), parsed) == (type(keep), keep)


@pytest.mark.parametrize(
    "text", ["1", 1, "0", "0tok", "1.5", "-3", "nan", "half", "", "5 tok", True, None]
)
def test_keep_that_is_none(text):
    with pytest.raises(OptionError):
        parse_keep(text)
