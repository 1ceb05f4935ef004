"""The project's cases in several processes: run under every order, or with barriers taken out; and the two tables."""

import datetime
import platform
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy
import torch
import triton

from tests.ptx.cases import REDUNDANT, cases
from tests.ptx.driver import ORDERS
from tests.ptx.mutate import Barrier, mutate, reason
from tests.ptx.runs import Outcome, run


def in_processes(function: Callable[[Any], Any], tasks: list[Any], jobs: int) -> Iterator[Any]:
    """Results as they come. Cases hold functions, which cannot be sent to a process, so tasks give their numbers."""
    if jobs == 1:
        yield from map(function, tasks)
        return
    with get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(function, tasks)


def _sweep_numbered(arch: int, orders: tuple[str, ...], number: int) -> list[Outcome]:
    case = cases()[number]
    orders = [order for order in case.orders if not orders or order in orders]
    return list(run(str(case), case.run, arch, orders))


def sweep(numbers: list[int], arch: int, jobs: int, orders: Iterable[str] = ()) -> Iterator[Outcome]:
    """These of the cases, under their own orders or those of them that `orders` names."""
    for outcomes in in_processes(partial(_sweep_numbered, arch, tuple(orders)), numbers, jobs):
        yield from outcomes


def _mutate_numbered(task: tuple[int, list[int]]) -> list[Barrier]:
    arch, numbers = task
    return mutate(arch, [cases()[number].run for number in numbers])


def mutate_cases(numbers: list[int], archs: Iterable[int], jobs: int) -> list[Barrier]:
    """The same of these cases. One process takes all of an operation, whose cases launch the same compiled kernels."""
    groups = defaultdict(list)
    for number in numbers:
        groups[cases()[number].operation].append(number)
    tasks = [(arch, group) for group in groups.values() for arch in archs]
    found: dict[tuple, Barrier] = {}
    for barriers in in_processes(_mutate_numbered, tasks, jobs):
        for barrier in barriers:
            key = barrier.kernel, barrier.arch, barrier.variant, barrier.number
            if key not in found or not found[key].noticed:
                found[key] = barrier
    return sorted(found.values())


def summary(barriers: list[Barrier]) -> str:
    noticed = sum(bool(barrier.noticed) for barrier in barriers)
    share = 100 * noticed / max(len(barriers), 1)
    return f"{noticed} of {len(barriers)} barriers are noticed when they are missing ({share:.1f} %)"


def versions() -> str:
    today = datetime.date.today().isoformat()
    return (
        f"{today}, triton {triton.__version__}, torch {torch.__version__}, numpy {numpy.__version__}, "
        f"Python {platform.python_version()}"
    )


def _result_rows(outcomes: list[Outcome]) -> Iterator[str]:
    groups = defaultdict(list)
    for outcome in outcomes:
        for part in outcome.parts:
            groups[part.kernel, outcome.arch, outcome.name.rpartition(", ")[2]].append((outcome, part))
    for (kernel, arch, dtype), pairs in sorted(groups.items()):
        names = {outcome.name for outcome, _ in pairs}
        runs = {(outcome.name, outcome.order): outcome for outcome, _ in pairs}
        bad = sum(not outcome.good for outcome in runs.values())
        worst = max((j for outcome in runs.values() for j in outcome.judged), key=lambda j: j.share, default=None)
        errors = f"{worst.ours:.1e} | {worst.eager:.1e}" if worst else "as the test asks |"
        opcodes = frozenset().union(*(part.opcodes for _, part in pairs))
        warps = ", ".join(map(str, sorted({part.num_warps for _, part in pairs})))
        yield (
            f"| `{kernel}` | {arch} | {dtype} | {len(names)} | {len(runs)} | {len({p.variant for _, p in pairs})} "
            f"| {warps} | {bad} | {errors} | {len(opcodes)} | {sum(part.seconds for _, part in pairs):.1f} |"
        )


def result_table(outcomes: list[Outcome], seconds: float) -> str:
    orders = ", ".join(order for order in ORDERS if any(outcome.order == order for outcome in outcomes))
    bad = [outcome for outcome in outcomes if not outcome.good]
    instructions = sum(part.instructions for outcome in outcomes for part in outcome.parts)
    opcodes = frozenset().union(*(part.opcodes for outcome in outcomes for part in outcome.parts))
    lines = [
        "# Compiled kernels, emulated",
        "",
        f"Written by `make ptx` ({versions()}); [proof.md](proof.md) says what it proves and what it does not.",
        "",
        f"{len({(o.name, o.arch) for o in outcomes})} cases on sm_86 and sm_90, {len(outcomes)} runs under the orders "
        f"{orders}: {len(bad)} with a finding or a failure. {len({p.variant for o in outcomes for p in o.parts})} "
        f"compiled kernels, {len(opcodes)} opcodes, {instructions / 1e6:.1f} million instructions of warps, or of "
        f"blocks in lockstep, {seconds / 60:.0f} minutes.",
        "",
        "*Error* is that of the result that comes nearest to what it may have, over the norm of the truth, and "
        "*eager's* that of the same result in plain PyTorch; both may hold rounding of other kernels of the case. "
        "Where it says *as the test asks*, the results are equal bits or within a tolerance of the test's own. "
        "*Seconds* are the emulator's.",
        "",
        "| kernel | sm | dtype | cases | runs | compiled | warps | findings | error | eager's | opcodes | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *_result_rows(outcomes),
        "",
    ]
    if bad:
        lines += ["## Findings and failures", "", *(f"- {outcome}" for outcome in bad), ""]
    return "\n".join(lines)


def _barrier_rows(barriers: list[Barrier]) -> Iterator[str]:
    groups = defaultdict(list)
    for barrier in barriers:
        groups[barrier.kernel, barrier.arch].append(barrier)
    for (kernel, arch), group in sorted(groups.items()):
        how = Counter(barrier.noticed for barrier in group if barrier.noticed)
        ways = ", ".join(f"{count} {way}" for way, count in how.most_common())
        warps = ", ".join(map(str, sorted({barrier.num_warps for barrier in group})))
        compiled = len({barrier.variant for barrier in group})
        yield (
            f"| `{kernel}` | {arch} | {compiled} | {warps} | {len(group)} | {sum(how.values())} | {ways} "
            f"| {len(group) - sum(how.values())} |"
        )


def barrier_table(barriers: list[Barrier], seconds: float) -> str:
    lines = [
        "# Barriers taken out",
        "",
        f"Written by `make ptx` ({versions()}, {seconds / 60:.0f} minutes); [proof.md](proof.md) says how.",
        "",
        f"{summary(barriers)}. Each `bar.sync` of each compiled kernel of the cases was taken out alone. *By* says "
        "what told: a race between warps, lanes of one warp, other results under another order, a read of what nothing "
        "wrote.",
        "",
        "| kernel | sm | compiled | warps | barriers | noticed | by | not noticed |",
        "|---|---|---|---|---|---|---|---|",
        *_barrier_rows(barriers),
        "",
        "## Not noticed, and why: redundant, or not reached by any case",
        "",
    ]
    sites = defaultdict(list)
    for barrier in barriers:
        if not barrier.noticed:
            sites[barrier.kernel, barrier.line].append(barrier)
    for (kernel, line), group in sorted(sites.items()):
        entry = reason(group[0], REDUNDANT)
        archs = ", ".join(f"sm_{arch}" for arch in sorted({barrier.arch for barrier in group}))
        why = entry.why if entry else "**no reason is given**"
        lines.append(f"- `{kernel}`, {len(group)} of {archs}, at `{line}`: {why}")
    return "\n".join([*lines, ""])
