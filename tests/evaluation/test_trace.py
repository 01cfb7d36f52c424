"""Every number of a table comes from the samples that its row names, and a changed one is found."""

import json
import shutil

import pandas as pd
import pytest

from vtc.cli import main
from vtc.errors import InputError
from vtc.evaluation import report, statistics, store
from vtc.evaluation.ranking import ranking
from vtc.evaluation.table import tables
from vtc.evaluation.trace import trace, trace_areas

pytestmark = pytest.mark.eval

QUESTIONS = 16


@pytest.fixture
def out(swept, tmp_path):
    """A copy of a small sweep's folder."""
    return shutil.copytree(swept.out, tmp_path / "copy")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_pandas(out):
    """The table's numbers, from the samples files and nothing else of the project."""
    parts = []
    for file in sorted((out / "cells").glob("*.samples.jsonl")):
        settings = json.loads(
            file.with_name(file.name.replace(".samples.jsonl", ".json")).read_text()
        )
        settings = settings["settings"]
        part = pd.DataFrame(lines(file))
        for name in ("model", "method", "positions", "seed"):
            part[name] = settings[name]
        part["keep"] = str(settings["keep"])
        parts.append(part)
    frame = pd.concat(parts, ignore_index=True)
    timed = pd.DataFrame(
        [
            {"cell": name, **line}
            for name in {cell for row in rows_of(out, "rows") for cell in row["times"]}
            for line in lines(out / "times" / f"{name}.samples.jsonl")
        ]
    )
    return frame, timed


def rows_of(out, name):
    return json.loads((out / "table.json").read_text())[name]


KEY = ["model", "task", "method", "positions", "keep"]


def test_the_whole_table_is_what_pandas_makes_of_the_samples(out):
    frame, timed = by_pandas(out)
    questions = frame.groupby([*KEY, "doc_id"])["score"].mean().reset_index()
    accuracy = questions.groupby(KEY)["score"].mean()
    scores = questions.set_index([*KEY, "doc_id"])["score"]
    summary = rows_of(out, "summary")
    assert len(summary) == len(accuracy)
    for row in summary:
        key = tuple(row[name] for name in KEY)
        own = scores.loc[key]
        assert row["n"] == len(own) == QUESTIONS
        assert row["accuracy"] == pytest.approx(accuracy[key])
        cell = frame[(frame[KEY] == key).all(axis=1)]
        assert row["seeds"] == cell["seed"].nunique()
        for name in ("kept_fraction", "active_fraction", "visual_tokens", "llm_tokens"):
            assert row[name] == pytest.approx(cell[name].mean())
        assert row["layer_mean_tokens"] == pytest.approx(cell["layer_mean_tokens"].mean())
        recall = cell["evidence_recall"].astype(float).mean()
        assert row["evidence_recall"] == (None if pd.isna(recall) else pytest.approx(recall))
        images = cell["image_kept_fractions"].explode().astype(float)
        for name, share in {"min": 0, "p20": 0.2, "p50": 0.5, "p80": 0.8, "max": 1}.items():
            assert row[f"kept_{name}"] == pytest.approx(images.quantile(share))
        for kind, mean in cell.groupby("kind")["score"].mean().items():
            assert row[f"accuracy_{kind}"] == pytest.approx(mean)
        others = {
            "full": ("none", "keep", "1.0"),
            "random": ("random", row["positions"], row["keep"]),
            "downsample": ("downsample", "keep", row["keep"]),
            "original_ids": (row["method"], "keep", row["keep"]),
        }
        for name, rest in others.items():
            if row[f"vs_{name}"] is not None:
                other = scores.loc[(row["model"], row["task"], *rest)]
                assert row[f"vs_{name}"] == pytest.approx((own - other).mean())
        took = timed[timed["cell"].isin(row["times"])]
        assert row["n_timed"] == len(took) > 0
        for name in ("ttft_ms", "encoder_ms", "kv_bytes"):
            median = took[name].astype(float).median()
            assert row[name] == (None if pd.isna(median) else pytest.approx(median))
        assert row["ttft_ratio"] == pytest.approx((took["ttft_ms"] / took["full_ttft_ms"]).median())


def test_a_row_for_each_seed_is_that_of_its_own_cell(out):
    frame, _ = by_pandas(out)
    means = frame.groupby([*KEY, "seed"])["score"].mean()
    rows = rows_of(out, "rows")
    assert len(rows) == len(means)
    for row in rows:
        assert row["accuracy"] == pytest.approx(means[(*(row[k] for k in KEY), row["seed"])])
        (cell,) = row["cells"]
        assert len(lines(out / "cells" / f"{cell}.samples.jsonl")) == row["n"]


