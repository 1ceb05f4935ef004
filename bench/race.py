"""How the benches measure: contenders in alternating rounds, beside the roofs of the device.

A round runs every contender of a group once, in an order that moves on by one each round, and with them a large product
and a large copy: what a slow minute does to one it does to all, so a ratio is the median of the rounds' own ratios.
Times are CUDA events, or the clock of the CPU. On CUDA each run takes the next copy of its inputs, so many that they do
not fit into the L2 cache together.

A training step is timed as a whole and in two parts: forward with everything kept for backward, and backward. An
operation that has its gradient ready after forward (the linear losses) shows it there; `both` is what compares.
"""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import nvtx
import torch
from torch import Tensor

from bench.shapes import Case

PARTS = ("forward", "backward", "both")
MIN_ROUNDS, MAX_ROUNDS = 5, 30
SECONDS = {"cuda": 1.0, "cpu": 0.5, "tiny": 0.0}  # for the rounds of a group, as far as the fewest rounds allow
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024, "tiny": 128}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26, "tiny": 2**16}  # read, and as many written: past every cache
MAX_COPIES = 64  # of the inputs


class Absent(Exception):
    """A contender cannot run here; the message says why."""


@dataclass
class Problem:
    """One case of an operation on one device.

    Attributes:
        inputs: seed -> tensors; those that require a gradient are differentiated.
        contenders: name -> a function that makes it; made, it takes the inputs and returns a tensor, or a tuple whose
            first entry is differentiated. Making may raise `Absent` or ImportError.
        parameters: name -> tensors beside the inputs that get gradients.
        flops, bytes: that the definition needs, by part: what an ideal implementation would have to do and to move.
        trains: False for what has no backward.
        partial: contenders that do a part of the work only, to show its share; `flops` and `bytes` are not theirs.
    """

    inputs: Callable[[int], tuple]
    contenders: dict[str, Callable[[], Callable[..., Tensor]]]
    parameters: dict[str, list[Tensor]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    trains: bool = True
    partial: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """What a bench file measures.

    Attributes:
        name: of the operation.
        cases: size ("cuda", "cpu", "tiny") -> cases.
        problem: case and device -> what to run.
        contenders: the names that `problem` knows; `needs` says what some of them need: "cuda", or a package.
        growth: the contenders that run on the points of the growth curves.
    """

    name: str
    cases: Callable[[str], list[Case]]
    problem: Callable[[Case, torch.device], Problem]
    contenders: tuple[str, ...]
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[str, ...] = PARTS
    growth: tuple[str, ...] = ("eager", "ours-torch", "ours-triton")

    def missing(self, contender: str, device: torch.device) -> str:
        """Why a contender cannot run here; empty where it can."""
        for need in self.needs.get(contender, ()):
            if need == "cuda" and device.type != "cuda":
                return f"{contender}: it needs CUDA"
            if need != "cuda" and find_spec(need) is None:
                return f"{contender}: {need} is not installed"
        return ""

    def of_case(self, case: Case, device: torch.device) -> list[str]:
        """The contenders that a case is run with, the absent ones too."""
        if not case.over:
            return list(self.contenders)
        wanted = "ours-torch" if device.type == "cuda" else "ours-triton"  # one of ours is enough for a curve
        return [name for name in self.contenders if name in self.growth and name != wanted]


@dataclass
class Laps:
    """What one contender did: seconds of each round by part, peak bytes by part; or why it did nothing.

    `absent` is a reason to skip it, `failed` the traceback of an error.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    absent: str = ""
    failed: str = ""


@dataclass
class Result:
    """One group: all contenders on one case, and the roofs that were timed with them."""

    laps: dict[str, Laps]
    problem: Problem
    roof_flops: float  # operations a second of the large product
    roof_bytes: float  # bytes a second of the large copy, read and written


def leaves_of(inputs: Iterable, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that a step differentiates by."""
    return [x for x in [*inputs, *parameters] if isinstance(x, Tensor) and x.requires_grad]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Runner:
    """Runs one contender: forward, and backward where there is one."""

    def __init__(self, function: Callable[..., Tensor], parameters: list[Tensor], trains: bool, device: torch.device):
        self.function, self.parameters, self.trains, self.device = function, parameters, trains, device

    def forward(self, inputs: tuple) -> Tensor:
        with torch.set_grad_enabled(self.trains):
            out = self.function(*inputs)
        return out[0] if isinstance(out, tuple) else out

    def backward(self, out: Tensor, inputs: tuple) -> tuple:
        leaves = leaves_of(inputs, self.parameters)
        return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)

    def warm_up(self, inputs: tuple) -> None:
        """First run: compiles, and finds out whether there is a backward; without one only forward races."""
        out = self.forward(inputs)
        self.trains = self.trains and out.requires_grad
        if self.trains:
            self.backward(out, inputs)

    def step(self, inputs: tuple) -> dict[str, float]:
        """Seconds of one run by part."""
        _synchronise(self.device)
        clock = _Clock(self.device)
        clock.mark()
        out = self.forward(inputs)
        clock.mark()
        if self.trains:
            gradients = self.backward(out, inputs)
            clock.mark()
            del gradients
        del out
        spans = clock.spans()
        return {"forward": spans[0]} | ({"backward": spans[1], "both": sum(spans)} if self.trains else {})

    def peak_bytes(self, inputs: tuple) -> dict[str, int]:
        """Most bytes that a run held beyond what was there before, by part."""
        measure = _peak_cuda if self.device.type == "cuda" else _peak_cpu
        return measure(self, inputs)


