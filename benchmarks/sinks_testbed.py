"""What removing, masking, filtering and redistributing sinks does to the testbed's models.

    python benchmarks/sinks_testbed.py --out benchmarks/results/sinks

By the published rule these models have no sinks (results/calibration/). So that the methods have
something to act on, the dimension that stands out most at visual tokens is taken for one, with tau
at quantiles of the activations there. As many random visual tokens are the control.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

# Python may have been told not to look beside a script
sys.path.append(str(Path(__file__).parent))

from evaluate_testbed import commit, prompts
from scipy.stats import bootstrap

import vtc
from vtc import ops
from vtc.adapters.registry import adapter_of
from vtc.calibration import calibration_of
from vtc.runtime.tower import facts_of
from vtc.scorers import ClsAttention, SinkFilter
from vtc.testbed import evidence_tokens, examples
from vtc.testbed.examples import Example
from vtc.testbed.families import FAMILIES
from vtc.testbed.model import model_folder
from vtc.testbed.scoring import one_word

BATCH = 50
KEEP = 0.11
# shares of visual tokens that count as sinks, over the layers behind the first
SHARES = (0.02, 0.1, 0.25)
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One way to run the model.

    Attributes:
        name: in the table.
        method: None: the stock model.
        share: of visual tokens that count as sinks.
    """

    name: str
    method: vtc.Method | None = None
    keep: float | None = None
    share: float | None = None
    seed: int = 0


@dataclass
class Found:
    """What one case did, question by question."""

    right: list[float] = field(default_factory=list)
    left: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)


def cases(dims: tuple[int, ...], taus: dict[float, float], seeds: int) -> Iterator[Case]:
    """All of them."""
    own = vtc.method("vtc_cls")
    yield Case("stock")
    yield Case("vtc_cls", own, KEEP)
    for share, tau in taus.items():
        rule: dict[str, Any] = {"dims": dims, "tau": tau}
        for mode in ("remove", "mask"):
            yield Case(mode, vtc.method("sink_removal", mode=mode, **rule), None, share)
            for seed in range(seeds):
                drawn = vtc.method("sink_removal", mode=mode, scorer="random", **rule)
                yield Case(f"{mode}, random", drawn, None, share, seed)
        yield Case("var", vtc.method("var", **rule), None, share)
        inner = ClsAttention(own.default_scorer().needs[0])  # type: ignore[union-attr]
        scorer = SinkFilter(inner, layer=6, **rule)
        yield Case("vtc_cls, filtered", vtc.method("vtc_cls", scorer=scorer), KEEP, share)


@torch.no_grad()
def ask(model: Any, processor: Any, asked: Sequence[Example], case: Case) -> Found:
    """The answers of one case."""
    found = Found()
    for at in range(0, len(asked), BATCH):
        part = asked[at : at + BATCH]
        inputs = processor(**prompts(processor, part, False), padding=True, return_tensors="pt")
        options = {"max_new_tokens": 8, "do_sample": False}
        if case.method is None:
            out, handle = model.generate(**inputs, **options), None
        else:
            with vtc.patch(model, case.method, case.keep, seed=case.seed) as handle:
                out = model.generate(**inputs, **options)
        said = processor.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, (example, text) in enumerate(zip(part, said, strict=True)):
            doc = {"answer": example.answer, "kind": example.kind}
            found.right.append(one_word(doc, [text])["accuracy"])
            if handle is not None:
                seen(found, example, handle, i)
    return found


def seen(found: Found, example: Example, handle: Any, image: int) -> None:
    """Which share of a picture's tokens text still reads, and of those that carry the answer; of
    masks, the mean over layers."""
    grid = handle._session.last.images.grids[image]
    count = grid[1] * grid[2]
    masks = [s.mask()[image][:count].float() for s in handle.token_selections[-1:]]
    for plan in handle.plans:
        rows = handle._session.last.images
        columns, row = rows.columns[image][:count], int(rows.rows[image])
        masks = [
            torch.ones(count) if rule.unread is None else (~rule.unread[row, columns]).float()
            for rule in plan.rules
        ]
    kept = torch.stack(masks).mean(0)
    found.left.append(float(kept.mean()))
    evidence = evidence_tokens(example.boxes[0], (grid[1], grid[2]), example.images[0].size)
    if bool(evidence.any()):
        found.recall.append(float(kept[evidence].mean()))


