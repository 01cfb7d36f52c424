"""Calibrates the trained models of the testbed and says whether they have attention sinks.

    python benchmarks/calibrate_testbed.py --out benchmarks/results/calibration

Writes each model's calibration beside its weights, a picture of each and one table into the folder.
Beside activations, attention itself is looked at: how much of it falls on the first token and on
the visual token that gets most, and whether visual tokens that stand out in one dimension get more.
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtc
from vtc.adapters.registry import adapter_of
from vtc.calibration import FILE
from vtc.calibration.activations import phi
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
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


class Attention:
    """Shares of the attention of one layer's heads, and what they go with, by sample.

    Args:
        dim: the dimension in which visual tokens stand out.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.found: list[Row] = []
        self.prompt: Prompt | None = None
        self._phi = torch.empty(0)

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the layer's input."""
        x = args[0] if args else kwargs["hidden_states"]
        self._phi = phi(x[0])[:, self.dim]

    def see(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        """Note what each key gets, in means over heads and queries."""
        assert self.prompt is not None
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
        logits = query[0] @ keys.transpose(1, 2) * scale  # [H, S, S]
        hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        visual, first = self.prompt.visual, weights[:, :, self.prompt.first].mean(1)
        # rows behind the image see all of it
        behind = weights[:, int(visual.nonzero().max()) + 1 :].mean((0, 1))[visual]
        large = self._phi[visual]
        self.found.append(
            {
                "first_token_attention": float(first.mean()),
                "first_token_attention_of_top_head": float(first.max()),
                "top_visual_attention": float(weights.mean((0, 1))[visual].max()),
                "median_visual": float(large.median()),
                "correlation_with_attention": float(
                    torch.corrcoef(torch.stack([large, behind]))[0, 1]
                ),
            }
        )

    def means(self) -> Row:
        """Over samples."""
        return {k: statistics.fmean(f[k] for f in self.found) for k in self.found[0]}


@torch.no_grad()
def attention(model: Any, samples: Iterable[Any], dims: Sequence[int]) -> list[Row]:
    """By layer, of the dimension in which its visual tokens stand out."""
    adapter = adapter_of(model)
    layers: Any = adapter.language_model.layers
    seen = [Attention(dim) for dim in dims]
    with ExitStack() as stack:
        for layer, own in zip(layers, seen, strict=True):
            hook = layer.register_forward_pre_hook(own.enter, with_kwargs=True)
            stack.callback(hook.remove)
            stack.enter_context(probed(layer.self_attn, own.see))
        for sample in samples:
            prompt = read_prompt(adapter, sample)
            for own in seen:
                own.prompt = prompt
            prompt.log_probabilities()
    return [own.means() for own in seen]


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
            "median_head_ratio": float(f"{statistics.median(found.head_ratio[layer]):.6g}"),
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
        scores = found.layer_contribution or ()
        assert found.activations is not None
        dims = found.activations.visual_dim
        table += rows(family, found, attention(loaded.model, samples, dims))
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
