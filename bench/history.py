"""The results of `pytest bench/`: their files, their comparison with earlier ones, and the page docs/benchmarks.md.

A run is one JSON file, `<results>/<device>/<date>-<commit>.json`. A ratio is eager's time divided by the contender's,
the median over the rounds, so above 1 is faster than eager. A spread is an interquartile range.

Where ours is slower than eager, the page says in one line what is bought with it. These lines are in `slower.json`; a
row without one is marked, and the command that writes the page fails.

A run counts, on the page and for later comparisons, if its checkout was clean, if it was not restricted to some
contenders or cases, and if it was not found worse than earlier runs.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from soundwave.provenance import CHANGED, slug, versions

if TYPE_CHECKING:
    from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("forward", "backward", "both")
PACKAGES = (
    "soundwave",
    "torch",
    "triton",
    "transformers",
    "peft",
    "flash-attn",
    "liger-kernel",
    "cut-cross-entropy",
    "flag-gems",
)
OURS = "ours"  # The names of this library's contenders begin with it.
DRIFT = 0.1  # relative difference of a ratio between two runs of the same code, beyond the spread within each
AS_FAST = 0.95  # A row of ours with a smaller ratio needs its reason.
MORE_MEMORY = 1.05  # More than so many times the earlier peak is worse; an allocator's peak hardly varies.


class Entry(BaseModel):
    """One part of one case, run by one contender.

    Attributes:
        operation, case, shape, dtype, contender: what was run.
        over: the dimension letter of the growth curve to which the case belongs, or "".
        part: "forward", "backward", or "both": the whole training step.
        rounds: number of rounds.
        seconds, spread: median and interquartile range of the rounds' times.
        ratio, ratio_spread: the same of eager's time divided by this contender's in the same round; None without eager.
        peak_bytes: most memory held at a time beyond what was held before the run.
        flops, bytes: operations and bytes that the definition needs for the part; None where this is not stated.
        roof_flops, roof_bytes: operations and bytes per second of the large product and the large copy that were timed
            in the same rounds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    operation: str
    case: str
    shape: dict[str, int]
    over: str = ""
    dtype: str
    part: Literal["forward", "backward", "both"]
    contender: str
    rounds: int
    seconds: float
    spread: float
    ratio: float | None
    ratio_spread: float | None
    peak_bytes: int | None = None
    flops: float | None = None
    bytes: float | None = None
    roof_flops: float
    roof_bytes: float

    @classmethod
    def from_rounds(cls, seconds: Sequence[float], eager: Sequence[float] | None, **what: Any) -> "Entry":
        """An entry from the seconds of each round and eager's seconds in the same rounds; `what`: the other fields."""
        ratios = [theirs / own for theirs, own in zip(eager, seconds, strict=True)] if eager else []
        return cls(
            rounds=len(seconds),
            seconds=statistics.median(seconds),
            spread=spread(seconds),
            ratio=statistics.median(ratios) if ratios else None,
            ratio_spread=spread(ratios) if ratios else None,
            **what,
        )

    @property
    def share(self) -> float | None:
        """Share of the roof: the least time that the roofs allow for `flops` and `bytes`, divided by the time taken."""
        bounds = [
            amount / roof
            for amount, roof in ((self.flops, self.roof_flops), (self.bytes, self.roof_bytes))
            if amount is not None
        ]
        return max(bounds) / self.seconds if bounds else None

    @property
    def key(self) -> tuple:
        """Entries of two runs with the same key can be compared."""
        return (
            self.operation, self.case, tuple(sorted(self.shape.items())), self.dtype, self.part, self.contender,
        )  # fmt: skip


