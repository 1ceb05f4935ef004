"""`pytest bench/`: every operation and stage beside its eager reference and its peers.

A bench is a function with the mark `@pytest.mark.operation(OPERATION)` that takes the fixture `race` and calls it. Each
contender is a test, so pytest-benchmark's table has one row for each. The first test of a group times the whole group
in alternating rounds (`bench.race`); every test then passes its contender's rounds on to pytest-benchmark. Further
tables hold what pytest-benchmark has no columns for. All results are written to
`RESULTS/<device>/<date>-<commit>.json`, again after every group.

The checkout's root is taken off `sys.path`, because its folder `kernels/` would shadow the package of that name.
"""

import gc
import os
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def pytest_addoption(parser):
    group = parser.getgroup("soundwave")
    group.addoption("--results", type=Path, default=ROOT / "bench" / "results", help="Folder for the results.")
    group.addoption("--size", choices=("cuda", "cpu", "tiny"), help="Size of the shapes. Default: that of the device.")
    group.addoption("--commit", default="", help="Commit of the checkout, where git does not know it.")
    group.addoption("--batch", type=int, help="Number of utterances in every case, instead of its own.")
    group.addoption(
        "--compare",
        action="store_true",
        help="Fail if ours is slower beside eager than in earlier runs on this device, by more than the spread, or "
        "needs more memory. A group that looks worse is timed once more.",
    )


