"""`vtc bench`: kernels, and time to the first token, on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from vtc.bench import kernels, tables, ttft
from vtc.bench.plan import Settings
from vtc.bench.rows import Row, Store
from vtc.bench.stamp import commit, machine, stamp
from vtc.commands import models
from vtc.commands.files import table
from vtc.errors import OptionError

_TINY = "toy shapes, to try the code: these times say nothing about speed"


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if something was not equal to what it stands in for, or went wrong."""
    models.quiet()
    device = str(models.device_of(args.device))
    if not device.startswith("cuda") and not args.tiny:
        raise OptionError(
            f"this machine has no GPU that torch can use (device {device!r}), expected one: a model"
            " of 7B on a CPU says nothing about one on a GPU; pass --tiny to try it on toy shapes"
        )
    store = Store(args.out, stamp(device, commit()))
    green, found = True, dict[str, list[Row]]()
    for what in args.what:
        before = len(store.added)
        green &= _kernels(args, device, store) if what == "kernels" else _ttft(args, device, store)
        found[what] = store.added[before:]
    if args.json:
        print(json.dumps(_described(args, device, green, store.added), indent=2))
        return int(not green)
    about = f"{machine(device)}, torch {torch.__version__}"
    print(f"{about}: {_TINY}" if args.tiny else about)
    for what, rows in found.items():
        made = tables.kernel_table(rows) if what == "kernels" else tables.ttft_table(rows)
        print(f"\n{table(made)}")
    if not green:
        print("\nnot everything was equal to what it stands in for, or ran: see above")
    return int(not green)


def _kernels(args: argparse.Namespace, device: str, store: Store) -> bool:
    providers = tuple(p for p in kernels.PROVIDERS if p != "compile" or args.compile)
    return kernels.run(
        kernels.Settings(torch.device(device), args.tiny, providers=providers), store
    )


def _ttft(args: argparse.Namespace, device: str, store: Store) -> bool:
    settings = Settings(
        device,
        models=args.models,
        parts=("main",),
        methods=args.methods,
        batches=(1,),
        runs=args.runs,
        generates=0,
        tiny=args.tiny,
    )
    return ttft.run(settings, store)


def _described(args: argparse.Namespace, device: str, green: bool, rows: list[Row]) -> Any:
    return {
        "machine": machine(device),
        "meaningful": not args.tiny,
        "green": green,
        "out": None if args.out is None else str(Path(args.out)),
        "rows": rows,
    }