class Roof(BaseModel):
    """Speed of a large product and a large copy (bytes read and written): medians over the groups of a run, spreads."""

    model_config = ConfigDict(extra="forbid")

    tflops: float
    gb_per_second: float
    tflops_spread: float = 0.0
    gb_per_second_spread: float = 0.0

    @classmethod
    def of_groups(cls, measured: Sequence[tuple[float, float]]) -> "Roof":
        """From the operations and bytes per second of each group."""
        tflops, gigabytes = [flops / 1e12 for flops, _ in measured], [moved / 1e9 for _, moved in measured]
        return cls(
            tflops=statistics.median(tflops),
            gb_per_second=statistics.median(gigabytes),
            tflops_spread=spread(tflops),
            gb_per_second_spread=spread(gigabytes),
        )

    def __str__(self) -> str:
        copied = f"{self.gb_per_second:.3g} ± {self.gb_per_second_spread / 2:.2g} GB/s"
        return f"{self.tflops:.3g} ± {self.tflops_spread / 2:.2g} TFLOP/s, {copied}"


class Skipped(BaseModel):
    """A reason why a contender did not run, and the cases to which it applies."""

    model_config = ConfigDict(extra="forbid")

    operation: str
    reason: str
    cases: list[str]


class BenchRun(BaseModel):
    """One call of `pytest bench/`.

    Attributes:
        kind: type of the device.
        size: size of the shapes.
        roofs: dtype -> roof.
        whole: the run came to its end and was not restricted to some contenders or cases, by `-k` or a test's name. It
            may be restricted to some operations.
        worse: lines that `compare` found.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    device: str
    kind: Literal["cuda", "cpu"]
    size: Literal["cuda", "cpu", "tiny"]
    date: datetime
    commit: str
    versions: dict[str, str]
    threads: int
    roofs: dict[str, Roof]
    entries: list[Entry]
    skipped: list[Skipped]
    whole: bool = True
    worse: list[str] = []

    @property
    def counts(self) -> bool:
        """Whether later runs are compared with it and the page shows it."""
        return self.whole and not self.worse and not self.commit.endswith(CHANGED)

    @property
    def name(self) -> str:
        return f"{self.date:%Y-%m-%d-%H%M%S}-{self.commit}"

    def save(self, results: Path) -> Path:
        """Write the run below a folder of results. It is renamed at the end, so no reader sees an incomplete file."""
        path = results / slug(self.device) / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return aside.replace(path)


def spread(values: Sequence[float]) -> float:
    """Interquartile range; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def installed() -> dict[str, str]:
    """Versions of Python, CUDA and the packages that influence the figures; absent packages are left out."""
    import torch

    found = versions(PACKAGES)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def load(results: Path) -> list[BenchRun]:
    """All runs below a folder, oldest first. Files whose names begin with no date belong to other benches."""
    runs = [
        BenchRun.model_validate_json(path.read_text(encoding="utf-8"))
        for path in results.glob("*/[0-9][0-9][0-9][0-9]-*.json")
    ]
    return sorted(runs, key=lambda run: run.date)


def compare(now: BenchRun, earlier: Sequence[BenchRun]) -> tuple[list[str], int]:
    """Compare our contenders with earlier runs.

    Each entry is compared with the median over all earlier runs that count and have the same device, threads, torch,
    case, shape, dtype and part. A ratio is worse if it has fallen by more than DRIFT plus the spread. The spread is
    that of the earlier runs, or that of this run if it is larger, but then at most DRIFT: a contender that has become
    unsteady must not pass for that reason.

    Returns:
        A line for each ratio that is worse and each memory that is larger, and the number of compared figures.
    """
    before: dict[tuple, list[Entry]] = {}
    for run in earlier:
        if run.counts and _machine(run) == _machine(now):
            for entry in run.entries:
                before.setdefault(entry.key, []).append(entry)
    worse, compared = [], 0
    for entry in now.entries:
        old = before.get(entry.key)
        if not old or not entry.contender.startswith(OURS):
            continue
        name = f"{entry.operation} · {entry.case} · {entry.part} · {entry.contender}"
        runs = f"in {len(old)} earlier run{'s' if len(old) > 1 else ''}"
        if ratios := [one.ratio for one in old if one.ratio is not None]:
            compared += 1
            usual = statistics.median(ratios)
            before_it = statistics.median(one.ratio_spread for one in old if one.ratio is not None)
            allowed = DRIFT * usual + max(before_it, min(entry.ratio_spread or 0.0, DRIFT * usual))
            if entry.ratio is None:
                worse.append(f"{name}: it has no ratio to eager, but had {usual:.2f} x {runs}")
            elif entry.ratio < usual - allowed:
                worse.append(f"{name}: {entry.ratio:.2f} x eager, but {usual:.2f} x {runs}, {allowed:.2f} allowed")
        if peaks := [one.peak_bytes for one in old if one.peak_bytes is not None]:
            compared += 1
            usual = round(statistics.median(peaks))
            if entry.peak_bytes is None or entry.peak_bytes > MORE_MEMORY * usual:
                now_it = _size(entry.peak_bytes) or "unknown"
                worse.append(f"{name}: {now_it} of memory, but {_size(usual)} {runs}")
    return worse, compared


