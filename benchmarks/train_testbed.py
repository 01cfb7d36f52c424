"""Trains a model of the testbed on one GPU, in runs that resume from each other.

    python benchmarks/train_testbed.py --family llava --minutes 9.5 --out OUT1
    python benchmarks/train_testbed.py --minutes 5 --out OUT2 --resume OUT1 --rate 4e-4

A run ends after `--minutes` of wall-clock time, start-up and compilation included, and its rate
follows a cosine over the time it has: a slower machine trains fewer steps of the same schedule. So
every run ends with a finished model, and a later one goes on from it. `OUT/train.jsonl` is the log,
`OUT/model` the model in bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtc.testbed import pictures
from vtc.testbed.batches import IMAGE_TOKENS, Batch, Part, kind_hits, make_batch, make_resized
from vtc.testbed.changes import FRAMES
from vtc.testbed.families import FAMILIES, family
from vtc.testbed.model import model_folder
from vtc.testbed.packing import CLIP, PAIR, PICTURE, SLOTS, targets_of
from vtc.testbed.tokens import QuestionTokens
from vtc.testbed.towers import TRAINERS
from vtc.testbed.training import PackedTrainer, resized
from vtc.testbed.vocabulary import KINDS

KEEPS = (98, 65, 43, 22, 11)
# files of a checkpoint stay under 16 MiB
FILE_BYTES = 15 * 2**20
# the loss on single patches fades out over this share of a run
PATCH_UNTIL = 0.6
RESIZED_WEIGHT = 0.3
# pairs, clips and resized pictures of a step of 448 grids, by family
BESIDE = {"llava": (0, 0, 0), "qwen2_vl": (56, 24, 64), "internvl": (56, 24, 0)}
# resized pictures come every so many steps
RESIZED_EVERY = 3


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="a run's folder, with its checkpoint")
    parser.add_argument("--start", type=Path, help="a model's folder: weights without moments")
    parser.add_argument("--start-part", default="", help="only weights with this in their name")
    parser.add_argument("--minutes", type=float, default=9.5, help="wall-clock time of this run")
    parser.add_argument("--reserve", type=float, default=40.0, help="seconds for the last tables")
    parser.add_argument("--patch-loss", type=float, default=0.3, help="weight at the start")
    parser.add_argument("--give-up", type=float, help="stop if it is above this at step 200")
    parser.add_argument("--family", choices=FAMILIES, default="llava")
    parser.add_argument("--batch", type=int, default=512, help="grids per step: pictures, frames")
    parser.add_argument("--pairs", type=int, help="pairs of pictures per step")
    parser.add_argument("--clips", type=int, help="clips per step")
    parser.add_argument("--resized", type=int, help="single pictures of other sizes per step")
    parser.add_argument("--stories-from", type=float, default=0.4, help="share of the run")
    parser.add_argument("--resized-from", type=float, default=0.7, help="share of the run")
    parser.add_argument("--story-weight", type=float, default=0.3, help="of pairs, and of clips")
    parser.add_argument(
        "--focus",
        nargs=2,
        metavar=("KIND", "FACTOR"),
        help="a kind about single pictures that counts so many times as much",
    )
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--check-every", type=int, default=1500)
    parser.add_argument("--check-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--fixed", action="store_true", help="one batch over and over, to try it")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for name, usual in zip(("pairs", "clips", "resized"), BESIDE[args.family], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, math.ceil(usual * args.batch / 448))
    # a step sees the same number of grids with stories and without: the tower is compiled once
    beside = 2 * args.pairs + (2 if args.family == "qwen2_vl" else FRAMES) * args.clips
    args.sizes = {PICTURE: args.batch - beside, PAIR: args.pairs, CLIP: args.clips}
    args.sizes = {form: size for form, size in args.sizes.items() if size}
    args.other_sizes = getattr(family(args.family), "OTHER_SIZES", ()) if args.resized else ()
    args.resized = args.resized if args.other_sizes else 0
    return args


class Log:
    """JSON lines on disk and on the screen."""

    def __init__(self, path: Path) -> None:
        """Appends to `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def __call__(self, **row: Any) -> None:
        """Writes one row, numbers rounded."""
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        line = json.dumps(row)
        self._file.write(line + "\n")
        self._file.flush()
        print(line, flush=True)


def make_optimizer(trainer: PackedTrainer, rate: float) -> torch.optim.AdamW:
    """AdamW, weight decay on matrices only."""
    matrices = [p for p in trainer.parameters() if p.ndim >= 2]
    vectors = [p for p in trainer.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = next(trainer.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-8, fused=fused)


def save_checkpoint(
    folder: Path, trainer: PackedTrainer, optimizer: torch.optim.AdamW, state: dict[str, Any]
) -> None:
    """Weights in fp32 and second moments in bf16, in files of at most 15 MiB.

    First moments are left out: they are a mean over ten steps, and the rate ramps up again.
    """
    tensors = {}
    for name, p in trainer.named_parameters():
        tensors[f"w.{name}"] = p.detach().cpu()
        if "exp_avg_sq" in optimizer.state[p]:
            tensors[f"v.{name}"] = optimizer.state[p]["exp_avg_sq"].to(torch.bfloat16).cpu()
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        if size > FILE_BYTES:
            parts.append({})
            size = tensor.nbytes
        parts[-1][name] = tensor.contiguous()
    for i, part in enumerate(parts):
        save_file(part, folder / f"checkpoint-{i}.safetensors")
    (folder / "state.json").write_text(json.dumps({**state, "parts": len(parts)}))


def load_checkpoint(
    folder: Path, trainer: PackedTrainer, optimizer: torch.optim.AdamW
) -> dict[str, Any]:
    """Restores what `save_checkpoint` wrote and returns its state."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    tensors: dict[str, Tensor] = {}
    for i in range(state["parts"]):
        tensors |= load_file(folder / f"checkpoint-{i}.safetensors")
    with torch.no_grad():
        for name, p in trainer.named_parameters():
            p.copy_(tensors[f"w.{name}"])
            optimizer.state[p] = {
                "step": torch.tensor(float(state["step"]), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": tensors[f"v.{name}"].to(p.device, torch.float32),
            }
    return state


def rate_at(progress: float, steps_here: int, args: argparse.Namespace) -> float:
    """Cosine over the time of this run, with a warm-up in steps at its start."""
    ramp = min(1.0, (steps_here + 1) / args.warmup)
    return float(args.rate * ramp * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))))


def accuracy(hits: dict[str, list[int]]) -> dict[str, float]:
    """Per cent right of every kind, and over the one-word kinds about single pictures."""
    table = {kind: 100 * right / max(asked, 1) for kind, (right, asked) in hits.items()}
    kinds = [kind for kind in table if kind in KINDS]
    table["all"] = sum(table[kind] for kind in kinds) / len(kinds)
    return {kind: round(value, 1) for kind, value in table.items()}


# compiled code would be compiled once more for it
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def check(
    trainer: PackedTrainer, batches: list[Batch], how: str = "full", kept: int = IMAGE_TOKENS
) -> dict[str, float]:
    """Accuracy by kind on `batches`: full, without pictures ("blank"), or keeping some tokens."""
    totals: dict[str, list[int]] = {}
    draw = torch.Generator(trainer.mean.device).manual_seed(kept)
    for batch in batches:
        for form, part in batch.parts.items():
            if how in ("random", "cls") and form != PICTURE:
                continue
            if how == "blank":
                part = dataclasses.replace(part, images=torch.full_like(part.images, 127))
            features = trainer.see({form: part})[form].features
            keep = None
            if how in ("random", "cls"):
                score = torch.rand(features.shape[:2], generator=draw, device=draw.device)
                if how == "cls":
                    score = trainer.cls_scores(trainer.grids(part.images))
                keep = torch.zeros_like(score, dtype=torch.bool)
                keep.scatter_(1, score.topk(kept).indices, True)
            hit = trainer.logits(form, part, features, keep).argmax(-1) == part.targets
            add_hits(totals, kind_hits(form, hit | (part.targets < 0), part.targets))
    return accuracy(totals)


def add_hits(totals: dict[str, list[int]], found: dict[str, tuple[int, int]]) -> None:
    """Adds right answers and questions to `totals`."""
    for kind, counts in found.items():
        before = totals.get(kind, [0, 0])
        totals[kind] = [x + y for x, y in zip(before, counts, strict=True)]


def final_tables(trainer: PackedTrainer, batches: list[Batch], log: Log) -> None:
    """Accuracy against kept tokens for random and [CLS] selection."""
    log(table="full", **check(trainer, batches))
    log(table="blank", **check(trainer, batches, "blank"))
    hows = ["random", "cls"] if trainer.label_heads else ["random"]
    for kept in KEEPS:
        for how in hows:
            log(table=how, kept=kept, **check(trainer, batches, how, kept))


def train(args: argparse.Namespace, log: Log, began: float) -> None:
    """One run: as many steps as the time allows, then a checkpoint, the model and its tables."""
    from transformers import AutoProcessor

    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    module = family(args.family)
    processor = AutoProcessor.from_pretrained(model_folder(args.family))
    tokens = QuestionTokens(processor.tokenizer, device, module.BEFORE, module.AFTER)
    model = module.build_model(processor.tokenizer, small=args.small)
    if args.start:
        # the stock loading knows the names under which weights are stored
        found = type(model).from_pretrained(args.start, dtype=torch.float32).state_dict()
        found = {name: value for name, value in found.items() if args.start_part in name}
        model.load_state_dict(found, strict=not args.start_part)
    trainer = TRAINERS[args.family](model, processor, tokens, args.sizes)
    others = [trainer.add_form(PICTURE, processor, tokens, size) for size in args.other_sizes]
    if args.focus:
        focus(trainer, args.focus[0], float(args.focus[1]))
    trainer = trainer.to(device)
    optimizer = make_optimizer(trainer, args.rate)
    state = {"step": 0, "seconds": 0.0}
    if args.resume:
        state = load_checkpoint(args.resume, trainer, optimizer)
    batches = validation(args, tokens, device)
    log(step=state["step"], ready=time.perf_counter() - began, others=len(others))
    deadline = began + 60 * args.minutes - args.reserve
    run_steps(args, log, trainer, optimizer, state, tokens, batches, deadline)
    save_checkpoint(args.out, trainer, optimizer, state)
    trainer.model.to(torch.bfloat16).save_pretrained(args.out / "model")
    # the tables are of the weights as stored
    trainer.model.float()
    final_tables(trainer, batches, log)
    log(done=time.perf_counter() - began)


def focus(trainer: PackedTrainer, kind: str, factor: float) -> None:
    """Weigh the answers of one kind about single pictures by `factor`."""
    kinds = SLOTS[PICTURE]
    if kind not in kinds:
        raise SystemExit(f"--focus: got {kind!r}, expected one of {', '.join(kinds)}")
    start = sum(map(targets_of, kinds[: kinds.index(kind)]))
    trainer.packings[PICTURE].weight[start : start + targets_of(kind)] *= factor


def validation(
    args: argparse.Namespace, tokens: QuestionTokens, device: torch.device
) -> list[Batch]:
    """Questions about scenes of the validation split, in the shares of a training batch."""
    held = torch.Generator(device).manual_seed(77)
    part = min(args.check_size, 256)
    share = part / args.sizes[PICTURE]
    sizes = {form: math.ceil(size * share) for form, size in args.sizes.items()}
    shown = pictures.load("validation", str(device))
    return [make_batch(sizes, tokens, shown, held) for _ in range(args.check_size // part)]


def compile_blocks(trainer: PackedTrainer) -> None:
    """Compiles each block in place: equal ones share one graph per form, so it takes seconds."""
    for block in [*trainer.blocks(), *trainer.model.model.language_model.layers]:
        block.compile(dynamic=False)


def low_precision(device: torch.device) -> torch.autocast:
    """bf16 on a GPU; a CPU without matrix units for it would take minutes for a step."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def run_steps(
    args: argparse.Namespace,
    log: Log,
    trainer: PackedTrainer,
    optimizer: torch.optim.AdamW,
    state: dict[str, Any],
    tokens: QuestionTokens,
    batches: list[Batch],
    deadline: float,
) -> None:
    """The training loop, until `deadline`; updates `state`."""
    device = torch.device(args.device)
    if not args.eager:
        compile_blocks(trainer)
    shown = pictures.load("train", str(device))
    generator = torch.Generator(device).manual_seed(1_000_003 * (args.seed + 1) + state["step"])
    fixed = make_batch(args.sizes, tokens, shown, generator) if args.fixed else None
    alone = {PICTURE: args.batch}
    patch_weight = torch.zeros((), device=device)
    weights = {form: 1.0 if form == PICTURE else args.story_weight for form in args.sizes}
    first, before = state["step"], state["seconds"]
    start = since = time.perf_counter()
    while (now := time.perf_counter()) < deadline:
        progress = (now - start) / (deadline - start)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, state["step"] - first, args)
        patch_weight.fill_(args.patch_loss * max(0.0, 1 - progress / PATCH_UNTIL))
        sizes = args.sizes if progress >= args.stories_from else alone
        batch = fixed or make_batch(sizes, tokens, shown, generator)
        with low_precision(device):
            losses, hits = trainer(batch, patch_weight, weights)
        losses["loss"].backward()
        turn, skip = divmod(state["step"], RESIZED_EVERY)
        if args.resized and progress > args.resized_from and not skip:
            size = args.other_sizes[turn % len(args.other_sizes)]
            part = make_resized(args.resized, size, tokens, shown, generator)
            losses["resized"] = train_resized(trainer, resized(size), part, device)
        norm = torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        if state["step"] % args.log_every == 0:
            values = {name: float(value.detach()) for name, value in losses.items()}
            state["seconds"] = before + time.perf_counter() - start
            pace, since = (time.perf_counter() - since) / args.log_every, time.perf_counter()
            right: dict[str, list[int]] = {}
            for form, hit in hits.items():
                add_hits(right, kind_hits(form, hit, batch.parts[form].targets))
            if device.type == "cuda":
                values["gib"] = torch.cuda.max_memory_allocated() / 2**30
            log(**state, ms=1000 * pace, norm=float(norm), **values, train=accuracy(right))
        if args.give_up and state["step"] - first == 200 and losses["patch"] > args.give_up:
            raise SystemExit(f"the tower learns nothing: patch loss {float(losses['patch']):.2f}")
        if state["step"] % args.check_every == 0:
            with low_precision(device):
                log(step=state["step"], check="full", **check(trainer, batches))
            since = time.perf_counter()
    state["seconds"] = before + time.perf_counter() - start


# every size would be compiled anew
@torch.compiler.set_stance("force_eager")
def train_resized(
    trainer: PackedTrainer, form: str, part: Part, device: torch.device
) -> torch.Tensor:
    """Gradients of some questions about pictures of another size; returns their loss."""
    with low_precision(device):
        features = trainer.see({form: part})[form].features
        loss, _ = trainer.answer_loss(form, part, features)
    (RESIZED_WEIGHT * loss).backward()
    return loss


def main() -> None:
    """Runs one time-boxed piece of the training."""
    began = time.perf_counter()
    args = arguments()
    log = Log(args.out / "train.jsonl")
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    log(
        family=args.family,
        device=name,
        torch=torch.__version__,
        transformers=transformers.__version__,
        **args.sizes,
        resized=args.resized,
        rate=args.rate,
        minutes=args.minutes,
    )
    train(args, log, began)


if __name__ == "__main__":
    main()
