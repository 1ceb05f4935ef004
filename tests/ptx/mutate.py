"""Takes each barrier out of each compiled kernel and says whether that is noticed: the test of the tests.

At every launch of a case the kernel runs whole first. Then it runs again from the same memory without one of its
`bar.sync`, for each that nothing has noticed yet: in lockstep, where races are found whatever the order, with the check
of lanes within a warp; and, the first time, warp by warp, forward and reverse, where other results in memory count too.
"""

import linecache
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.ptx import EmulationError
from tests.ptx.driver import ORDERS, Prepared, emulated

ATTEMPTS = ("lanes", "forward", "reverse")
MOST_TRIES = 4  # launches of one compiled kernel on which a barrier may go unnoticed, before it counts as unnoticed


class Barrier(NamedTuple):
    """One `bar.sync` of one compiled kernel. `noticed` says what its absence led to, "" if to nothing."""

    kernel: str
    arch: int
    variant: str
    number: int
    num_warps: int
    line: str  # of the kernel's source
    noticed: str = ""
    tries: int = 0

    def __str__(self) -> str:
        place = f"barrier {self.number} of {self.variant} at `{self.line}`"
        return f"{self.kernel} sm_{self.arch}, {self.num_warps} warps, {place}"


class Redundant(NamedTuple):
    """Barriers that are redundant: at a line of a kernel's source (its beginning), `most` an architecture, and why."""

    kernel: str
    line: str
    most: int
    why: str


def barrier_lines(ptx: str) -> list[str]:
    """For each `bar.sync` of a text, in order, the line of the kernel's own source that it was compiled from."""
    paths = {Path(path).name: path for path in re.findall(r'\.file\s+\d+\s+"([^"]+)"', ptx)}
    place, found = "", []
    for line in ptx.splitlines():
        if line.lstrip().startswith(".loc"):
            # A comment names the functions called, the kernel last; code that the compiler made up has line 0.
            place = next((x for x in re.findall(r"([\w.]+:\d+):\d+", line)[::-1] if not x.endswith(":0")), place)
        elif re.match(r"\s*(@\S+\s+)?(bar|barrier)(\.cta)?\.sync\b", line):
            name, _, number = place.partition(":")
            found.append(linecache.getline(paths.get(name, name), int(number or 0)).strip() or place)
    return found


class _Noticed(Exception):
    """The first finding is enough."""


def _notice(
    prepared: Prepared, number: int, attempts: tuple[str, ...], before: list[bytes], after: list[bytes], limit: int
) -> str:
    """What the absence of this barrier leads to, "" if to nothing. `before` and `after`: the memory of a whole run."""
    for attempt in attempts:
        prepared.restore(before)
        launch = prepared.launch(**ORDERS[attempt], skip_barriers=(number,), limit=limit)

        def stop(kind: str, *_: Any) -> None:
            raise _Noticed(kind)

        launch.report.add = stop
        try:
            launch.run()
        except _Noticed as noticed:
            return str(noticed)
        except EmulationError as error:
            return str(error).partition(":")[0]
        if prepared.memory() != after:
            return "results"
    return ""


def is_open(barrier: Barrier) -> bool:
    """Whether to try again without it."""
    return not barrier.noticed and barrier.tries < MOST_TRIES


class Mutation:
    """Called with each launch in place of running it; keeps what became of each barrier."""

    def __init__(self, arch: int) -> None:
        self.arch, self.barriers = arch, {}

    def __call__(self, prepared: Prepared) -> Any:
        compiled = prepared.compiled
        if compiled.variant in self.barriers and not any(map(is_open, self.barriers[compiled.variant])):
            return prepared.launch().run()
        before = prepared.memory()
        # With the check of lanes, or what is wrong with all barriers would count as the loss of each of them.
        report = prepared.launch(**ORDERS["lanes"]).run()
        for kind, text in report.findings:
            raise EmulationError(f"{kind}: {text}, although no barrier is missing")
        after = prepared.memory()
        if compiled.variant not in self.barriers:
            lines, name = barrier_lines(compiled.ptx), compiled.program.kernel.name
            assert len(lines) == len(compiled.program.barriers)
            self.barriers[compiled.variant] = [
                Barrier(name, self.arch, compiled.variant, number, prepared.num_warps, line)
                for number, line in enumerate(lines)
            ]
        barriers = self.barriers[compiled.variant]
        limit = 10_000 + 8 * prepared.num_warps * report.instructions
        for number, barrier in enumerate(barriers):
            if is_open(barrier):
                attempts = ATTEMPTS[:1] if barrier.tries else ATTEMPTS
                noticed = _notice(prepared, number, attempts, before, after, limit)
                barriers[number] = barrier._replace(noticed=noticed, tries=barrier.tries + 1)
        prepared.restore(after)
        return report


def mutate(arch: int, functions: Iterable[Callable[[], Any]]) -> list[Barrier]:
    """What became of every barrier of the kernels that these functions launch on CPU tensors."""
    mutation, deterministic = Mutation(arch), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for function in functions:
            torch.manual_seed(0)
            with emulated(arch, on_launch=mutation, **ORDERS["lockstep"]):
                function()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return [barrier for barriers in mutation.barriers.values() for barrier in barriers]


def reason(barrier: Barrier, reasons: list[Redundant]) -> Redundant | None:
    """Why this barrier is not needed, if the list says so."""
    return next((r for r in reasons if r.kernel == barrier.kernel and barrier.line.startswith(r.line)), None)


def unexplained(barriers: list[Barrier], reasons: list[Redundant]) -> list[Barrier]:
    """Those that nothing noticed and no reason covers, or more of them at a line than it covers."""
    missed = [barrier for barrier in barriers if not barrier.noticed]
    count = Counter((barrier.kernel, barrier.line, barrier.arch) for barrier in missed)
    entries = [(barrier, reason(barrier, reasons)) for barrier in missed]
    return [b for b, entry in entries if entry is None or count[b.kernel, b.line, b.arch] > entry.most]


def stale(barriers: list[Barrier], reasons: list[Redundant]) -> list[Redundant]:
    """Reasons given for barriers of which none goes unnoticed."""
    used = [reason(barrier, reasons) for barrier in barriers if not barrier.noticed]
    return [entry for entry in reasons if entry not in used]