def pytest_configure(config):
    import torch

    config.addinivalue_line("markers", "operation(operation): what a bench measures, a bench.race.Operation.")
    config.option.benchmark_columns = ["median", "iqr", "min", "max", "rounds"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[SESSION] = Session(config, device, config.getoption("size") or device.type)


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("operation")
    if marker is None:
        return
    (operation,) = marker.args
    session = metafunc.config.stash[SESSION]
    parameters = []
    batch = metafunc.config.getoption("batch")
    for case in operation.cases(session.size):
        if batch and case.B and case.over != "B":
            case = replace(case, B=batch)
        for part in operation.parts if not case.over else operation.parts[-1:]:
            for name in operation.of_case(case, session.device):
                missing = operation.missing(name, session.device)
                marks = [pytest.mark.skip(reason=missing)] if missing else []
                label = f"{case.name}-{part}-{name}".replace(" ", "_").replace(",", "")
                parameters.append(pytest.param(operation, case, part, name, id=label, marks=marks))
                if missing:
                    session.skip(operation, case, missing)
    metafunc.parametrize("operation, case, part, contender", parameters)


class Replay:
    """A clock that only `advance` moves. With it pytest-benchmark measures rounds that were timed before."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Replay()


def pytest_itemcollected(item):
    if item.get_closest_marker("operation"):
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def pytest_collection_modifyitems(items):
    """Put the points of the growth curves last, so that a run that is cut short has everything else."""
    items.sort(key=lambda item: bool(item.callspec.params["case"].over) if hasattr(item, "callspec") else False)


def pytest_collection_finish(session):
    """Note which contenders of each group were selected. Eager always runs, because the others are compared with it."""
    mine, selected = session.config.stash[SESSION], session.config.stash[SESSION].selected
    option = session.config.option
    restricted = (
        option.keyword,
        option.markexpr,
        option.deselect,
        option.batch,
        any("::" in x for x in option.file_or_dir),
    )
    mine.whole = not any(restricted)
    for item in session.items:
        if item.get_closest_marker("operation"):
            chosen = item.callspec.params
            selected.setdefault((chosen["operation"].name, chosen["case"].name), {"eager"}).add(chosen["contender"])


@pytest.fixture
def race(request, benchmark, operation, case, part, contender):
    """A function that times the group of this test, unless that is done, and passes on this contender's seconds."""

    def run() -> None:
        session = request.config.stash[SESSION]
        benchmark.group = f"{operation.name} · {case.name} · {part}"
        laps = session.result(operation, case).laps[contender]
        if laps.absent:
            pytest.skip(laps.absent)
        if laps.failed:
            pytest.fail(laps.failed, pytrace=False)
        if part not in laps.seconds:
            pytest.skip(f"{contender}: it has no backward")
        seconds = iter(laps.seconds[part])
        benchmark.pedantic(
            CLOCK.advance, setup=lambda: ((next(seconds),), {}), rounds=len(laps.seconds[part]), warmup_rounds=0
        )

    return run


class Session:
    """The measurements of one call of pytest."""

    def __init__(self, config, device, size: str):
        self.config, self.device, self.size = config, device, size
        self.started = datetime.now(timezone.utc).replace(microsecond=0)
        self.entries, self.skipped, self.roofs, self.selected = [], {}, {}, {}
        self.key, self.last, self.run, self.whole = None, None, None, True

    def skip(self, operation, case, reason: str) -> None:
        self.skipped[operation.name, reason] = [*self.skipped.get((operation.name, reason), []), case.name]

    def result(self, operation, case):
        """The results of a case's group, timed at the first call. Only the last group's are kept: its tests follow."""
        import torch

        from bench import race

        if self.key != (operation.name, case.name):
            self.last = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            names = [
                name
                for name in operation.of_case(case, self.device)
                if name in self.selected[operation.name, case.name] and not operation.missing(name, self.device)
            ]
            torch.manual_seed(0)
            problem = operation.problem(case, self.device)
            self.last = race.race(problem, names, case.dtype, self.size, self.device)
            self.key = (operation.name, case.name)
            recorded = len(self.entries)
            self._record(operation, case, self.last)
            self.write()
            if self.config.getoption("compare") and self.compare(self.entries[recorded:])[0]:
                self.roofs[str(case.dtype).removeprefix("torch.")].pop()
                del self.entries[recorded:]  # Slower code is slower again; a slow minute of the machine is over.
                self.last = race.race(problem, names, case.dtype, self.size, self.device)
                self._record(operation, case, self.last)
                self.write()
        return self.last

    def compare(self, entries) -> tuple[list[str], int]:
        """`history.compare` of some entries of this run with the earlier runs."""
        from bench import history

        earlier = [run for run in history.load(self.config.getoption("results")) if run.date < self.run.date]
        return history.compare(self.run.model_copy(update={"entries": entries}), earlier)

    def _record(self, operation, case, result) -> None:
        from bench.history import Entry

        dtype = str(case.dtype).removeprefix("torch.")
        self.roofs.setdefault(dtype, []).append((result.roof_flops, result.roof_bytes))
        for name, laps in result.laps.items():
            if laps.absent:
                self.skip(operation, case, laps.absent)
            for part, seconds in laps.seconds.items():
                if case.over and part != operation.parts[-1]:
                    continue
                work = result.problem if name not in result.problem.partial else None
                eager = result.laps["eager"].seconds.get(part) if "eager" in result.laps else None
                self.entries.append(
                    Entry.from_rounds(
                        seconds,
                        eager,
                        operation=operation.name,
                        case=case.name,
                        shape=case.shape(),
                        over=case.over,
                        dtype=dtype,
                        part=part,
                        contender=name,
                        peak_bytes=laps.peak_bytes.get(part),
                        flops=work and work.flops.get(part),
                        bytes=work and work.bytes.get(part),
                        roof_flops=result.roof_flops,
                        roof_bytes=result.roof_bytes,
                    )
                )

    def write(self) -> None:
        """Write the results so far into the folder of this device, and into $OUT."""
        import torch

        from bench import history
        from soundwave.provenance import commit, device_name

        if self.run is None:
            self.run = history.BenchRun(
                device=device_name(),
                kind=self.device.type,
                size=self.size,
                date=self.started,
                commit=commit() or self.config.getoption("--commit") or "unknown",
                versions=history.installed(),
                threads=torch.get_num_threads(),
                roofs={},
                entries=[],
                skipped=[],
                whole=False,  # set at the end
            )
        self.run.entries = self.entries
        self.run.skipped = [
            history.Skipped(operation=operation, reason=reason, cases=list(dict.fromkeys(cases)))
            for (operation, reason), cases in self.skipped.items()
        ]
        self.run.roofs = {dtype: history.Roof.of_groups(measured) for dtype, measured in self.roofs.items()}
        self.path = self.run.save(self.config.getoption("results"))
        if os.environ.get("OUT"):
            self.run.save(Path(os.environ["OUT"]))


SESSION = pytest.StashKey[Session]()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    mine = session.config.stash[SESSION]
    mine.compared = None
    if mine.run is None:
        return
    to_the_end = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not session.shouldstop
    mine.run.whole = mine.whole and to_the_end and not session.shouldfail
    if session.config.getoption("compare"):
        mine.run.worse, mine.compared = mine.compare(mine.run.entries)
        if mine.run.worse:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    mine.write()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    from rich.console import Console

    from bench import history

    mine = config.stash[SESSION]
    if mine.run is None:
        return
    terminalreporter.section("compared with eager and with the roofs of this run")
    terminalreporter.ensure_newline()
    Console(file=sys.stdout, width=150).print(*history.tables(mine.run))
    terminalreporter.write_line(f"written to {mine.path}")
    if mine.compared is not None:
        terminalreporter.write_line(f"{mine.compared} figures compared with earlier runs on {mine.run.device}")
        if not mine.compared:
            terminalreporter.write_line(
                "no earlier run is of a clean checkout with this number of threads and this torch", yellow=True
            )
        for line in mine.run.worse:
            terminalreporter.write_line(line, red=True)
