"""The timing of the benches: contenders run in alternating rounds, together with the roofs of the device.

A round runs every contender of a group once, and with them a large product and a large copy. The order moves on by one
in each round. A slow minute of the machine slows all contenders of a round, so ratios are taken round by round, and the
ratio of a group is their median. Before the rounds the result and the gradients of each contender are compared with
eager's; a contender that computes something else fails. Times come from CUDA events, or from the clock of the CPU. On
CUDA each run uses the next copy of its inputs; there are so many that they do not fit into the L2 cache together.

A training step is timed as a whole ("both") and in two parts: forward, which keeps everything for backward, and
backward. The linear losses compute their gradient in forward already, so "both" is what is compared.
"""

import gc
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from bench.history import OURS
from bench.shapes import Case

try:
    from nvtx import annotate
except ModuleNotFoundError:  # The ranges are for profilers only.
    annotate = None

PARTS = ("forward", "backward", "both")
MIN_ROUNDS, MAX_ROUNDS = 5, 30
SECONDS = {"cuda": 1.0, "cpu": 0.5, "tiny": 0.0}  # time for the rounds of a group; MIN_ROUNDS may exceed it
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024, "tiny": 128}
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26, "tiny": 2**16}  # bytes read, and as many written; larger than any cache
MAX_COPIES = 64  # most copies of the inputs
# How far a contender's result and gradients may lie from eager's, relative to their norm. Sums in another order and the
# rounding of half types make some difference. The limit only finds contenders that compute something else; the tests
# check how exact they are.
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class Absent(Exception):
    """A contender cannot run here; the message gives the reason."""


class Wrong(Exception):
    """A contender's result is wrong."""


