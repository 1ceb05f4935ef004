"""One function under the emulator, under one order of the warps after the other, and what came of each run."""

import json
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.accuracy import Judged, recorded
from tests.ptx import EmulationError
from tests.ptx.driver import ORDERS, Finding, Log, emulated


class Part(NamedTuple):
    """What one run used of one compiled kernel."""

    kernel: str
    variant: str
    num_warps: int
    launches: int
    instructions: int
    opcodes: frozenset[str]
    seconds: float


class Outcome(NamedTuple):
    """One run. `error` is empty if the function raised nothing."""

    name: str
    arch: int
    order: str
    error: str
    findings: list[Finding]
    parts: list[Part]
    judged: list[Judged]
    seconds: float

    @property
    def good(self) -> bool:
        return not self.error and not self.findings

    def as_json(self) -> str:
        kernels = sorted({part.kernel for part in self.parts})
        return json.dumps({"text": str(self), "good": self.good, "arch": self.arch, "kernels": kernels})

    def __str__(self) -> str:
        what = "ok" if self.good else "; ".join([self.error] * bool(self.error) + list(map(str, self.findings[:3])))
        return f"sm_{self.arch} {self.order:8} {self.name}: {what} ({self.seconds:.1f} s)"


def _parts(log: Log) -> list[Part]:
    found = {}
    for launched in log.launches:
        compiled, report = launched.compiled, launched.report
        before = found.get(compiled.variant)
        found[compiled.variant] = Part(
            launched.kernel,
            compiled.variant,
            launched.num_warps,
            1 + (before.launches if before else 0),
            report.instructions + (before.instructions if before else 0),
            frozenset(compiled.program.kernel.opcodes()),
            launched.seconds + (before.seconds if before else 0.0),
        )
    return list(found.values())


def _compare(expected: Log, found: Log, order: str) -> Iterator[Finding]:
    """The first launch that left other bits in memory than under another order."""
    pairs = list(zip(expected.launches, found.launches, strict=False))
    if len(pairs) < max(len(expected.launches), len(found.launches)) or any(a.kernel != b.kernel for a, b in pairs):
        yield Finding("the function", "order", f"launches other kernels under {order}")
        return
    different = [b.kernel for a, b in pairs if a.memory != b.memory]
    if different:
        yield Finding(different[0], "order", f"leaves other results under {order}")


def run(name: str, function: Callable[[], Any], arch: int, orders: Iterable[str]) -> Iterator[Outcome]:
    """Under each order, with the memory after each launch compared with that under the first one.

    `function` has to be deterministic: torch's generator is seeded before each run, and fresh memory is filled with
    NaN, so that what a kernel forgets to write is seen and is the same every time.
    """
    first = None
    for order in orders:
        start, error = time.perf_counter(), ""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.manual_seed(0)
        try:
            with recorded() as judged, emulated(arch, hashes=True, **ORDERS[order]) as log:
                function()
        except Exception as problem:  # an assertion, or whatever a wrong result may lead to
            frames = traceback.extract_tb(problem.__traceback__)
            place = next((x for x in frames[::-1] if "site-packages" not in x.filename), frames[-1])
            error = " ".join(str(problem).split())[:300]
            if not isinstance(problem, EmulationError):  # these name the line of the kernel
                error = f"{type(problem).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        finally:
            torch.use_deterministic_algorithms(before)
        if order != "noise":
            if first and not error:
                log.findings += _compare(first, log, order)
            first = first or (None if error else log)  # a run that was cut short has not launched everything
        findings = list(dict.fromkeys(log.findings))
        yield Outcome(name, arch, order, error, findings, _parts(log), judged, time.perf_counter() - start)
