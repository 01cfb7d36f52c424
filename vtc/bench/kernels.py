"""Kernels beside the plain torch operation, its compiled form and the official way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtc import dispatch, ops
from vtc.bench.ceilings import Ceilings, measured
from vtc.bench.kernel_cases import Case, Given, cases
from vtc.bench.kernel_checks import Check, check
from vtc.bench.progress import Progress
from vtc.bench.rows import Row, Store
from vtc.bench.timing import device_ms, graph_ms, named, wait
from vtc.errors import OptionError

PROVIDERS = ("triton", "torch", "compile", "official")


@dataclass(frozen=True)
class Settings:
    """Attributes:
    device: where it runs.
    tiny: small shapes, to try the code.
    ops: names; None: all.
    providers: of `PROVIDERS`.
    graphs: whether to time kernel and reference as CUDA graphs too.
    """

    device: torch.device
    tiny: bool = False
    ops: Sequence[str] | None = None
    providers: Sequence[str] = ("triton", "torch", "official")
    graphs: bool = True


@dataclass
class _Ready:
    """A case that was checked and is warm: its providers, and of those that are not, why."""

    case: Case
    given: Given
    calls: dict[str, Callable[[], Any]]
    missing: dict[str, str]
    parity: Check | None


def run(settings: Settings, store: Store) -> bool:
    """Check all cases, warm them, then time them; False if a kernel was not what it should be."""
    wanted = [c for c in cases(settings.tiny) if settings.ops is None or c.op in settings.ops]
    green, ready = True, list[_Ready]()
    with Progress("kernels", 2 * len(wanted)) as progress, torch.no_grad():
        ceilings = measured(settings.device, settings.tiny)
        progress.say(str(ceilings))
        for case in wanted:
            one = _prepared(case, settings)
            if one.parity is not None and not one.parity.green:
                green = False
                progress.step(
                    f"{case.op} {case.name}: NOT EQUAL, so not timed: error {one.parity.error:.3g} "
                    f"of {one.parity.limit:.3g} allowed"
                )
                continue
            ready.append(one)
            progress.step(f"{case.op} {case.name}: {_told(one)}")
        for one in ready:
            for row in _timed(one, settings, ceilings):
                store.add(row)
            progress.step(f"{one.case.op} {one.case.name}: timed")
        # last, for if a capture leaves the device unusable
        for one in ready if settings.graphs and settings.device.type == "cuda" else []:
            _as_graphs(one, settings, store)
    return green


def _told(one: _Ready) -> str:
    if one.parity is None:
        return f"no kernel here: {one.missing.get('triton', 'not asked for')}"
    return f"equal (error {one.parity.error:.3g} of {one.parity.limit:.3g} allowed)"


def _prepared(case: Case, settings: Settings) -> _Ready:
    """Inputs, the check, and every provider run twice."""
    given = case.make(settings.device)
    reference: Callable[..., Any] = getattr(ops, case.op).reference
    calls: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    parity = None
    if "triton" in settings.providers:
        try:
            calls["triton"] = kernel_call(case.op, given.args, settings.device)
            parity = check(case.op, given.args, calls["triton"](), given.official)
        except OptionError as error:
            calls.pop("triton", None)
            missing["triton"] = str(error)
    if parity is not None and not parity.green:
        return _Ready(case, given, {}, missing, parity)
    if "torch" in settings.providers:
        calls["torch"] = lambda: reference(*given.args)
    if "compile" in settings.providers:
        if case.loops:
            missing["compile"] = "a Python loop: compiled, it would be unrolled"
        else:
            compiled: Callable[..., Any] = torch.compile(reference)
            calls["compile"] = lambda: compiled(*given.args)
    if "official" in settings.providers:
        calls["official"] = given.official
    for call in calls.values():
        call()
        call()
    return _Ready(case, given, calls, missing, parity)


def kernel_call(op: str, args: tuple[Any, ...], device: torch.device) -> Callable[[], Any]:
    """A call of the kernel and nothing else.

    Raises:
        OptionError: there is none here, or none for these arguments.
    """
    dispatch.checked("triton", device)
    operation = getattr(ops, op)

    def call() -> Any:
        ran: dict[str, str] = {}
        with dispatch.using("triton", ran):
            out = operation(*args)
        if ran.get(op) != "triton":
            raise OptionError(f"{op} ran as {ran.get(op)}, expected its kernel")
        return out

    return call


def _timed(one: _Ready, settings: Settings, ceilings: Ceilings) -> list[Row]:
    floor = ceilings.floor_ms(one.given.work)
    found = []
    for provider in settings.providers:
        row: Row = {
            "bench": "kernels",
            "op": one.case.op,
            "case": one.case.name,
            "provider": provider,
            "dtype": str(one.given.args[0].dtype).removeprefix("torch."),
            "what": one.case.official if provider == "official" else None,
            "bytes": one.given.work.bytes,
            "flops": one.given.work.flops,
            "floor_ms": floor,
            **ceilings.to_dict(),
            "parity": one.parity.to_dict() if one.parity and provider == "triton" else None,
            # an interpreted kernel's times, like those of toy shapes, say nothing
            "meaningful": settings.device.type == "cuda" and not settings.tiny,
        }
        if (call := one.calls.get(provider)) is None:
            found.append(row | {"missing": one.missing.get(provider, "not measured")})
            continue
        times = device_ms(call, settings.device)
        row |= named("ms", times)
        row |= {"runs": len(times), "peak_bytes": peak_bytes(call, settings.device)}
        found.append(row | {"of_floor": floor / row["ms"]})
    return found


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that a call takes beyond its inputs, at its peak; None on the CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _as_graphs(one: _Ready, settings: Settings, store: Store) -> None:
    """Add what the kernel and the reference take without launches."""
    about = {"op": one.case.op, "case": one.case.name}
    for row in list(store.added):
        if {name: row[name] for name in about} != about or "ms" not in row:
            continue
        if row["provider"] in ("triton", "torch"):
            times = graph_ms(one.calls[row["provider"]], settings.device)
            if times is not None:
                store.add(row | named("graph_ms", times))
