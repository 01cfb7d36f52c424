"""A sweep's settings in a file: those of the command line, or one error that names file and key."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from vtc.cli import _parser
from vtc.commands.sweep import _config
from vtc.errors import OptionError
from vtc.evaluation.config import SweepConfig, read_config

pytestmark = pytest.mark.eval

EVERYTHING = """
model: [llava, qwen2_vl]
out: out/mine
methods: ["vtc_cls:start=8", flowcut@0.5+todre@0.1]
keep: [1.0, 0.5, 64, 1tok]
layer-keep: 0.5
positions: keep
questions: 30
seeds: [0, 7]
tasks: vtc_scenes
include_path: tasks
metric: f1
device: cpu
dtype: float32
batch-size: 4
timed-samples: 0
pictures: 1
workers: 2
"""


@pytest.fixture
def written(tmp_path):
    """The settings of a file with this text."""
    file = tmp_path / "sweep.yaml"

    def write(text):
        file.write_text(text)
        return file

    return write


def parsed(*arguments):
    given = list(arguments)
    return _config(_parser().parse_args(given, argparse.Namespace(argv=given)))


def test_a_file_says_what_a_command_line_says(written):
    line = "--model llava qwen2_vl --out out/mine --methods vtc_cls:start=8 flowcut@0.5+todre@0.1"
    line += " --keep 1.0 0.5 64 1tok --layer-keep 0.5 --positions keep --questions 30 --seeds 0 7"
    line += " --tasks vtc_scenes --include-path tasks --metric f1 --device cpu --dtype float32"
    line += " --batch-size 4 --timed-samples 0 --pictures 1 --workers 2"
    by_hand = dataclasses.replace(parsed("sweep", *line.split()), command="")
    found = read_config(written(EVERYTHING))
    assert found == by_hand
    assert [type(keep) for keep in found.keeps] == [float, float, int, int]
    # nothing is left at its default, so every option was compared
    default = SweepConfig()
    for field in dataclasses.fields(SweepConfig):
        if field.name not in ("tasks", "command"):
            assert getattr(found, field.name) != getattr(default, field.name), field.name


def test_the_command_line_wins(written):
    file = written("questions: 30\nbatch-size: 4\n")
    found = parsed("sweep", "--config", str(file), "--questions", "7")
    assert (found.questions, found.batch_size, found.dtype) == (7, 4, SweepConfig().dtype)
    assert found.command == f"vtc sweep --config {file} --questions 7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question: 3", "key 'question' is unknown, expected one of model, out, methods, keep"),
        ("command: x", "key 'command' is unknown"),
        ("questions: many", "key 'questions': got 'many', input should be a valid integer"),
        ("questions: true", "key 'questions': got True"),
        ("questions: '3'", "key 'questions': got '3'"),
        ("questions: 0", "questions=0: expected at least 1"),
        ("batch-size: 1.5", "key 'batch-size': got 1.5"),
        ("methods: [3]", "key 'methods': got 3, input should be a valid string"),
        ("methods: nope", "methods: method 'nope' is unknown"),
        ("methods: [vtc_cls, 'vtc_cls:nope=1']", "methods: .* has no option 'nope'"),
        ("methods: null", "key 'methods': got None"),
        ("tasks: []", "tasks=()"),
        ("keep: 1", "key 'keep': keep=1 could be everything or one token"),
        ("keep: [0.5, 1.5]", "key 'keep': keep=1.5 is out of range"),
        ("layer-keep: 3", "layer_keeps: keep=3.0 is out of range"),
        ("positions: up", "positions: positions='up' is unknown"),
        ("device: 3", "key 'device': got 3, input should be a valid string"),
        ("model: 2020-01-01", "date"),
        ("batch-size: 3\nbatch_size: 4", "key 'batch_size' is there twice"),
        ("- questions", "got list, expected `key: value` lines"),
        ("", "got NoneType, expected `key: value` lines"),
        ("keep: [", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_is_one_error_with_file_and_key(written, text, message):
    file = written(text)
    with pytest.raises(OptionError) as caught:
        read_config(file)
    said = str(caught.value)
    assert said.startswith(f"{file}: ") and "\n" not in said
    assert all(part in said for part in message.split(".*"))


def test_folders_may_be_texts():
    config = SweepConfig(out="a/b", include_path="c")
    assert (config.out, config.include_path) == (Path("a/b"), Path("c"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OptionError, match=r"gone.yaml: cannot be read as YAML \(.*No such file"):
        read_config(tmp_path / "gone.yaml")
