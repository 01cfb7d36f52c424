"""Trains the testbed's LLaVA on one GPU, in runs that resume from each other.

    python benchmarks/train_testbed.py --minutes 9.5 --out OUT1
    python benchmarks/train_testbed.py --minutes 5 --out OUT2 --resume OUT1 --rate 4e-4

A run ends after `--minutes` of wall-clock time, start-up and compilation included, and its rate
follows a cosine over the time it has: a slower machine trains fewer steps of the same schedule. So
every run ends with a finished model, and a later one goes on from it. `OUT/train.jsonl` is the log,
`OUT/model` the model in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vtc import ops
from vtc.testbed import pictures
from vtc.testbed.model import build_model, model_folder
from vtc.testbed.questions import ALL_KINDS
from vtc.testbed.tokens import QuestionTokens
from vtc.testbed.training import IMAGE_TOKENS, Batch, PackedTrainer, kind_hits, make_batch

KEEPS = (196, 98, 65, 43, 22, 11)
# files of a checkpoint stay under 16 MiB
FILE_BYTES = 15 * 2**20
# the loss on single patches fades out over this share of a run
PATCH_UNTIL = 0.4


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--minutes", type=float, default=9.5, help="wall-clock time of this run")
    parser.add_argument("--reserve", type=float, default=40.0, help="seconds for the last tables")
    parser.add_argument("--patch-loss", type=float, default=0.3, help="weight at the start")
    parser.add_argument("--batch", type=int, default=512, help="pictures per step")
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
    return parser.parse_args()


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
    """Per cent right of every kind, and over the one-word kinds."""
    table = {kind: 100 * right / max(asked, 1) for kind, (right, asked) in hits.items()}
    kinds = [kind for kind in table if kind != "caption"]
    table["all"] = sum(table[kind] for kind in kinds) / len(kinds)
    return {kind: round(value, 1) for kind, value in table.items()}


def cls_scores(trainer: PackedTrainer, images: Tensor) -> Tensor:
    """Attention of [CLS] to patches, over the last third of blocks up to the tap, [B, T]."""
    tower = trainer.model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    x = tower.pre_layrnorm(tower.embeddings((images.float() / 255 - trainer.mean) / trainer.std))
    blocks = tower.encoder.layers
    used = len(blocks) - 1
    first = used - max(1, used // 3)
    score = x.new_zeros(len(x), IMAGE_TOKENS)
    for i, block in enumerate(blocks[:used]):
        if i >= first:
            y, attention = block.layer_norm1(x), block.self_attn
            heads = attention.num_heads
            q = attention.q_proj(y[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
            k = attention.k_proj(y).unflatten(-1, (heads, -1)).transpose(1, 2)
            score = score + ops.attention_rows(q, k, attention.scale)[:, 0, 1:]
        x = block(x, None)
    return score


# compiled code would be compiled once more for it
@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def check(
    trainer: PackedTrainer, batches: list[Batch], how: str = "full", kept: int = 196
) -> dict[str, float]:
    """Accuracy by kind on `batches`, full, without a picture ("blank"), or keeping some tokens."""
    totals = {kind: [0, 0] for kind in ALL_KINDS}
    draw = torch.Generator(trainer.mask.device).manual_seed(kept)
    for batch in batches:
        images = torch.full_like(batch.images, 127) if how == "blank" else batch.images
        tap, _ = trainer.tower(images)
        keep = None
        if how in ("random", "cls"):
            shape = (len(images), IMAGE_TOKENS)
            score = (
                cls_scores(trainer, images)
                if how == "cls"
                else torch.rand(shape, generator=draw, device=images.device)
            )
            keep = torch.zeros(shape, dtype=torch.bool, device=images.device)
            keep.scatter_(1, score.topk(kept).indices, True)
        logits = trainer.logits(batch.ids, batch.at, tap[:, 1:], keep)
        hit = logits.argmax(-1) == batch.targets
        for kind, (right, asked) in kind_hits(hit | (batch.targets < 0), batch.targets).items():
            totals[kind][0] += right
            totals[kind][1] += asked
    return accuracy(totals)


def final_tables(trainer: PackedTrainer, batches: list[Batch], log: Log) -> None:
    """Accuracy against kept tokens for random and [CLS] selection."""
    log(table="full", **check(trainer, batches))
    log(table="blank", **check(trainer, batches, "blank"))
    for kept in KEEPS[1:]:
        for how in ("random", "cls"):
            log(table=how, kept=kept, **check(trainer, batches, how, kept))


def train(args: argparse.Namespace, log: Log, began: float) -> None:
    """One run: as many steps as the time allows, then a checkpoint, the model and its tables."""
    from transformers import AutoProcessor

    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    processor = AutoProcessor.from_pretrained(model_folder())
    tokens = QuestionTokens(processor.tokenizer, device)
    model = build_model(processor.tokenizer, small=args.small)
    trainer = PackedTrainer(model, tokens).to(device)
    optimizer = make_optimizer(trainer, args.rate)
    state = {"step": 0, "seconds": 0.0}
    if args.resume:
        state = load_checkpoint(args.resume, trainer, optimizer)
    batches = validation(processor.tokenizer, args.check_size, device)
    log(step=state["step"], ready=time.perf_counter() - began)
    run_steps(
        args,
        log,
        trainer,
        optimizer,
        state,
        tokens,
        batches,
        began + 60 * args.minutes - args.reserve,
    )
    save_checkpoint(args.out, trainer, optimizer, state)
    trainer.model.to(torch.bfloat16).save_pretrained(args.out / "model")
    # the tables are of the weights as stored
    trainer.model.float()
    final_tables(trainer, batches, log)
    log(done=time.perf_counter() - began)


def validation(tokenizer: Any, size: int, device: torch.device) -> list[Batch]:
    """From the CPU's generator, so it is the same on every machine."""
    held, tokens = torch.Generator().manual_seed(77), QuestionTokens(tokenizer)
    part = min(size, 512)
    batches = [
        make_batch(part, tokens, pictures.load("validation"), held) for _ in range(size // part)
    ]
    return [Batch(**{k: v.to(device) for k, v in vars(b).items()}) for b in batches]


def compile_blocks(trainer: PackedTrainer) -> None:
    """Compiles each block in place: equal ones share one graph, so it takes seconds."""
    tower = trainer.model.model.vision_tower
    blocks = [*getattr(tower, "vision_model", tower).encoder.layers]
    for block in [*blocks, *trainer.model.model.language_model.layers]:
        block.compile()


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
    fixed = make_batch(args.batch, tokens, shown, generator) if args.fixed else None
    patch_weight = torch.zeros((), device=device)
    first, before = state["step"], state["seconds"]
    start = since = time.perf_counter()
    while (now := time.perf_counter()) < deadline:
        progress = (now - start) / (deadline - start)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, state["step"] - first, args)
        patch_weight.fill_(args.patch_loss * max(0.0, 1 - progress / PATCH_UNTIL))
        batch = fixed or make_batch(args.batch, tokens, shown, generator)
        with low_precision(device):
            losses = trainer(batch, patch_weight)
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        if state["step"] % args.log_every == 0:
            values = {k: float(losses[k].detach()) for k in ("loss", "answer", "labels", "patch")}
            state["seconds"] = before + time.perf_counter() - start
            pace, since = (time.perf_counter() - since) / args.log_every, time.perf_counter()
            hits = {k: list(v) for k, v in kind_hits(losses["hit"], batch.targets).items()}
            log(**state, ms=1000 * pace, norm=float(norm), **values, train=accuracy(hits))
        if state["step"] % args.check_every == 0:
            with low_precision(device):
                log(step=state["step"], check="full", **check(trainer, batches))
    state["seconds"] = before + time.perf_counter() - start


def main() -> None:
    """Runs one time-boxed piece of the training."""
    began = time.perf_counter()
    args = arguments()
    log = Log(args.out / "train.jsonl")
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"
    log(
        device=name, torch=torch.__version__, batch=args.batch, rate=args.rate, minutes=args.minutes
    )
    train(args, log, began)


if __name__ == "__main__":
    main()
