"""The command line: run one's own kernels, run the cases of this project, take barriers out."""

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.compiling import SHARED_KB
from tests.ptx import EmulationError
from tests.ptx.driver import ORDERS, Finding
from tests.ptx.mutate import mutate, stale, unexplained
from tests.ptx.runs import Outcome, run

ARCHITECTURES = (86, 90)

EXAMPLE = """\
Runs compiled Triton kernels on the CPU, without a GPU, and checks what they do: results under several orders of the
warps, races, accesses out of bounds or misaligned, reads of shared memory that nothing wrote. See docs/proof.md.

  python -m tests.ptx run my_kernels.py:example             a function of yours that launches kernels on CPU tensors
  python -m tests.ptx run my_kernels.py:example --arch 90 --order forward reverse
  python -m tests.ptx mutate my_kernels.py:example          is it noticed when a barrier of a kernel is missing?
  python -m tests.ptx sweep                                 the kernels of this project, by its own tests
  python -m tests.ptx mutate                                their barriers

Run it from the root of a checkout, in a process without TRITON_INTERPRET."""

FUNCTION = "FILE.py:FUNCTION or MODULE:FUNCTION, called without arguments"


def load(name: str) -> Callable[[], object]:
    """The function that `name` names, as in `FUNCTION`."""
    place, _, function = name.rpartition(":")
    if not place:
        raise SystemExit(f"{name!r} names no function, wanted {FUNCTION}")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise SystemExit(f"there is no file {place}")
        sys.path.insert(0, str(path.resolve().parent))  # so that it can import its neighbours
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    if not callable(getattr(module, function, None)):
        raise SystemExit(f"{place} has no function {function}")
    return getattr(module, function)


def _tell(outcome: Outcome, told: set[Finding]) -> None:
    """The run in one line, and below it what was not told before."""
    kinds = Counter(finding.kind for finding in outcome.findings)
    what = [outcome.error] * bool(outcome.error) + [f"{count} x {kind}" for kind, count in kinds.items()]
    print(f"sm_{outcome.arch} {outcome.order:8} {outcome.name}: {'; '.join(what) or 'ok'} ({outcome.seconds:.1f} s)")
    for finding in outcome.findings:
        if finding not in told:
            print(f"    {finding}")
    told.update(outcome.findings)


def _run(arguments: argparse.Namespace) -> int:
    bad = 0
    for name in arguments.functions:
        function, told = load(name), set()
        for arch in arguments.arch:
            for number, outcome in enumerate(run(name, function, arch, arguments.order or ORDERS)):
                _tell(outcome, told)
                bad += not outcome.good
                if number:
                    continue
                for part in outcome.parts:
                    print(
                        f"    {part.kernel}: {part.launches} launches with {part.num_warps} warps, "
                        f"{part.instructions} instructions"
                    )
                if not outcome.parts and outcome.good:
                    print("    launched no kernel")
                    bad += 1
    print(f"{bad} runs with a finding or a failure" if bad else "nothing found")
    return min(bad, 1)


def _chosen(arguments: argparse.Namespace, arch: int | None = None) -> list[int]:
    """Numbers of the cases; with --small of those that `make test` runs, on this architecture or on any."""
    from tests.ptx.cases import cases

    small = [case.small if arch is None else arch in case.small for case in cases()]
    named = [n for n, case in enumerate(cases()) if arguments.only in str(case)]
    return [n for n in named if small[n] or not arguments.small]


def _sweep(arguments: argparse.Namespace) -> int:
    from tests.ptx.sweep import result_table, sweep

    start, outcomes = time.perf_counter(), []
    for arch in arguments.arch:
        for outcome in sweep(_chosen(arguments, arch), arch, arguments.jobs, arguments.order):
            outcomes.append(outcome)
            print(outcome.as_json() if arguments.json else outcome, flush=True)
    bad, seconds = [outcome for outcome in outcomes if not outcome.good], time.perf_counter() - start
    if arguments.write:
        arguments.write.write_text(result_table(outcomes, seconds), encoding="utf-8")
    if not arguments.json:
        print(*bad, f"{len(outcomes)} runs, {len(bad)} with a finding or a failure, {seconds:.0f} s", sep="\n")
    return min(len(bad), 1)


def _mutate_functions(arguments: argparse.Namespace) -> int:
    functions = [load(name) for name in arguments.functions]
    try:
        barriers = [barrier for arch in arguments.arch for barrier in mutate(arch, functions)]
    except EmulationError as error:
        raise SystemExit(f"{error}\nNo barrier was taken out. `run` tells all that is found.") from error
    if not barriers:
        print("no barrier was found in the kernels that were launched, if any were")
    for barrier in barriers:
        print(f"{barrier}: {barrier.noticed or 'NOT NOTICED'}")
    return int(any(not barrier.noticed for barrier in barriers))


def _mutate(arguments: argparse.Namespace) -> int:
    if arguments.functions:
        return _mutate_functions(arguments)
    from tests.ptx.cases import REDUNDANT, cases
    from tests.ptx.sweep import barrier_table, mutate_cases, summary

    start, numbers = time.perf_counter(), _chosen(arguments)
    barriers = mutate_cases(numbers, arguments.arch, arguments.jobs)
    missed = unexplained(barriers, REDUNDANT)
    unused = stale(barriers, REDUNDANT) if len(numbers) == len(cases()) else []
    if arguments.write:
        arguments.write.write_text(barrier_table(barriers, time.perf_counter() - start), encoding="utf-8")
    print(json.dumps([barrier._asdict() for barrier in barriers]) if arguments.json else summary(barriers))
    for barrier in missed:
        print(f"not noticed, and no reason is given: {barrier}", file=sys.stderr)
    for entry in unused:
        print(f"a reason is given, but none goes unnoticed: {entry.kernel}, {entry.line}", file=sys.stderr)
    return int(bool(missed or unused))


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--arch", type=int, nargs="+", default=ARCHITECTURES, choices=SHARED_KB, metavar="SM",
        help="compute capabilities to compile for, of %(choices)s; kernels with products need 80 to 90",
    )  # fmt: skip
    order = argparse.ArgumentParser(add_help=False)
    order.add_argument(
        "--order", nargs="+", default=(), choices=ORDERS, metavar="ORDER",
        help="of %(choices)s: all warps together; one after the other; another after each basic block; with the check "
        "of lanes within a warp; with the largest errors of approximate instructions (default: all)",
    )  # fmt: skip
    ours = argparse.ArgumentParser(add_help=False)
    ours.add_argument("--only", default="", metavar="TEXT", help="only cases whose name holds this text")
    ours.add_argument("--small", action="store_true", help="only the cases that `make test` runs")
    ours.add_argument("--jobs", type=int, default=1, metavar="N", help="number of processes")
    ours.add_argument("--write", type=Path, metavar="FILE", help="write the table of results, in Markdown")
    ours.add_argument("--json", action="store_true", help="print lines of JSON")

    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx", description=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("run", parents=[common, order], help="run functions that launch kernels")
    command.add_argument("functions", nargs="+", metavar="FUNCTION", help=FUNCTION)
    command.set_defaults(run=_run)
    command = commands.add_parser("sweep", parents=[common, order, ours], help="run the cases of this project")
    command.set_defaults(run=_sweep)
    command = commands.add_parser("mutate", parents=[common, ours], help="take barriers out, one by one")
    command.add_argument("functions", nargs="*", metavar="FUNCTION", help=f"{FUNCTION} (default: the project's cases)")
    command.set_defaults(run=_mutate)
    return parser


def main(words: list[str] | None = None) -> int:
    arguments = _parser().parse_args(words)
    return arguments.run(arguments)
