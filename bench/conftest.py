"""`pytest bench/`: every operation and stage beside its eager reference and its peers.

A bench is `@pytest.mark.operation(OPERATION)` over a function that takes `race` and calls it. Each contender is a test,
so that pytest-benchmark's table has one row for it; the first test of a group times the whole group in alternating
rounds (`bench.race`), and every test hands its contender's rounds to pytest-benchmark. What that table has no columns
for is printed after it, and all of it is written to `RESULTS/<device>/<date>-<commit>.json`, anew after every group.

Keeps the checkout's root off `sys.path`: its folder `kernels/` would shadow the package of that name.
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
    group.addoption(
        "--size", choices=("cuda", "cpu", "tiny"), help="Size of the shapes; without it that of the device."
    )
    group.addoption("--batch", type=int, help="Utterances of every case that has some, in place of its own number.")
    group.addoption(
        "--compare",
        action="store_true",
        help="Fail where a ratio of ours to eager is worse than in the earlier runs on this device by more than its "
        "spread, or memory is more. A group that looks worse is timed once more.",
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
    """A clock that stands still but for the seconds that it is told to pass: how rounds reach pytest-benchmark."""

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
    """The points of the growth curves come last: a run that is cut short has the rest."""
    items.sort(key=lambda item: bool(item.callspec.params["case"].over) if hasattr(item, "callspec") else False)


def pytest_collection_finish(session):
    """What `-k` leaves of a group is what runs, and eager, to which the others are compared."""
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
    """A function that times this test's group, unless that is done, and reports this contender's part."""

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
    """What one call of pytest has measured."""

    def __init__(self, config, device, size: str):
        self.config, self.device, self.size = config, device, size
        self.started = datetime.now(timezone.utc).replace(microsecond=0)
        self.entries, self.skipped, self.roofs, self.selected = [], {}, {}, {}
        self.key, self.last, self.run, self.whole = None, None, None, True

    def skip(self, operation, case, reason: str) -> None:
        self.skipped[operation.name, reason] = [*self.skipped.get((operation.name, reason), []), case.name]

    def result(self, operation, case):
        """The group of a case; timed at its first call. One is kept: tests of a group follow each other."""
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
                del self.entries[recorded:]  # slower code shows again, a slow minute does not
                self.last = race.race(problem, names, case.dtype, self.size, self.device)
                self._record(operation, case, self.last)
                self.write()
        return self.last

    def compare(self, entries) -> tuple[list[str], int]:
        """As `history.compare` has it, of some entries of this run."""
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
        """The results so far, to the folder of this device and to $OUT."""
        import torch

        from bench import history
        from soundwave.provenance import commit, device_name

        if self.run is None:
            self.run = history.BenchRun(
                device=device_name(),
                kind=self.device.type,
                size=self.size,
                date=self.started,
                commit=commit() or "unknown",
                versions=history.installed(),
                threads=torch.get_num_threads(),
                roofs={},
                entries=[],
                skipped=[],
                whole=False,  # until the end
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
    terminalreporter.section("beside eager, and beside the roofs of this run")
    terminalreporter.ensure_newline()
    Console(file=sys.stdout, width=150).print(*history.tables(mine.run))
    terminalreporter.write_line(f"written to {mine.path}")
    if mine.compared is not None:
        terminalreporter.write_line(f"{mine.compared} figures compared with earlier runs on {mine.run.device}")
        if not mine.compared:
            terminalreporter.write_line(
                "there is none of a clean checkout with these threads and this torch", yellow=True
            )
        for line in mine.run.worse:
            terminalreporter.write_line(line, red=True)