def test_every_row_is_computed_again_from_what_is_on_disk(out, swept):
    found = trace(out)
    assert [one.row["label"] for one in found] == [row["label"] for row in swept.summary]
    assert not [gap for one in found for gap in one.differences]
    assert all(path.is_file() for one in found for path in one.files)
    seeds = trace(out, method="random", seed="1")
    assert {one.row["seed"] for one in seeds} == {1} and len(seeds) == 4
    assert not [gap for one in seeds for gap in one.differences]


def test_the_command_prints_the_row_its_files_and_their_first_lines(out, capsys):
    asked = ["--method", "random", "--keep", "0.11", "--positions", "renumber"]
    assert main(["trace", str(out), *asked]) == 0
    said = capsys.readouterr().out
    (row,) = [
        row
        for row in rows_of(out, "summary")
        if (row["label"], row["keep"], row["positions"]) == ("random", "0.11", "renumber")
    ]
    assert len(row["cells"]) == 2
    assert f"accuracy = {row['accuracy']}" in said
    for cell in row["cells"]:
        path = out / "cells" / f"{cell}.samples.jsonl"
        assert str(path) in said and path.read_text().splitlines()[0][:150] in said
    assert said.endswith("computed again from the samples: 1 of 1 rows are the same\n")
    assert main(["trace", str(out), *asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["row"] == row


@pytest.mark.parametrize("column", ["accuracy", "vs_random_low", "p_random_holm", "kept_p80"])
def test_a_number_that_was_changed_in_the_table_is_found(out, column, capsys):
    content = json.loads((out / "table.json").read_text())
    (row,) = [
        row
        for row in content["summary"]
        if (row["label"], row["keep"], row["positions"]) == ("vtc_cls", "0.11", "keep")
    ]
    row[column] += 0.125
    (out / "table.json").write_text(json.dumps(content))
    asked = ["--method", "vtc_cls", "--keep", "0.11", "--positions", "keep"]
    assert main(["trace", str(out), *asked]) == 1
    assert f"differs: {column}: {row[column]!r} in the table" in capsys.readouterr().out


def test_every_area_is_computed_again_from_what_is_on_disk(out, swept, capsys):
    found = trace_areas(out)
    assert [one.row["label"] for one in found] == [row["label"] for row in swept.ranking]
    assert not [gap for one in found for gap in one.differences]
    asked = ["trace", str(out), "--area", "--method", "random", "--positions", "renumber"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    (row,) = [
        row
        for row in rows_of(out, "ranking")
        if (row["label"], row["positions"]) == ("random", "renumber")
    ]
    assert f"area = {row['area']}" in said
    # two keeps, each with two seeds, and the full model
    assert said.count(".samples.jsonl") == 5
    assert said.endswith("computed again from the samples: 1 of 1 rows are the same\n")

    content = json.loads((out / "table.json").read_text())
    for one in content["ranking"]:
        one["p_random_holm"] = one["p_random_holm"] and one["p_random_holm"] / 2
    (out / "table.json").write_text(json.dumps(content))
    assert main(["trace", str(out), "--area", "--method", "vtc_cls"]) == 1
    assert "differs: p_random_holm: " in capsys.readouterr().out
    assert main(["trace", str(out), "--area", "--keep", "0.11"]) == 2
    assert "an area is over all keeps" in capsys.readouterr().err


def test_samples_that_were_changed_are_refused(out):
    (row,) = [r for r in rows_of(out, "summary") if r["label"] == "none"]
    path = out / "cells" / f"{row['cells'][0]}.samples.jsonl"
    path.write_text(path.read_text().replace('"score": 1.0', '"score": 0.0', 1))
    with pytest.raises(InputError, match=r"changed after it was written"):
        trace(out, method="none")
    path.unlink()
    with pytest.raises(InputError, match=r"samples.jsonl cannot be read.*run the same sweep again"):
        trace(out, method="none")


def test_wrong_use_says_what_is_there(out, tmp_path, capsys):
    assert main(["trace", str(out), "--method", "nosuch"]) == 2
    assert "no row with method=nosuch" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "nowhere")]) == 2
    assert "table.json cannot be read" in capsys.readouterr().err


def test_the_same_samples_give_the_same_bytes(out, swept):
    """Table and ranking, computed twice more, are what was written."""
    content = json.loads((out / "table.json").read_text())
    for _ in range(2):
        statistics._ends.cache_clear()
        rows, summary = tables(swept.samples)
        again = {"rows": rows, "summary": summary, "ranking": ranking(swept.samples, summary)}
        assert again == {name: getattr(swept, name) for name in again}
        written = {name: content.get(name, again[name]) for name in again}
        assert store.to_json(again) == store.to_json(written)
        assert report._csv(rows) == (out / "table.csv").read_text()