@dataclass
class Problem:
    """One case of an operation on one device.

    Attributes:
        inputs: seed -> tensors. Those that require a gradient get one.
        contenders: name -> a function that makes the contender. The contender takes the inputs and returns a tensor, or
            a tuple whose first entry is differentiated. Making it may raise `Absent` or ImportError.
        parameters: contender -> tensors besides the inputs that get gradients.
        flops, bytes: part -> operations and bytes that the definition needs: the least that any implementation does.
        trains: False if there is no backward.
        partial: contenders that only do a part of the work, to show its share. `flops` and `bytes` are not theirs.
        different: contenders that are not compared with eager: they have other inputs, or only do work of the same size
            (two bare products).
        agreement: the allowed difference from eager instead of AGREEMENT, if the operation's definition allows more.
        same_gradients: False if eager's gradients follow another convention; then only results are compared.
        counts: weights of the result's entries. The result is multiplied by them before it is compared, and they are
            the gradient with which backward starts. 0 for padding, whose values may differ. None: all ones.
    """

    inputs: Callable[[int], tuple]
    contenders: dict[str, Callable[[], Callable[..., Tensor]]]
    parameters: dict[str, list[Tensor]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    trains: bool = True
    partial: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    agreement: float | None = None
    same_gradients: bool = True
    counts: Tensor | None = None


@dataclass(frozen=True)
class Operation:
    """An operation that a bench file measures.

    Attributes:
        name: name of the operation.
        cases: size ("cuda", "cpu", "tiny") -> cases.
        problem: case and device -> the problem.
        contenders: names of all contenders.
        needs: contender -> what it needs: "cuda", or names of packages.
        parts: the parts that are timed.
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
        """Why a contender cannot run here; "" if it can."""
        for need in self.needs.get(contender, ()):
            if need == "cuda" and device.type != "cuda":
                return f"{contender}: it needs CUDA"
            if need != "cuda" and find_spec(need) is None:
                return f"{contender}: {need} is not installed"
        return ""

    def of_case(self, case: Case, device: torch.device) -> list[str]:
        """The contenders of a case, also those that cannot run here."""
        if not case.over:
            return list(self.contenders)
        wanted = "ours-torch" if device.type == "cuda" else "ours-triton"  # A curve shows one of ours only.
        return [name for name in self.contenders if name in self.growth and name != wanted]


@dataclass
class Laps:
    """The measurements of one contender.

    Attributes:
        seconds: part -> seconds of each round.
        peak_bytes: part -> peak memory.
        absent: the reason why it was skipped, or "".
        failed: the message or traceback of its error, or "".
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    absent: str = ""
    failed: str = ""


@dataclass
class Result:
    """The measurements of a group: all contenders on one case, and the roofs that were timed with them."""

    laps: dict[str, Laps]
    problem: Problem
    roof_flops: float  # operations per second of the large product
    roof_bytes: float  # bytes per second of the large copy, read and written


def leaves_of(inputs: Iterable, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that get a gradient."""
    return [x for x in [*inputs, *parameters] if isinstance(x, Tensor) and x.requires_grad]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Runner:
    """Runs one contender: forward, and backward if it has one."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        parameters: list[Tensor],
        trains: bool,
        device: torch.device,
        counts: Tensor | None = None,
    ):
        self.function, self.parameters, self.trains, self.device = function, parameters, trains, device
        self.counts = counts

    def forward(self, inputs: tuple) -> Tensor:
        with torch.set_grad_enabled(self.trains):
            out = self.function(*inputs)
        return out[0] if isinstance(out, tuple) else out

    def backward(self, out: Tensor, inputs: tuple) -> tuple:
        leaves = leaves_of(inputs, self.parameters)
        upstream = torch.ones_like(out) if self.counts is None else self.counts.to(out.dtype).expand_as(out)
        return torch.autograd.grad(out, leaves, upstream, allow_unused=True)

    def warm_up(self, inputs: tuple) -> "Outcome":
        """The first run. It compiles, and finds out whether there is a backward; without one only forward is timed."""
        out = self.forward(inputs)
        self.trains = self.trains and out.requires_grad
        gradients = self.backward(out, inputs) if self.trains else ()
        out = out.detach() if self.counts is None else out.detach() * self.counts
        return Outcome(out.cpu(), [None if x is None else x.cpu() for x in gradients])

    def step(self, inputs: tuple) -> dict[str, float]:
        """Run once; return part -> seconds."""
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
        """Run once; return part -> most bytes held at a time beyond what was held before."""
        measure = _peak_cuda if self.device.type == "cuda" else _peak_cpu
        return measure(self, inputs)


class Outcome(NamedTuple):
    """The result of a run and the gradients of its leaves, on the CPU. Without a backward there are no gradients."""

    out: Tensor
    gradients: list[Tensor | None]

    def differs(self, name: str, expected: "Outcome", limit: float) -> str:
        """How this outcome differs from the expected one, which `name` computed; "" if it does not.

        The difference may be `limit` times the norm. Results of integers are not compared.
        """
        if self.out.shape != expected.out.shape:
            return f"the result has shape {list(self.out.shape)}, but {name}'s {list(expected.out.shape)}"
        pairs = {"the result": [(self.out, expected.out)] if self.out.is_floating_point() else []}
        if self.gradients and expected.gradients:
            both = list(zip(self.gradients, expected.gradients, strict=True))
            if missing := [i for i, (ours, theirs) in enumerate(both) if ours is None and theirs is not None]:
                return f"it has no gradient for {len(missing)} of {len(both)} tensors, and {name} has"
            pairs["the gradient"] = [pair for pair in both if pair[1] is not None]
        for what, parts in pairs.items():
            error = sum(float((a.double() - b.double()).square().sum()) for a, b in parts) ** 0.5
            norm = sum(float(b.double().square().sum()) for _, b in parts) ** 0.5
            if not error <= limit * norm:
                share = error / norm if norm else math.inf
                return f"{what} lies {share:.2g} of its norm from {name}'s ({limit:g} allowed)"
        return ""


class _Clock:
    """Marks points in time: CUDA events, or the clock of the CPU."""

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
    """Peak of each part in the caching allocator, minus what was allocated before the run."""
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
    """Peak of the running sum of the CPU allocator's events in torch's profiler; it does not see libraries' scratch."""
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
    """The inputs; on CUDA so many further draws that they are twice as large as the L2 cache."""
    inputs = [problem.inputs(0)]
    if device.type == "cuda":
        size = sum(x.nbytes for x in inputs[0] if isinstance(x, Tensor))
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        inputs += [problem.inputs(seed) for seed in range(1, min(MAX_COPIES, 1 + -(-2 * cache // max(size, 1))))]
    return inputs


def _roofs(dtype: torch.dtype, size: str, device: torch.device) -> tuple[Runner, Runner, float, float]:
    """Runners of a large product and a large copy, and their operations and bytes."""
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
    expected = None  # the outcome of eager, which runs first; if it does not fit into memory, that of the next one
    limit = problem.agreement or AGREEMENT[dtype]
    for name in sorted(names, key=lambda name: name != "eager"):
        ours = name.startswith(OURS)
        try:
            function, parameters = problem.contenders[name](), problem.parameters.get(name, [])
            runner = Runner(function, parameters, problem.trains, device, problem.counts)
            found = runner.warm_up(copies[-1])
            if ours and problem.trains and not runner.trains:
                raise Wrong("it has no backward")
            if not problem.same_gradients:
                found = found._replace(gradients=[])
            comparable = name not in problem.partial + problem.different
            if comparable and expected and (difference := found.differs(*expected, limit)):
                raise Wrong(difference)
            if comparable and not expected:
                expected = name, found
            laps[name].peak_bytes = runner.peak_bytes(copies[0])
            started = time.perf_counter()
            runner.step(copies[-1])
            runners[name] = (runner, time.perf_counter() - started)
        except Absent as error:
            laps[name].absent = f"{name}: {error}"
        except Wrong as error:
            laps[name].failed = f"{name}: {error}"
        except Exception as error:  # A contender that breaks fails its own tests only.
            if isinstance(error, ImportError | torch.OutOfMemoryError) and not ours:
                reason = error if isinstance(error, ImportError) else "out of memory"
                laps[name].absent = f"{name}: {reason}"
            else:
                laps[name].failed = traceback.format_exc()
        gc.collect()
    expected = None

    product, copy, product_flops, copy_bytes = _roofs(dtype, size, device)
    product.step(())
    copy.step(())
    product_seconds, copy_seconds = [], []
    total = sum(lasted for _, lasted in runners.values())
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS[size] / max(total, 1e-9))))
    order, run = list(runners), 0
    gc.collect()
    gc.disable()  # A collection would slow the round of one contender.
    try:
        for turn in range(rounds):
            product_seconds.append(product.step(())["forward"])
            copy_seconds.append(copy.step(())["forward"])
            first = turn % max(len(order), 1)
            for name in order[first:] + order[:first]:
                with annotate(name, domain="bench") if annotate else nullcontext():
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
