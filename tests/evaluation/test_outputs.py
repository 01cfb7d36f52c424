"""The files of a finished sweep: every number comes from the samples beside it."""

import json

import numpy as np
import pandas as pd
import pytest

from vtc.evaluation.statistics import RESAMPLES, SEED

pytestmark = pytest.mark.eval

KEY = ["method", "positions", "keep", "seed"]
MEANS = ["kept_fraction", "active_fraction", "visual_tokens", "llm_tokens"]
MEANS += ["evidence_recall", "evidence_covered"]
MEDIANS = ["encoder_ms", "selector_ms", "ttft_ms", "tpot_ms", "kv_bytes", "peak_memory_bytes"]


@pytest.fixture(scope="module")
def csv(swept):
    return pd.read_csv(swept.out / "table.csv", dtype={"keep": str})


@pytest.fixture(scope="module")
def samples(swept):
    """All samples with their times, from the files alone."""
    answered, timed = read(swept.out / "cells"), read(swept.out / "times")
    names = [*KEY, "task", "doc_id"]
    left = answered.drop(columns=[c for c in timed if c in answered and c not in names])
    found = left.merge(timed, "left", names, validate="one_to_one")
    columns = dict.fromkeys([*found, *MEANS, *MEDIANS])
    return found.reindex(columns=list(columns))


def read(folder):
    """The lines of all cells in a folder, with what names each cell."""
    parts = []
    for path in sorted(folder.glob("*.samples.jsonl")):
        cell = json.loads(path.with_name(path.name.replace(".samples.jsonl", ".json")).read_text())
        part = pd.read_json(path, lines=True, dtype={"answer": str, "target": str})
        settings = {key: cell["settings"][key] for key in KEY}
        parts.append(part.assign(**settings | {"keep": str(settings["keep"])}))
    return pd.concat(parts, ignore_index=True)


def of(samples, **wanted):
    found = samples
    for name, value in wanted.items():
        found = found[found[name] == value]
    return found.sort_values("doc_id")


def own(samples, row):
    return of(samples, **{key: row[key] for key in KEY})


def percentiles(values):
    random, n = np.random.default_rng(SEED), len(values)
    means = [values[random.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    return np.percentile(means, [2.5, 97.5])


def same(a, b):
    return (pd.isna(a) and pd.isna(b)) or a == pytest.approx(b)


def test_a_row_per_cell(csv, samples, swept):
    assert len(csv) == len(samples.groupby(KEY)) == len(list((swept.out / "cells").glob("*.json")))
    # the full model; 2 budgets × 2 policies, and × 2 seeds for random; three more baselines
    assert len(csv) == 1 + 4 + 8 + 6
    assert (csv["n"] == 16).all() and (csv["seeds"] == 1).all()


def test_accuracies_are_means_of_scores(csv, samples):
    for _, row in csv.iterrows():
        part = own(samples, row)
        assert row["accuracy"] == pytest.approx(part["score"].mean())
        for kind, score in part.groupby("kind")["score"].mean().items():
            assert row[f"accuracy_{kind}"] == pytest.approx(score)
    kinds = {f"accuracy_{kind}" for kind in samples["kind"]}
    found = {name for name in csv if name.startswith("accuracy_")}
    assert found - {"accuracy_low", "accuracy_high"} == kinds


def test_counts_are_means_and_times_are_medians(csv, samples):
    for _, row in csv.iterrows():
        part = own(samples, row)
        for name in MEANS:
            assert same(row[name], part[name].mean()), name
        for name in MEDIANS:
            assert same(row[name], part[name].median()), name
        assert row["n_timed"] == part["ttft_ms"].notna().sum() == 3


def test_times_are_shares_of_the_full_models_on_the_same_question(csv, samples):
    for _, row in csv.iterrows():
        part = own(samples, row)
        assert (part["full_ttft_ms"].notna() == part["ttft_ms"].notna()).all()
        shares = (part["ttft_ms"] / part["full_ttft_ms"]).dropna()
        assert row["ttft_ratio"] == pytest.approx(shares.median())
        ends = row["ttft_ratio_p20"], row["ttft_ratio_p80"]
        assert ends == pytest.approx(tuple(np.percentile(shares, [20, 80])))


def test_differences_are_paired_by_question(csv, samples):
    full = of(samples, method="none")["score"].to_numpy(float)
    for _, row in csv.iterrows():
        scores = own(samples, row)["score"].to_numpy(float)
        assert row["vs_full"] == pytest.approx((scores - full).mean())
        ends = percentiles(scores - full)
        assert (row["vs_full_low"], row["vs_full_high"]) == pytest.approx(tuple(ends))
        random = of(samples, method="random", keep=row["keep"], positions=row["positions"])
        if random.empty or row["method"] == "random":
            assert pd.isna(row["vs_random"])
            continue
        gaps = scores - random.groupby("doc_id")["score"].mean().to_numpy(float)
        assert row["vs_random"] == pytest.approx(gaps.mean())
        ends = percentiles(gaps)
        assert (row["vs_random_low"], row["vs_random_high"]) == pytest.approx(tuple(ends))


def test_policies_are_paired_by_question(csv, samples):
    for _, row in csv.iterrows():
        if row["positions"] == "keep":
            assert pd.isna(row["vs_original_ids"])
            continue
        scores = own(samples, row)["score"].to_numpy(float)
        same_cell = {name: row[name] for name in ("method", "keep", "seed")}
        gaps = scores - of(samples, positions="keep", **same_cell)["score"].to_numpy(float)
        assert row["vs_original_ids"] == pytest.approx(gaps.mean())
        ends = percentiles(gaps)
        found = row["vs_original_ids_low"], row["vs_original_ids_high"]
        assert found == pytest.approx(tuple(ends))


def test_scores_are_right_answers_and_nothing_else(samples):
    plain = samples["answer"].str.strip().str.lower() == samples["target"].str.lower()
    assert (samples["score"] == plain).all()


def test_json_holds_the_same_rows_and_the_seeds_averaged(csv, samples, swept):
    text = (swept.out / "table.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for (_, row), other in zip(csv.iterrows(), found["rows"], strict=True):
        for name in csv:
            if name != "options":
                value = other.get(name)
                value = " ".join(value) if isinstance(value, list) else value
                assert same(row[name], np.nan if value is None else value), name
    for row in found["summary"]:
        part = of(samples, **{key: row[key] for key in ("method", "positions", "keep")})
        assert row["accuracy"] == pytest.approx(part["score"].mean())
        assert row["evidence_recall"] is None or row["evidence_recall"] == pytest.approx(
            part["evidence_recall"].mean()
        )
        assert row["seeds"] == (2 if row["method"] == "random" else 1)
    assert found["environment"]["torch"]


def test_evidence_is_known_for_every_row_that_keeps_tokens(csv):
    keeps = ~csv["method"].isin(["average_pool", "downsample"])
    assert csv[keeps]["evidence_recall"].notna().all()
    assert csv[~keeps]["evidence_recall"].isna().all()
    assert (csv[~keeps]["evidence_covered"] == 1.0).all()