def _machine(run: BenchRun) -> tuple:
    """What must be the same in two runs whose figures are compared."""
    return run.device, run.size, run.threads, run.versions.get("torch")


# ---------------------------------------------------------------- tables


class Row(NamedTuple):
    """One contender on one case: the entries of its parts."""

    case: str
    contender: str
    parts: dict[str, Entry]

    @property
    def whole(self) -> Entry:
        """The entry that is compared: the training step, or forward if there is no backward."""
        return self.parts.get("both") or self.parts["forward"]


class Reason(BaseModel):
    """Why ours is slower than eager, and the cases to which it applies."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["cuda", "cpu"]
    operation: str
    cases: list[str]
    reason: str


@functools.cache
def reasons() -> list[Reason]:
    return [Reason(**each) for each in json.loads((ROOT / "bench" / "slower.json").read_text(encoding="utf-8"))]


def reason_of(run: BenchRun, entry: Entry) -> str | None:
    """Why this row is slower than eager; "" if it is not, and None if nobody has said why."""
    if not entry.contender.startswith(OURS) or entry.ratio is None or entry.ratio >= AS_FAST:
        return ""
    for each in reasons():
        if (each.kind, each.operation) == (run.kind, entry.operation) and entry.case in each.cases:
            return each.reason
    return None


HEADINGS = ("case", "contender", "forward", "backward", "both", "x eager", "memory", "TFLOP/s", "GB/s", "of the roof")


def _rows(entries: Sequence[Entry]) -> list[Row]:
    rows: dict[tuple, Row] = {}
    for entry in entries:
        row = rows.setdefault((entry.case, entry.contender), Row(entry.case, entry.contender, {}))
        row.parts[entry.part] = entry
    return list(rows.values())


def _milliseconds(entry: Entry | None) -> str:
    if entry is None:
        return ""
    value = entry.seconds * 1e3
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} ± {entry.spread * 5e2:.{digits}f}"


def _size(count: int | None) -> str:
    if count is None:
        return ""
    unit, scale = ("GB", 1e9) if count >= 1e9 else ("MB", 1e6) if count >= 1e6 else ("kB", 1e3)
    return f"{count / scale:.3g} {unit}"


def _ratio(entry: Entry) -> str:
    return "" if entry.ratio is None else f"{entry.ratio:.2f} ± {entry.ratio_spread / 2:.2f}"


def _cells(row: Row) -> tuple[str, ...]:
    whole = row.whole
    return (
        row.case,
        row.contender,
        *(_milliseconds(row.parts.get(part)) for part in PARTS),
        _ratio(whole),
        _size(whole.peak_bytes),
        "" if whole.flops is None else f"{whole.flops / whole.seconds / 1e12:.3g}",
        "" if whole.bytes is None else f"{whole.bytes / whole.seconds / 1e9:.3g}",
        "" if whole.share is None else f"{whole.share:.0%}",
    )


def _by_operation(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.operation, []).append(entry)
    return found


def tables(run: BenchRun) -> "Iterator[Table]":
    """A table for each operation, for the terminal, without the points of the growth curves."""
    from rich.table import Table

    for operation, entries in _by_operation([entry for entry in run.entries if not entry.over]).items():
        table = Table(*HEADINGS, title=f"{operation} · milliseconds, median ± half the spread", box=None)
        for column in table.columns[2:]:
            column.justify = "right"
        last = None
        for row in _rows(entries):
            table.add_row(*(("" if row.case == last else row.case), *_cells(row)[1:]))
            last = row.case
        yield table


# ---------------------------------------------------------------- page

UNEXPLAINED = "**no reason is known** (bench/slower.json)"
INTRODUCTION = """# Benchmarks

