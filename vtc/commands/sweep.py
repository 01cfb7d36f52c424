"""`vtc sweep`: methods x keep through lmms-eval, as a table, a plot and a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex

from vtc.commands import models
from vtc.evaluation.evaluate import require_extra
from vtc.evaluation.sweep import SweepConfig
from vtc.evaluation.sweep import run as run_sweep


def run(args: argparse.Namespace) -> int:
    """Run or resume the sweep, print its table and where the report lies."""
    require_extra()
    models.quiet()
    names = {field.name for field in dataclasses.fields(SweepConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    model = models.name_of(given.pop("model", None))
    config = SweepConfig(model=model, command=shlex.join(["vtc", *args.argv]), **given)
    if config.device is not None:
        models.device_of(config.device)
    result = run_sweep(config)
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    result.show()
    print(f"\nreport  {result.report}")
    return 0
