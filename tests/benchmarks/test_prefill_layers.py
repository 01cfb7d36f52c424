"""The benchmark of skipped layers on toy models: its rows, its gate, its arithmetic, its join."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
# of a LLaVA with 36 visual tokens among 45 entries
TEXT, ENTRIES, WIDTH, FFN = 9, 45, 64, 160


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.append(str(FOLDER))
    try:
        import prefill_layers

        yield prefill_layers
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def rows(script: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("rows")
    given = ["--tiny", "--rounds", "1", "--calls", "2", "--commit", "abc", "--out", str(out)]
    assert script.main(given) == 0
    assert (out / "prefill_layers.png").stat().st_size > 10_000
    assert (out / "prefill_layers.svg").read_text().startswith("<?xml")
    found: list[dict[str, Any]] = script.read(out / "rows.jsonl")
    return found


def of(rows: list[dict[str, Any]], provider: str, **more: Any) -> list[dict[str, Any]]:
    wanted = {"size": "llava-1.5-tiny", "batch": 1, "provider": provider, **more}
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


@pytest.mark.slow
def test_rows_say_what_was_measured_where(rows: list[dict[str, Any]]) -> None:
    cases = {(row["size"], row["batch"]) for row in rows}
    assert cases == {("llava-1.5-tiny", 1), ("llava-1.5-tiny", 2), ("llava-next-tiny", 1)}
    for row in rows:
        for time in ("prefill_ms", "ttft_ms"):
            assert 0 < row[f"{time}_p20"] <= row[time] <= row[f"{time}_p80"]
        assert row["prefill_ms"] < row["ttft_ms"]
        assert row["runs"] == 2 and row["commit"] == "abc" and row["date"]
        assert row["torch"] == torch.__version__ and row["gpu"] is None
        assert (row["parity"] is None) == (row["provider"] == "stock")
    for name in ("shortv", "naavit"):
        assert [row["layers_skipped"] for row in of(rows, name)] == [0, 2]
        assert [row["active_fraction"] for row in of(rows, name)] == pytest.approx([1, 2 / 3])
    assert [row["layer_mean_tokens"] for row in of(rows, "uniform")] == [27, 8]
    # five of six layers see what stage 1 left
    (late,) = of(rows, "todre, stage 2")
    assert late["layer_entries"] == [ENTRIES] * 5 + [TEXT]
    (stock,) = of(rows, "stock", size="llava-next-tiny")
    assert (stock["visual_tokens"], stock["newline_tokens"]) == (45, 6)


@pytest.mark.slow
def test_flops_are_those_of_arithmetic(rows: list[dict[str, Any]]) -> None:
    counted = [row for row in rows if row["method"] != "todre"]
    assert all(row["flops"] == row["flops_arithmetic"] for row in counted)
    (stock,) = of(rows, "stock")
    visual = ENTRIES - TEXT
    # a multiplication and an addition: queries and outputs, scores and sums over values, FFN
    attention = visual * (4 * WIDTH * WIDTH + 4 * ENTRIES * WIDTH)
    ffn = visual * 6 * WIDTH * FFN
    for name, saved in (("shortv", attention + ffn), ("naavit", attention), ("ima_skip", ffn)):
        for row in of(rows, name):
            assert stock["flops"] - row["flops"] == row["layers_skipped"] * saved


@pytest.mark.slow
def test_linears_see_text_rows_alone(rows: list[dict[str, Any]]) -> None:
    asking, ffn = ("q_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    short = {"shortv": (*asking, *ffn), "naavit": asking, "ima_skip": ffn}
    for name, linears in short.items():
        for row in of(rows, name)[-1:]:
            seen = dict(row["linear_rows"])
            assert seen.pop("layer") == row["skipped"][0]
            assert len(seen) == 7
            for linear, count in seen.items():
                assert count == (TEXT if linear in linears else ENTRIES)


@pytest.mark.slow
def test_refuses_to_time_what_is_not_right(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vtc.plans import LayerRule

    # a ShortV that forgets to skip the feed-forward network
    shortv = sys.modules["vtc.methods.shortv"]
    monkeypatch.setattr(shortv, "LayerRule", lambda **_: LayerRule(attention=False))
    out = tmp_path / "out"
    assert script.main(["--tiny", "--sizes", "llava-1.5-7b", "--out", str(out)]) == 1
    assert not out.exists()
    said = capsys.readouterr().err
    assert "nothing was timed" in said and "shortv" in said and "naavit" not in said


def test_a_nan_is_red(script: Any) -> None:
    from prefill.parity import Parity

    assert Parity(1.0, 2.0, 0.0, 0.1).green
    assert not Parity(float("nan"), 2.0, 0.0, 0.1).green
    assert not Parity(1.0, 2.0, 0.2, 0.1).green


@pytest.mark.slow
def test_the_large_models_are_those_of_the_published_orders(script: Any) -> None:
    from prefill.providers import providers
    from prefill.sizes import SIZES

    from vtc.bench.shapes import build

    first = {"llava-1.5-7b": [31, 29, 30, 28, 0, 26], "llava-next-7b": [31, 29, 30, 28, 26, 27]}
    last = {"llava-1.5-7b": [12, 19, 1, 4, 5], "llava-next-7b": [0, 2, 1, 3, 4]}
    counts = {"llava-1.5-7b": (576, 640), "llava-next-7b": (2880, 64 + 2880 + 48)}
    for name, size in SIZES.items():
        model = build(size, "meta", torch.bfloat16)
        assert (size.visual, size.entries()) == counts[name]
        assert sum(p.numel() for p in model.model.language_model.parameters()) > 6.5e9
        (skipping, *_) = [p for p in providers(model, size, False) if p.layers == 24]
        places = skipping.options["calibration"].layer_contribution
        order = sorted(range(32), key=lambda layer: places[layer])
        assert order[:6] == first[name] and order[17:22] == last[name]
        with skipping.on(model) as handle:
            plan = handle._session.rows.plan
        chosen = [layer for layer, active in enumerate(plan.active) if not active]
        assert chosen == sorted(order[:24])


def cell(method: str, keep: str, accuracy: float, **more: Any) -> dict[str, Any]:
    made = {"task": "t", "method": method, "options": {}, "label": method, "positions": "keep"}
    return {**made, "keep": keep, "accuracy": accuracy, **more}


def time(provider: str, skips: str, share: float, ms: float) -> dict[str, Any]:
    kind = "stock" if provider == "stock" else "rows" if skips else "dropping"
    made = {"size": "s", "batch": 1, "provider": provider, "skips": skips, "kind": kind}
    return {**made, "active_fraction": share, "prefill_ms": ms}


MEASURED = [
    time("stock", "", 1.0, 40.0),
    time("shortv", "attention+ffn", 1.0, 44.0),
    time("shortv", "attention+ffn", 0.5, 24.0),
    time("uniform", "", 0.5, 22.0),
    time("uniform", "", 0.1, 10.0),
]
SWEEP = [
    cell("none", "1.0", 1.0, kept_fraction=1.0, active_fraction=1.0),
    # what an older sweep says: nothing of layers
    cell("shortv", "0.75", 0.93),
    cell("shortv", "0.25", 0.5, kept_fraction=1.0, active_fraction=0.25),
    cell("naavit", "0.5", 0.99, active_fraction=0.5, options={"skip_ffn": True}, label="n"),
    cell("var", "adaptive", 0.9, kept_fraction=1.0, active_fraction=1.0),
    cell("shortv@0.5+uniform@0.2", "adaptive", 0.9, kept_fraction=0.2, active_fraction=0.1),
    cell("uniform", "0.5", 0.93, kept_fraction=0.5),
    cell("uniform", "0.3", 0.93, kept_fraction=0.3, active_fraction=0.3),
    cell("uniform", "0.05", 0.5, kept_fraction=0.05),
]


def test_pairs_at_equal_accuracy(script: Any) -> None:
    from prefill.equal_accuracy import markdown, pairs

    first, second, third = pairs(MEASURED, SWEEP)
    assert (first["method"], first["active_fraction"], first["beside"]) == (
        "shortv",
        0.75,
        "uniform",
    )
    assert (first["prefill_ms"], first["between"]) == (34.0, True)
    # of equally accurate budgets the smaller one
    assert (first["beside_active_fraction"], first["beside_accuracy"]) == (0.3, 0.93)
    assert (first["beside_prefill_ms"], first["beside_between"]) == (16.0, True)
    # neither was measured
    assert second["prefill_ms"] is second["beside_prefill_ms"] is None
    # frozen rows cost what they cost, whoever froze them; nothing dropped is as accurate
    assert (third["method"], third["prefill_ms"], third["between"]) == ("n", 24.0, False)
    assert (third["beside_active_fraction"], third["beside_prefill_ms"]) == (1.0, 40.0)
    text = markdown([first, second, third])
    assert (
        "| `shortv` | 75.0 % | 93.0 % | `uniform` | 30.0 % | 93.0 % | ~34.0 against ~16.0 |" in text
    )
    assert "– against –" in text


def test_pairs_of_a_sweep_without_methods_over_layers(script: Any) -> None:
    from prefill.equal_accuracy import markdown, pairs

    sweep = json.loads((FOLDER / "results/testbed_internvl/table.json").read_text())["summary"]
    dropped = [row for row in sweep if row["method"] in ("none", "uniform", "vtc_cls")]
    assert pairs(MEASURED, dropped) == []
    assert markdown([]).startswith("The sweep has no pair")


@pytest.mark.slow
def test_draws_rows_measured_before(
    script: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "table.json").write_text(json.dumps({"summary": SWEEP}))
    given = ["--plot", str(tmp_path / "rows.jsonl"), "--accuracy", str(tmp_path / "table.json")]
    assert script.main(given) == 0
    assert (tmp_path / "prefill_layers.svg").is_file()
    found = json.loads((tmp_path / "equal_accuracy.json").read_text())
    assert {pair["size"] for pair in found} == {"llava-1.5-tiny", "llava-next-tiny"}
    assert (tmp_path / "equal_accuracy.md").read_text().startswith("`t`")
