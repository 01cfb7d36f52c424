"""The benchmark of the first token on toy models: its gate, its rows, its plan."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vtc
from vtc.bench import gate, measure, tables, ttft
from vtc.bench.families import SHAPES, tiny
from vtc.bench.plan import Settings, planned
from vtc.bench.providers import Provider, flash_missing, provided, with_keep
from vtc.bench.rows import Store, key, read
from vtc.bench.shapes import build, sharpen

GIVEN = ["--tiny", "--models", "llava-1.5-7b", "--batches", "1", "--commit", "abc"]
MAIN = [*GIVEN, "--parts", "main", "--methods", "vtc_cls"]


@pytest.fixture(scope="module")
def rows(load: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    out = tmp_path_factory.mktemp("rows")
    assert load("ttft").main([*MAIN, "--out", str(out)]) == 0
    return read(out / "rows.jsonl")


def test_rows_say_what_was_measured(rows: list[Any]) -> None:
    assert [(r["method"], r["keep"], r["path"]) for r in rows] == [
        ("stock", None, "eager"),
        ("stock", None, "fast"),
        ("vtc_cls", 4, "eager"),
        ("vtc_cls", 4, "fast"),
    ]
    assert len({key(row) for row in rows}) == 4
    for row in rows:
        for name in ("ttft_ms", "generate_1_ms", "encoder_ms", "prefill_ms", "generate_ms"):
            assert row[f"{name}_p20"] <= row[name] <= row[f"{name}_p80"]
        assert row["ttft_ms"] > 0 and row["encoder_ms"] > 0 and row["runs"] == 2
        assert (row["new_tokens"], row["generate_runs"]) == (4, 1)
        assert row["kv_bytes"] > 0 and not row["meaningful"] and row["commit"] == "abc"
        assert (row["parity"] is None) == (row["path"] == "eager")
        # what is tried against what, of this very process
        assert row["stock"]["eager"]["ttft_ms"] == rows[0]["ttft_ms"]
        assert set(row["floor_ms"]) == {"encoder", "gather", "prefill", "decode"}
    for row in rows[1:]:
        assert row["stock"]["fast"]["ttft_ms"] == rows[1]["ttft_ms"]
    for row in rows[2:]:
        assert row["kept_tokens"] == [4] and 0 < row["selection_share"] < 1
        assert row["floor_ms"]["prefill"] < rows[0]["floor_ms"]["prefill"]
    assert "ttft_ms_at_the_end" in rows[0]
    assert set(rows[3]["fast"]) >= {"encoder", "prefill", "decode"}
    # what an eager path takes for each of its steps, and for each block
    assert rows[2]["score_ms"] > 0 and rows[2]["select_ms"] > 0 and rows[2]["gather_ms"] > 0
    assert len(rows[2]["block_ms"]) == 6


def test_toys_have_no_speedup(rows: list[Any]) -> None:
    head, *lines = tables.ttft_table(rows)
    assert len(lines) == 4
    for line in lines:
        assert line[head.index("× stock")] == line[head.index("× same path")] == tables.NONE


def test_a_red_fast_path_has_no_time(
    load: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first_logits = gate.first_logits

    def wrong(model: Any, provider: Provider, inputs: Any) -> Any:
        logits, kept = first_logits(model, provider, inputs)
        return logits + (provider.path == "fast" and provider.method == "vtc_cls"), kept

    monkeypatch.setattr(gate, "first_logits", wrong)
    assert load("ttft").main([*MAIN, "--generates", "0", "--out", str(tmp_path)]) == 1
    found = {(row["method"], row["path"]) for row in read(tmp_path / "rows.jsonl")}
    assert found == {("stock", "eager"), ("stock", "fast"), ("vtc_cls", "eager")}
    said = capsys.readouterr()
    assert "vtc_cls@4 fast: NOT EQUAL to the eager path, so not timed" in said.err
    assert not [line for line in said.out.splitlines() if "vtc_cls" in line and "fast" in line]


def test_other_tokens_or_a_nan_are_red() -> None:
    assert gate.Parity(0.1, 0.2, 0.0, 0.1, True).green
    assert not gate.Parity(0.1, 0.2, 0.0, 0.1, False).green
    assert not gate.Parity(0.3, 0.2, 0.0, 0.1, True).green
    assert not gate.Parity(0.1, 0.2, 0.2, 0.1, True).green
    assert not gate.Parity(math.nan, 0.2, 0.0, 0.1, True).green


def test_what_fails_is_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ttft.measured

    def failing(model: Any, inputs: Any, provider: Provider, effort: Any) -> Any:
        if provider.method == "uniform":
            raise RuntimeError("no such luck\nand more")
        if provider.method == "random":
            raise torch.cuda.OutOfMemoryError("tried to allocate")
        return measured(model, inputs, provider, effort)

    monkeypatch.setattr(ttft, "measured", failing)
    methods = ("uniform", "random", "var", "vtc_cls")
    settings = Settings(
        "cpu", ["llava-1.5-7b"], ["main"], ["eager"], methods, (1,), 1, 0, tiny=True
    )
    store = Store(None, {"gpu": None, "cpu": "x"})
    assert not ttft.run(settings, store)
    found = {row["method"]: row for row in store.added}
    assert found["uniform"]["failed"] == "error"
    assert found["uniform"]["reason"] == "RuntimeError: no such luck"
    assert found["random"]["failed"] == "out of memory"
    assert found["random"]["where"].startswith("ttft.py")
    # a method that decides by itself how much it keeps
    assert found["var"]["failed"] == "refused"
    assert "ttft_ms" in found["vtc_cls"] and "ttft_ms" in found["stock"]
    head, *lines = tables.ttft_table(store.added)
    assert [len(line) for line in lines] == [len(head)] * 5


def test_no_provider_is_begun_when_time_is_over() -> None:
    settings = Settings("cpu", ["llava-1.5-7b"], ["main"], minutes=0.0, tiny=True)
    store = Store(None, {"gpu": None, "cpu": "x"})
    assert ttft.run(settings, store)
    assert store.added == []


def test_targets_come_first_and_nothing_twice() -> None:
    plan = planned(Settings("cuda"))
    assert [shape.name for shape, _ in plan] == [*SHAPES, "llava-1.5-7b"]
    seen = [
        (shape.name, case.batch, provider)
        for shape, cases in plan
        for case in cases
        for provider in case.providers
    ]
    assert len(seen) == len(set(seen))
    for shape, cases in plan[:4]:
        stock, same_graphs, *others = cases[0].providers
        assert (stock.method, stock.path) == ("stock", "eager")
        assert (same_graphs.method, same_graphs.path) == ("stock", "fast")
        assert {p.method for p in others} == {"vtc_cls", "todre", "flowcut"}
        assert {p.path for p in others} == {"eager", "fast"}
        kept = {p.keep / shape.visual for p in others if p.keep is not None}
        assert all(0.05 < share < 0.25 for share in kept)
    keeps = {p.keep for p in plan[1][1][0].providers} - {None}
    assert keeps == {160, 288, 640}
    every = plan[4][1][-1].providers
    assert {p.method for p in every} >= set(with_keep()) - {"stock"}
    # by the contract, a share of layers where nothing is dropped
    assert {p.keep for p in every if p.method == "shortv"} == {0.111, 0.333}
    # the others are measured beside stock wherever they are measured alone
    (_, (alone,)) = planned(Settings("cuda", parts=["methods"]))[0]
    assert alone.providers[0] == Provider()


def test_keeps_are_those_of_the_contract() -> None:
    for provider in provided(["vtc_cls", "shortv"], [64, 192], 576):
        kept = vtc.method(provider.method).check_keep(provider.keep)
        if provider.method == "vtc_cls":
            assert kept.count(576) in (64, 192)


def test_flash_attention_is_missing_without_cuda() -> None:
    assert flash_missing(torch.device("cpu")) == "it needs CUDA"


@pytest.mark.parametrize("name", SHAPES)
def test_random_towers_look_somewhere(name: str) -> None:
    shape = tiny(SHAPES[name])
    model = build(shape, "cpu", torch.float32)
    before = {n: p.clone() for n, p in model.named_parameters()}
    sharpen(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    blocks = shape.tower.blocks
    assert len(changed) == blocks and all(n.endswith("bias") for n in changed)
    again = build(shape, "cpu", torch.float32)
    sharpen(again)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_where_an_error_was() -> None:
    try:
        build(None, "cpu", torch.float32)  # type: ignore[arg-type]
    except AttributeError as error:
        assert measure.where(error).startswith("shapes.py, build, line ")
