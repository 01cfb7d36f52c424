"""`vtc sweep`: models x methods x keep through lmms-eval, as a table, plots and a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex

from vtc.commands import models
from vtc.evaluation import distributed
from vtc.evaluation.config import SweepConfig, read_config
from vtc.evaluation.evaluate import require_extra
from vtc.evaluation.sweep import run as run_sweep


def run(args: argparse.Namespace) -> int:
    """Run or resume the sweep, print its table and where table, report and samples lie."""
    require_extra()
    models.quiet()
    config = _config(args)
    for model in config.models:
        models.name_of(model)
    if config.device is not None:
        models.device_of(config.device)
    result = run_sweep(config)
    if not distributed.is_first():
        return 0
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    result.show()
    print()
    for name, place in result.places.items():
        print(f"{name:<8}{place}")
    return 0


def _config(args: argparse.Namespace) -> SweepConfig:
    """The settings of the file, if there is one, with those of the command line in their place."""
    names = {field.name for field in dataclasses.fields(SweepConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    base = read_config(args.config) if args.config else SweepConfig()
    return dataclasses.replace(base, command=shlex.join(["vtc", *args.argv]), **given)
