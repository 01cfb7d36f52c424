"""`vtc doctor`: what is installed, what works, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pkgutil
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.machinery import PathFinder

from vtc import __version__
from vtc.commands import models
from vtc.commands.files import table
from vtc.errors import VtcError


@dataclass(frozen=True)
class Finding:
    """One line: `state` is `"ok"`, `"-"` (absent, and that is fine), `"note"` or `"broken"`."""

    what: str
    state: str
    found: str
    fix: str = ""


def run(args: argparse.Namespace) -> int:
    """Print the findings; the exit status is 1 if something needed is broken."""
    models.quiet()
    found = [Finding("vtc", "ok", __version__), Finding("python", "ok", platform.python_version())]
    found += [_required(name) for name in ("torch", "torchvision", "transformers")]
    found += [
        _optional("triton", "it comes with torch on Linux; torch operations are used instead"),
        _optional("lmms-eval", "for `vtc sweep`: pip install 'visual-token-compression[eval]'"),
        _gpu(),
        _kernels(),
        *_families(),
        *_testbed(),
        *_shadows(),
    ]
    if args.model is not None:
        found.append(_model(args.model))
    if args.json:
        print(json.dumps([asdict(f) for f in found], indent=2))
    else:
        print(
            table(
                [
                    ("what", "state", "found", "fix"),
                    *((f.what, f.state, f.found, f.fix) for f in found),
                ]
            )
        )
    return int(any(f.state == "broken" for f in found))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required(name: str) -> Finding:
    """A package that must import; a torchvision that does not match torch is there but fails."""
    version = _version(name)
    if version is None:
        return Finding(name, "broken", "not installed", f"pip install {name}")
    try:
        __import__(name)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        fix = "install torch and torchvision of one release"
        return Finding(name, "broken", f"{version} does not import: {reason}", fix)
    return Finding(name, "ok", version)


def _optional(name: str, fix: str) -> Finding:
    version = _version(name)
    return Finding(name, "ok", version) if version else Finding(name, "-", "not installed", fix)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "-", "none that torch can use", "everything runs on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("GPU", "ok", ", ".join(names))


def _kernels() -> Finding:
    import vtc.kernels

    names = [m.name for m in pkgutil.iter_modules(vtc.kernels.__path__) if m.name[0] != "_"]
    if importlib.util.find_spec("triton") is None:
        return Finding("kernels", "-", "torch operations", "install triton to run them on a GPU")
    return Finding("kernels", "ok", "triton, on CUDA: " + ", ".join(sorted(names)))


def _families() -> list[Finding]:
    from vtc.adapters.registry import supported_models

    return [Finding("can patch", "ok", name) for name in supported_models()]


def _testbed() -> list[Finding]:
    from vtc.testbed.model import FAMILIES, model_folder

    found = []
    for family in FAMILIES:
        folder = model_folder(family)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights or not (folder / "config.json").is_file():
            fix = "install a wheel that has it, or train it: benchmarks/train_testbed.py"
            text = f"{family}: not in this installation"
            found.append(Finding("testbed model", "broken", text, fix))
            continue
        size = sum(w.stat().st_size for w in weights) / 2**20
        found.append(Finding("testbed model", "ok", f"{family}, {size:.0f} MiB"))
    return found


def _shadows() -> list[Finding]:
    """Folders of the current directory that Python would import instead of another's package."""
    found = []
    for name in ("kernels", "adapters"):
        spec = PathFinder.find_spec(name, [os.getcwd()])
        if spec is not None and spec.origin is not None:
            text = f"`python -c` and `python -m` here import ./{name} as {name!r}"
            fix = "set PYTHONSAFEPATH=1, or work in another folder"
            found.append(Finding(f"import {name}", "note", text, fix))
    return found or [Finding("import kernels", "ok", "no folder here shadows it")]


def _model(name: str) -> Finding:
    from vtc.adapters.registry import adapter_of

    try:
        encoder = adapter_of(models.skeleton(name)).encoder()
    except VtcError as error:
        return Finding(name, "broken", "cannot be patched", str(error))
    cls = "with" if encoder.has_cls else "without"
    return Finding(name, "ok", f"can be patched: {encoder.depth} encoder blocks {cls} [CLS]")