`python bench/history.py` writes this page from the files in `bench/results/`; each `pytest bench/` adds a file. The
contenders of a case run in alternating rounds on inputs of the same distribution, and their results are compared with
eager's. The columns:

- `forward`, `backward`, `both`: milliseconds, median ± half the interquartile range. `forward` keeps all that backward
  needs. Some operations compute their gradient in it already, so compare `both`.
- `x eager`: eager's time divided by the contender's, the median over the rounds. Above 1 is faster than eager.
  `x eager before` is the same in an earlier run, with its date and commit.
  Where ours is below 0.95, a line below the table says what is bought with it.
- `memory`: the most memory held at a time beyond what was held before the run. On CUDA it is read from the caching
  allocator, on a CPU from the events of torch's allocator in the profiler, which does not see the scratch memory of the
  libraries below torch.
- `TFLOP/s`, `GB/s`: the operations and bytes that the definition needs, divided by the time. Work that is left out thus
  shows as speed, even beyond the roof.
- `of the roof`: the least time that the roofs allow, divided by the time. The roofs are a large product and a large
  copy (bytes read and written), timed in the same rounds.

The shapes and the generators of the inputs are in [bench/shapes.py](../bench/shapes.py).
"""


def write_page(results: Path, out: Path) -> Path:
    """Write the tables and plots of all runs below `results` to the Markdown file `out`, and return `out`.

    The plots are put into a folder beside it with the same name without the suffix. For each operation on a device the
    page shows the newest figures, and next to them the ratios of the run before. Runs that do not count are shown only
    if their device has no others.

    Raises:
        FileNotFoundError: there are no results.
    """
    runs = [run for run in load(results) if run.size != "tiny"]
    complete = {run.device for run in runs if run.counts}
    runs = [run for run in runs if run.counts or run.device not in complete]
    if not runs:
        raise FileNotFoundError(f"{results} holds no results; write some with pytest bench/")
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    by_device: dict[str, list[BenchRun]] = {}
    for run in reversed(runs):
        by_device.setdefault(run.device, []).append(run)
    sections = [INTRODUCTION]
    if not any(run.kind == "cuda" for run in runs):
        sections.append("**Nothing here was measured on a GPU yet.**\n")
    for device, found in by_device.items():  # the newest run first
        sections += _device_section(device, found, folder, out.parent)
    out.write_text("\n".join(sections), encoding="utf-8")
    return out


def _device_section(device: str, runs: list[BenchRun], folder: Path, root: Path) -> Iterator[str]:
    yield f"## {device}\n"
    newest: dict[str, tuple[BenchRun, list[Entry]]] = {}
    for run in runs:
        for operation, entries in _by_operation(run.entries).items():
            newest.setdefault(operation, (run, entries))
    shown = [run for run in runs if any(run is source for source, _ in newest.values())]
    for run in shown:
        roofs = "; ".join(f"{dtype} {roof}" for dtype, roof in run.roofs.items())
        packages = ", ".join(f"{name} {number}" for name, number in run.versions.items())
        yield f"{_label(run)}: {packages}; {run.threads} threads. Roofs: {roofs}.\n"
    roofline = folder / f"{slug(device)}-roofline.png"
    if _plot_roofline(newest, roofline):
        yield f"![roofline]({roofline.relative_to(root)})\n"
    for operation, (run, entries) in newest.items():
        main = [entry for entry in entries if not entry.over]
        older = [other for other in runs if other.date < run.date]
        yield f"### {operation}\n"
        if main:
            yield from _table(run, main, older)
        curves = [entry for entry in entries if entry.over]
        if curves:
            path = folder / f"{slug(device)}-{operation.replace('_', '-')}-growth.png"
            _plot_growth(operation, curves, path)
            yield f"![growth of {operation}]({path.relative_to(root)})\n"
        for skipped in run.skipped:
            if skipped.operation == operation:
                yield f"- not run: {skipped.reason}"
        yield ""


def unexplained(page: str) -> list[str]:
    """The lines of a page about rows that are slower than eager for no known reason."""
    return [line for line in page.splitlines() if line.endswith(UNEXPLAINED)]


def _label(run: BenchRun) -> str:
    kind = "" if run.whole else ", a part of the suite"
    return f"{run.date:%Y-%m-%d %H:%M} UTC, commit {run.commit}{kind}"


def _table(run: BenchRun, entries: list[Entry], older: list[BenchRun]) -> Iterator[str]:
    """The newest figures of an operation in Markdown, with the ratio of the run before if there is one."""
    before: dict[tuple, tuple[BenchRun, Entry]] = {}
    for other in older:  # from the newest to the oldest; the first one that is found stays
        for entry in other.entries:
            before.setdefault(entry.key, (other, entry))
    rows = _rows(entries)
    compared = any(row.whole.key in before for row in rows)
    yield f"{_label(run)}; " + ", ".join(sorted({entry.dtype for entry in entries})) + ".\n"
    headings = [*HEADINGS[:6], *(["x eager before"] if compared else []), *HEADINGS[6:]]
    yield "| " + " | ".join(headings) + " |"
    yield "|---|---|" + "---:|" * (len(headings) - 2)
    last = None
    for row in rows:
        cells = list(_cells(row))
        if row.contender.startswith(OURS):
            cells[1] = f"**{cells[1]}**"
        shape = ", ".join(f"{letter} {value}" for letter, value in row.whole.shape.items())
        cells[0] = "" if row.case == last else f"{row.case}: {shape}"
        last = row.case
        if compared:
            other, old = before.get(row.whole.key, (None, None))
            cells.insert(6, "" if old is None else f"{_ratio(old)} ({other.date:%Y-%m-%d}, {other.commit})")
        yield "| " + " | ".join(cells) + " |"
    yield ""
    slower: dict[str | None, list[str]] = {}
    for row in rows:
        if (reason := reason_of(run, row.whole)) != "":
            slower.setdefault(reason, []).append(f"{row.case}, {row.contender}: {row.whole.ratio:.2f}")
    yield from (f"- {'; '.join(places)}: {reason or UNEXPLAINED}" for reason, places in slower.items())
    yield from [""] * bool(slower)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _colours(names: Sequence[str]) -> dict[str, str]:
    fixed = {"eager": "C7", "compiled": "C0", "ours-torch": "C1", "ours-triton": "C3", "ours": "C3"}
    others = iter(("C2", "C4", "C5", "C6", "C8", "C9"))
    return {name: fixed.get(name) or next(others, "C9") for name in names}


def _plot_growth(operation: str, entries: list[Entry], path: Path) -> None:
    """Plot time (above) and memory (below), with a column for each dimension letter."""
    plt = _pyplot()
    from matplotlib.ticker import LogFormatter

    letters = list(dict.fromkeys(entry.over for entry in entries))
    colours = _colours(list(dict.fromkeys(entry.contender for entry in entries)))
    figure, axes = plt.subplots(
        2, len(letters), figsize=(3.1 * len(letters) + 0.6, 5), layout="constrained", squeeze=False, sharex="col"
    )
    for column, letter in enumerate(letters):
        for name, colour in colours.items():
            points = sorted(
                (entry for entry in entries if entry.over == letter and entry.contender == name),
                key=lambda entry: entry.shape[letter],
            )
            sizes = [entry.shape[letter] for entry in points]
            half = [entry.spread * 5e2 for entry in points]
            times = [entry.seconds * 1e3 for entry in points]
            axes[0, column].errorbar(sizes, times, half, color=colour, marker="o", markersize=4, capsize=2, label=name)
            known = [(entry.shape[letter], entry.peak_bytes / 1e6) for entry in points if entry.peak_bytes]
            if known:
                axes[1, column].plot(*zip(*known, strict=True), color=colour, marker="o", markersize=4)
        for row in range(2):
            axes[row, column].set(xscale="log", yscale="log")
            axes[row, column].grid(True, which="major", alpha=0.3)
            for place in ("major", "minor"):  # 200 instead of 2 x 10^2; minor labels if there is room
                formatter = LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5))
                getattr(axes[row, column].yaxis, f"set_{place}_formatter")(formatter)
        ticks = sorted({entry.shape[letter] for entry in entries if entry.over == letter})
        axes[1, column].set_xticks(ticks, [str(tick) for tick in ticks])
        axes[1, column].tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        fixed = next(entry.shape for entry in entries if entry.over == letter)
        others = ", ".join(f"{name} {value}" for name, value in fixed.items() if name != letter)
        axes[0, column].set_title(others, fontsize=8)
        axes[1, column].set_xlabel(letter)
    axes[0, 0].set_ylabel("forward and backward [ms]")
    axes[1, 0].set_ylabel("memory added [MB]")
    axes[0, 0].legend(fontsize=8)
    kinds = dict.fromkeys(kind for entry in entries for kind in entry.case.split(", ")[1:])
    figure.suptitle(", ".join([operation, *kinds]))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_roofline(newest: dict[str, tuple[BenchRun, list[Entry]]], path: Path) -> bool:
    """Plot the speed reached and the roof over the operations per byte. False: no entry states both."""
    plt = _pyplot()
    points = [
        (run, entry)
        for run, entries in newest.values()
        for entry in entries
        if not entry.over and entry.part == "both" and entry.flops and entry.bytes
    ]
    if not points:
        return False
    figure, axis = plt.subplots(figsize=(8.2, 5), layout="constrained")
    intensities = [entry.flops / entry.bytes for _, entry in points]
    low, high = min(*intensities, 1.0) / 2, max(intensities) * 2
    for number, dtype in enumerate(sorted({entry.dtype for _, entry in points})):
        roof = next(run.roofs[dtype] for run, entry in points if entry.dtype == dtype)
        flops, moved = roof.tflops * 1e12, roof.gb_per_second * 1e9
        xs = sorted({low, flops / moved, max(high, 2 * flops / moved)})
        line = [min(flops, x * moved) / 1e12 for x in xs]
        axis.plot(xs, line, color="black", linestyle=("-", "--", ":")[number % 3], label=f"roof, {dtype}")
    operations = list(dict.fromkeys(entry.operation for _, entry in points))
    markers = dict(zip(operations, "osD^vPX*<>", strict=False))
    colours = _colours(list(dict.fromkeys(entry.contender for _, entry in points)))
    for _, entry in points:
        axis.scatter(
            entry.flops / entry.bytes, entry.flops / entry.seconds / 1e12, color=colours[entry.contender],
            marker=markers[entry.operation], s=34, alpha=0.85,
        )  # fmt: skip
    handles = [
        plt.Line2D([], [], color="black", marker=mark, fillstyle="none", linestyle="", label=name)
        for name, mark in markers.items()
    ]
    handles += [plt.Line2D([], [], color=colour, linewidth=6, label=name) for name, colour in colours.items()]
    axis.set(
        xscale="log", yscale="log", xlabel="operations per byte, counted by the definition",
        ylabel="TFLOP/s reached, operations counted by the definition",
    )  # fmt: skip
    axis.grid(True, which="major", alpha=0.3)
    first = axis.legend(loc="upper left", fontsize=8)
    axis.add_artist(first)
    axis.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def main() -> None:
    """`python bench/history.py [RESULTS] [--out FILE]`; fails if the page has a row that is slower without a reason."""
    parser = argparse.ArgumentParser(description="Turn all results of the benches into tables and plots.")
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "bench/results", help="folder of the results")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs/benchmarks.md",
        help="Markdown file; plots go beside it",
    )
    arguments = parser.parse_args()
    try:
        page = write_page(arguments.results, arguments.out)
    except FileNotFoundError as error:
        parser.error(str(error))
    print(f"page {page}")
    if lines := unexplained(page.read_text(encoding="utf-8")):
        parser.exit(1, "".join(f"slower than eager: {line.removeprefix('- ')}\n" for line in lines))


if __name__ == "__main__":
    main()