def activations(model: Any, processor: Any, asked: Sequence[Example], dim: int) -> torch.Tensor:
    """Of visual tokens in one dimension, at the input of all layers but the first."""
    token, values = adapter_of(model).image_token_id, []
    inputs = processor(**prompts(processor, asked, False), padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[1:-1]
    for state in states:
        values.append(ops.massive_activation(state, (dim,))[inputs["input_ids"] == token])
    return torch.cat(values)


def measure(family: str, questions: int, seeds: int) -> list[Row]:
    """The rows of one model."""
    folder = model_folder(family)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = model.eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    facts = facts_of(adapter_of(model))
    known = calibration_of(None, facts, "sink_dims").activations
    # the dimension in which visual tokens stand out most, behind the first layer
    strongest = max(range(1, len(known.visual)), key=lambda i: known.visual[i])
    dims = (known.visual_dim[strongest],)
    asked = examples(questions)
    values = activations(model, processor, asked[:BATCH], dims[0])
    taus = {share: round(float(values.quantile(1 - share)), 3) for share in SHARES}
    rows, by_case = [], dict[tuple[str, float | None], list[Found]]()
    every = list(cases(dims, taus, seeds))
    for case in tqdm(every, desc=family, unit="case"):
        by_case.setdefault((case.name, case.share), []).append(ask(model, processor, asked, case))
    base = {"stock": by_case["stock", None][0], "vtc_cls": by_case["vtc_cls", None][0]}
    for (name, share), found in by_case.items():
        right = torch.tensor([f.right for f in found]).mean(0)
        other = base["vtc_cls" if name.startswith("vtc_cls") else "stock"]
        gap = (right - torch.tensor(other.right)).numpy()
        low = high = 0.0
        if gap.any():
            drawn = bootstrap((gap,), lambda x, axis: x.mean(axis), rng=0).confidence_interval
            low, high = float(drawn.low), float(drawn.high)
        recall = [x for f in found for x in f.recall]
        rows.append(
            {
                "family": family,
                "case": name,
                "dim": dims[0],
                "sinks": share,
                "tau": None if share is None else taus[share],
                "seeds": len(found),
                "questions": questions,
                "accuracy": round(100 * float(right.mean()), 2),
                "change": round(100 * float(gap.mean()), 2),
                "change_low": round(100 * low, 2),
                "change_high": round(100 * high, 2),
                "read": round(_mean([x for f in found for x in f.left]), 4),
                "evidence_recall": round(_mean(recall), 4),
            }
        )
    return rows


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 1.0


def plot(rows: Sequence[Row], out: Path) -> None:
    """Change of accuracy against the share that counts as sinks, one panel for each model."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(4.6 * len(families), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    names = [n for n in dict.fromkeys(row["case"] for row in rows) if n not in ("stock", "vtc_cls")]
    colors = ("#D55E00", "#D55E00", "#0072B2", "#0072B2", "#009E73", "#CC79A7")
    for i, family in enumerate(families):
        axes = figure.add_subplot(1, len(families), i + 1)
        for k, (name, color) in enumerate(zip(names, colors, strict=True)):
            own = [row for row in rows if row["family"] == family and row["case"] == name]
            x = [100 * row["sinks"] * (1 + 0.05 * (k - 2.5)) for row in own]
            y = [row["change"] for row in own]
            below = [max(0.0, row["change"] - row["change_low"]) for row in own]
            above = [max(0.0, row["change_high"] - row["change"]) for row in own]
            style = "--" if "random" in name else "-"
            axes.errorbar(x, y, (below, above), color=color, ls=style, marker="o", capsize=2, ms=4)
            axes.lines[-1].set_label("")
            axes.plot([], [], color=color, ls=style, marker="o", ms=4, label=name)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.set_xticks([100 * share for share in SHARES], [f"{100 * s:g} %" for s in SHARES])
        axes.minorticks_off()
        axes.set_title(f"{family}, dimension {own[0]['dim']}", loc="left", fontsize=10)
        axes.set_xlabel("visual tokens taken for sinks")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("change of accuracy in points, 95 % intervals")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    for ending in ("png", "svg"):
        figure.savefig(out / f"sinks.{ending}", dpi=160)


def main() -> None:
    """Writes the table and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=[*FAMILIES], choices=FAMILIES)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2, help="of the random control")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [row for f in args.families for row in measure(f, args.questions, args.seeds)]
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
    }
    pd.DataFrame(rows).to_csv(args.out / "table.csv", index=False)
    found = json.dumps({"about": about, "rows": rows}, indent=1)
    (args.out / "table.json").write_text(found + "\n")
    plot(rows, args.out)


if __name__ == "__main__":
    main()