class _Clock:
    """Marks on the device's own timeline."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Seconds between neighbouring marks."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.cuda:
            self.marks[-1].synchronize()
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]


def _peak_cuda(runner: Runner, inputs: tuple) -> dict[str, int]:
    """By the caching allocator: the most allocated during each part, over what was allocated before the run."""
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = runner.forward(inputs)
    torch.cuda.synchronize()
    peaks = {"forward": torch.cuda.max_memory_allocated() - base}
    if runner.trains:
        torch.cuda.reset_peak_memory_stats()
        gradients = runner.backward(out, inputs)
        torch.cuda.synchronize()
        peaks["backward"] = torch.cuda.max_memory_allocated() - base
        peaks["both"] = max(peaks.values())
        del gradients
    return peaks


def _peak_cpu(runner: Runner, inputs: tuple) -> dict[str, int]:
    """By torch's profiler: the running sum of the CPU allocator's events. Scratch inside the libraries is not seen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        with torch.profiler.record_function("bench.forward"):
            out = runner.forward(inputs)
        if runner.trains:
            gradients = runner.backward(out, inputs)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    (forward,) = (event for event in events if event.get("name") == "bench.forward" and "dur" in event)
    end = forward["ts"] + forward["dur"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held, peaks = 0, {"forward": 0, "backward": 0}
    for when, change in changes:
        held += change
        part = "forward" if when <= end else "backward"
        peaks[part] = max(peaks[part], held)
    del out
    if not runner.trains:
        return {"forward": peaks["forward"]}
    del gradients
    return peaks | {"both": max(peaks.values())}


def _copies(problem: Problem, device: torch.device) -> list[tuple]:
    """The inputs, and on CUDA as many copies of them as do not fit twice into the L2 cache."""
    inputs = [problem.inputs(0)]
    if device.type == "cuda":
        size = sum(x.nbytes for x in inputs[0] if isinstance(x, Tensor))
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        inputs += [problem.inputs(seed) for seed in range(1, min(MAX_COPIES, 1 + -(-2 * cache // max(size, 1))))]
    return inputs


def _roofs(dtype: torch.dtype, size: str, device: torch.device) -> tuple[Runner, Runner, float, float]:
    """A large product and a large copy as runners, with their operations and bytes."""
    n, count = PRODUCT_SIZE[size], COPY_BYTES[size] // dtype.itemsize
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(count, device=device, dtype=dtype)
    target = torch.empty_like(source)
    product = Runner(lambda: a @ b, [], False, device)
    copy = Runner(lambda: target.copy_(source), [], False, device)
    return product, copy, 2.0 * n**3, 2.0 * count * dtype.itemsize


def race(problem: Problem, names: list[str], dtype: torch.dtype, size: str, device: torch.device) -> Result:
    """Time the contenders `names` of a problem in alternating rounds."""
    laps, runners = {name: Laps() for name in names}, {}
    copies = _copies(problem, device)
    for name in names:
        try:
            runner = Runner(problem.contenders[name](), problem.parameters.get(name, []), problem.trains, device)
            runner.warm_up(copies[-1])
            laps[name].peak_bytes = runner.peak_bytes(copies[0])
            started = time.perf_counter()
            runner.step(copies[-1])
            runners[name] = (runner, time.perf_counter() - started)
        except (Absent, ImportError) as error:
            laps[name].absent = f"{name}: {error}"
        except torch.OutOfMemoryError:
            laps[name].absent = f"{name}: out of memory"
        except Exception:  # a peer that breaks fails its own tests, not those of the others
            laps[name].failed = traceback.format_exc()
        gc.collect()

    product, copy, product_flops, copy_bytes = _roofs(dtype, size, device)
    product.step(()), copy.step(())
    product_seconds, copy_seconds = [], []
    total = sum(lasted for _, lasted in runners.values())
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS[size] / max(total, 1e-9))))
    order, run = list(runners), 0
    gc.collect()
    gc.disable()  # or a collection falls into somebody's round
    try:
        for turn in range(rounds):
            product_seconds.append(product.step(())["forward"])
            copy_seconds.append(copy.step(())["forward"])
            first = turn % max(len(order), 1)
            for name in order[first:] + order[:first]:
                with nvtx.annotate(name, domain="bench"):
                    spans = runners[name][0].step(copies[run % len(copies)])
                run += 1
                for part, seconds in spans.items():
                    laps[name].seconds.setdefault(part, []).append(seconds)
    finally:
        gc.enable()
    return Result(
        laps,
        problem,
        product_flops / statistics.median(product_seconds),
        copy_bytes / statistics.median(copy_seconds),
    )
