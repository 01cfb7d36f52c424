"""Calibrates the trained models of the testbed and says whether they have attention sinks.

    python benchmarks/calibrate_testbed.py --out benchmarks/results/calibration

Writes each model's calibration beside its weights, a picture of each and one table into the folder.
Beside activations, attention itself is looked at: how much of it falls on the first token and on
the visual token that gets most.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtc
from vtc.adapters.registry import adapter_of
from vtc.calibration import FILE
from vtc.calibration.figure import picture
from vtc.calibration.prompt import Prompt, read_prompt
from vtc.commands.samples import of_testbed
from vtc.evaluation.fingerprint import environment
from vtc.evaluation.loading import load
from vtc.runtime.probe import probed
from vtc.testbed.model import FAMILIES, model_folder

Row = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


@torch.no_grad()
def attention(model: Any, samples: Iterable[Any]) -> list[Row]:
    """By layer: shares of all attention, means over heads, queries and samples."""
    adapter = adapter_of(model)
    depth = len(adapter.language_model.layers)  # type: ignore[arg-type]
    seen: list[list[tuple[float, float, float]]] = [[] for _ in range(depth)]

    def see(layer: int, prompt: Prompt, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        keys = k[0].repeat_interleave(q.shape[1] // k.shape[1], 0)
        logits = q[0] @ keys.transpose(1, 2) * scale  # [H, S, S]
        hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
        share = logits.masked_fill(hidden, float("-inf")).softmax(-1).mean(1)  # [H, S]
        first, onto = share[:, prompt.first], share.mean(0)
        seen[layer].append(
            (float(first.mean()), float(first.max()), float(onto[prompt.visual].max()))
        )

    for sample in samples:
        prompt = read_prompt(adapter, sample)
        with ExitStack() as stack:
            for i, layer in enumerate(adapter.language_model.layers):  # type: ignore[arg-type]
                stack.enter_context(probed(layer.self_attn, partial(see, i, prompt)))
            prompt.log_probabilities()
    names = ("first_token_attention", "first_token_attention_of_top_head", "top_visual_attention")
    means = [[statistics.fmean(column) for column in zip(*layer, strict=True)] for layer in seen]
    return [dict(zip(names, layer, strict=True)) for layer in means]


def rows(family: str, found: vtc.Calibration, attended: Sequence[Row]) -> list[Row]:
    """A row of the table for each layer."""
    peaks = found.activations
    assert peaks and found.layer_contribution and found.contribution_error and found.head_ratio
    return [
        {
            "family": family,
            "layer": layer,
            "samples": found.samples,
            "contribution": found.layer_contribution[layer],
            "contribution_error": found.contribution_error[layer],
            "tau": peaks.tau,
            "first_token": peaks.first[layer],
            "first_token_dim": peaks.first_dim[layer],
            "text": peaks.text[layer],
            "text_dim": peaks.text_dim[layer],
            "visual": peaks.visual[layer],
            "visual_dim": peaks.visual_dim[layer],
            "text_tokens_above_tau": peaks.text_sinks[layer],
            "visual_tokens_above_tau": peaks.visual_sinks[layer],
            **{name: float(f"{value:.4g}") for name, value in attended[layer].items()},
            "least_head_ratio": min(found.head_ratio[layer]),
            "median_head_ratio": statistics.median(found.head_ratio[layer]),
            "largest_head_ratio": max(found.head_ratio[layer]),
        }
        for layer in range(len(found.layer_contribution))
    ]


def main() -> None:
    """Calibrate, write, print where."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    table: list[Row] = []
    summary: list[Row] = []
    for family in args.families:
        loaded = load(str(model_folder(family)), "cpu")
        samples = of_testbed(loaded.processor, args.samples)
        found = vtc.calibrate(loaded.model, samples)
        found = replace(found, model=family, source=samples.source)
        found.save(model_folder(family) / FILE)
        (args.out / f"{family}.png").write_bytes(picture(found))
        table += rows(family, found, attention(loaded.model, samples))
        scores = found.layer_contribution or ()
        assert found.activations is not None
        summary.append(
            {
                "family": family,
                "sink_dims": found.sink_dims,
                "layers_by_contribution": sorted(range(len(scores)), key=scores.__getitem__),
                "strongest": found.activations.strongest,
            }
        )
    date = datetime.date.today().isoformat()
    found_all = {"summary": summary, "rows": table, "date": date, "environment": environment()}
    (args.out / "table.json").write_text(json.dumps(found_all, indent=1) + "\n")
    with (args.out / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    print(f"{len(table)} rows in {args.out}")


if __name__ == "__main__":
    main()
