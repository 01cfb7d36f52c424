"""Methods can't see evidence: it is not in what they are given, and one that looks is caught."""

import gc
import sys
import types
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch
from pyarrow import parquet

from vtc.errors import VtcError
from vtc.evaluation.blind import check_blind, other_evidence, with_evidence
from vtc.evaluation.model import Vtc
from vtc.scorers.base import Scorer
from vtc.testbed import evidence_tokens

pytestmark = pytest.mark.eval

KEEP = 0.11


@dataclass(frozen=True)
class Peeks(Scorer):
    """Evidence first, wherever `boxes` finds it."""

    name: ClassVar[str] = "peeks"
    where: Any = None

    def boxes(self):
        raise NotImplementedError

    def __call__(self, tokens):
        scores = torch.zeros(tokens.valid.shape)
        for group, (_, height, width) in enumerate(tokens.grid):
            wanted = evidence_tokens(self.boxes(), (height, width), (112, 112))
            scores[group, : len(wanted)] = wanted.float()
        return scores


class WalksTheStack(Peeks):
    def boxes(self):
        frame = sys._getframe()
        while frame is not None:
            for value in frame.f_locals.values():
                first = value[0] if isinstance(value, list) and value else None
                if isinstance(first, dict) and "evidence" in first:
                    return first["evidence"]
            frame = frame.f_back
        return []


class AsksTheCollector(Peeks):
    def boxes(self):
        found = [one for one in gc.get_objects() if isinstance(one, datasets.Dataset)]
        found = [one for one in found if "evidence" in one.column_names and len(one) > 1]
        return found[0][self.where]["evidence"]


class ReadsTheFile(Peeks):
    def boxes(self):
        path, number = self.where
        return parquet.read_table(path)["evidence"][number].as_py()


class KeepsTheTask(Peeks):
    def boxes(self):
        task, number = self.where
        return task.dataset["test"][number]["evidence"]


class KeepsTheDataSet(Peeks):
    def boxes(self):
        data, number = self.where
        return data[number]["evidence"]


@dataclass(frozen=True)
class Spies(Scorer):
    """Notes what it is given."""

    name: ClassVar[str] = "spies"
    given: Any = None

    def __call__(self, tokens):
        self.given.append(tokens)
        return torch.arange(tokens.valid.shape[1]).float().expand(tokens.valid.shape)


@pytest.fixture
def task(scenes):
    return scenes[0]


@pytest.fixture
def builds(loaded):
    def build(method="vtc_cls", keep=KEEP, **options):
        return partial(Vtc, loaded, method=method, keep=keep, record_left=True, **options)

    return build


@pytest.fixture
def file(tasks_folder):
    return tasks_folder / "vtc_scenes.parquet"


def test_honest_methods_pass(builds, task, file):
    methods = {
        "vtc_cls": builds(),
        "random": builds("random"),
        "average_pool": builds("average_pool"),
        "downsample": builds("downsample"),
        "flowcut": builds("flowcut"),
        "todre": builds("todre"),
        "naavit": builds("naavit", keep=None, layers=(2, 4)),
    }
    before = file.read_bytes(), file.stat().st_mtime_ns
    assert check_blind(methods, task, [file]) == []
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


@pytest.mark.parametrize("kind", ["stack", "collector", "file", "task", "data set"])
def test_a_scorer_that_looks_at_the_boxes_is_caught(kind, builds, task, file):
    number = with_evidence(task)[0]
    scorer = {
        "stack": WalksTheStack(),
        "collector": AsksTheCollector(number),
        "file": ReadsTheFile((str(file), number)),
        "task": KeepsTheTask((task, number)),
        "data set": KeepsTheDataSet((task.dataset["test"], number)),
    }[kind]
    methods = {"honest": builds(), "cheat": builds(scorer=scorer)}
    with pytest.raises(VtcError, match=r"method cheat peeks: .* in . of 4 questions"):
        check_blind(methods, task, [file])


def test_without_the_counterfactual_such_a_scorer_would_look_good(answer, task):
    """What the check is for: evidence first keeps all of it."""
    found = answer(8, method="vtc_cls", keep=KEEP, scorer=WalksTheStack())
    recalls = [s["evidence_recall"] for s in found if s.get("evidence_recall") is not None]
    honest = answer(8, method="random", keep=KEEP)
    others = [s["evidence_recall"] for s in honest if s.get("evidence_recall") is not None]
    assert sum(recalls) / len(recalls) > 2 * sum(others) / len(others)


def test_everything_is_as_it_was_behind_the_check(task, file):
    data = task.dataset["test"]
    before, content = list(data["evidence"]), file.read_bytes()
    with other_evidence([file]):
        assert task.dataset["test"] is data
        rolled = before[1:] + before[:1]
        assert list(data["evidence"]) == rolled
        assert parquet.read_table(file)["evidence"].to_pylist() == rolled
        # nothing else moves
        assert data["question"] == task.dataset["test"]["question"]
    assert list(data["evidence"]) == before and file.read_bytes() == content
    with pytest.raises(KeyError), other_evidence([file]):
        raise KeyError
    assert list(data["evidence"]) == before and file.read_bytes() == content


def test_what_does_not_decide_the_same_twice_is_said_and_not_accused(builds, task):
    @dataclass(frozen=True)
    class Counts(Scorer):
        name: ClassVar[str] = "counts"
        calls: Any = None

        def __call__(self, tokens):
            self.calls.append(1)
            place = torch.arange(tokens.valid.shape[1])
            return ((place * 31 + 17 * len(self.calls)) % 196).float().expand(tokens.valid.shape)

    (note,) = check_blind({"counts": builds(scorer=Counts([]))}, task)
    assert note.startswith("counts does not decide the same twice")


def test_tasks_without_evidence_have_nothing_to_see(task):
    class Bare:
        config = task.config
        eval_docs = task.eval_docs.remove_columns("evidence")

    def never():
        raise AssertionError

    assert check_blind({"any": never}, Bare()) == []


def test_nothing_that_a_method_is_given_leads_to_a_question(builds, task):
    given: list[Any] = []
    model = builds(scorer=Spies(given))()
    check_blind({"spies": lambda: model}, task, count=1)
    assert given
    # code leads everywhere; what it was called with is looked at
    code = (type, types.ModuleType, types.FunctionType, types.FrameType, types.CodeType)
    seen, todo = set(), list(given)
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (*code, str, bytes, int, float)):
            continue
        seen.add(id(one))
        assert not isinstance(one, (datasets.Dataset, datasets.DatasetDict)), one
        assert not (isinstance(one, dict) and "evidence" in one)
        todo += gc.get_referents(one)
    assert len(seen) > 10


def test_a_sweep_refuses_a_method_that_peeks(sweep, tmp_path, monkeypatch):
    from vtc.evaluation.compression import Compression

    stock = Compression.build

    def build(self):
        cheats = self.method == "vtc_cls"
        return replace(stock(self), scorer=WalksTheStack()) if cheats else stock(self)

    monkeypatch.setattr(Compression, "build", build)
    with pytest.raises(VtcError, match="method vtc_cls peeks"):
        sweep(tmp_path / "out")
    assert not list(Path(tmp_path / "out" / "cells").glob("*.json"))


def test_each_method_is_told_when_it_has_answered(builds, task, file):
    steps = []
    methods = {"uniform": builds("uniform"), "random": builds("random")}
    check_blind(methods, task, [file], count=1, step=steps.append)
    assert steps == [*methods, *methods]
