"""What only a GPU can tell of each operation, in about a minute: a first look, before the benches measure it well.

    bench/gpu.sh facts                                      runs it with the checkout's packages on the path
    python bench/gpu_facts.py OUT.json [--seconds 95]       the same by hand, on a GPU
    python bench/gpu_facts.py OUT.json --tiny               a rehearsal on the CPU at tiny sizes

For each operation, and for a step of stages I and II with two layers of each backbone:

- the seconds of a few training steps, of eager and of ours one after the other, and their peak memory
- where the host waits for the device in one step: file:line -> number of waits
- which functions launch kernels in one step, and how long these run: file:line function -> kernels, seconds; `line` is
  the first line of the function. What autograd launches by itself belongs to the function that has called backward.
- which kernels run longest

And for both stages: how many kernels Triton compiles while clips and texts of varying lengths come.

The inputs are those of the benches. On the CPU nothing waits, so a rehearsal notes in place of the waits where a value
is read by the host, and in place of kernels the operations of torch that call no other one.

A fact that fails notes its error, and the others go on. The file is written again after each of them.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import shapes
from bench.contenders import plain
from bench.history import OURS, installed
from bench.race import Absent, Problem, Runner
from soundwave import eager
from soundwave.fused import functional
from soundwave.memory import Dims
from soundwave.provenance import commit, device_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "soundwave")  # folders of the checkout whose lines are named
ELSEWHERE = "elsewhere"
STEPS = 7  # timed steps of each contender
LONGEST = 20  # kernels that are named
SHALLOW = "shallow"  # key of `shapes.DIMS`
BATCHES, BATCH = 50, 4  # of varying lengths
SECONDS_OF_BATCHES = 15.0  # for them, at most
CONTENDERS = ("eager", "two-products", "recompute", "ours", "ours-torch", "ours-triton", "ours-triton-exact")


# ---------------------------------------------------------------- waits


def place(filename: str) -> str | None:
    """The path of a file of the library below the checkout, also of one that is reached by a link; None for others."""
    parts = Path(filename).parts
    for folder in PACKAGES:
        if folder in parts:
            path = Path(*parts[len(parts) - 1 - parts[::-1].index(folder) :])
            if (ROOT / path).is_file():
                return path.as_posix()
    return None


def calling_line() -> str:
    """file:line of the library from which this function was reached, the innermost one."""
    for frame in reversed(traceback.extract_stack()):
        if found := place(frame.filename):
            return f"{found}:{frame.lineno}"
    return ELSEWHERE


class HostReads(TorchDispatchMode):
    """Notes where the host reads a value or a size that a GPU would have to compute first."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero")

    def __init__(self, note: Callable[[], None]):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in self.READS:
            self.note()
        if func.namespace in ("aten", "prims"):
            return func(*args, **(kwargs or {}))
        with self:  # an operation of the library: what it calls is looked at, too
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))


@contextmanager
def noted_waits(device: torch.device) -> Iterator[Counter]:
    """Counts, by file:line, how often the host waits for the device within the context."""
    seen: Counter = Counter()

    def note() -> None:
        seen[calling_line()] += 1

    if device.type != "cuda":
        with HostReads(note):
            yield seen
        return

    def warned(message, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):  # when it is switched on, torch warns of the mode itself
            note()

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = warned
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------- kernels


def trace_of(step: Callable[[], None], device: torch.device) -> list[dict[str, Any]]:
    """The events of torch's profiler for one step, with the calls of Python functions."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # Backward runs in this thread, so that its launches lie within the call of backward.
    with torch.autograd.set_multithreading_enabled(False), torch.profiler.profile(
        activities=activities, with_stack=True
    ) as profile:  # fmt: skip
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def launched(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str, float]]:
    """What ran on the device: the event of the launch, the kernel's name, its seconds.

    Without a device these are the operations of torch that call no other one.
    """
    device_events = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if device_events:
        launches = {
            event["args"]["correlation"]: event
            for event in events
            if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
        }
        return [
            (launches.get(event["args"].get("correlation"), event), event["name"], event["dur"] / 1e6)
            for event in device_events
        ]
    found = []
    operations = sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["tid"], e["ts"], -e["dur"]))
    for event, after in zip(operations, [*operations[1:], None], strict=True):
        if after is None or after["tid"] != event["tid"] or after["ts"] >= event["ts"] + event["dur"]:
            found.append((event, event["name"], event["dur"] / 1e6))
    return found


def function_of(name: str) -> str | None:
    """`file:line function` of a call in a trace, whose name is `file(line): function`; None outside the library."""
    file, bracket, rest = name.partition("(")
    line, closed, function = rest.partition("): ")
    path = place(file) if bracket and closed else None
    return f"{path}:{line} {function}" if path else None


def by_function(events: list[dict[str, Any]]) -> dict[str, list]:
    """`file:line function` -> [kernels, seconds], for the innermost function of the library around each launch."""
    calls: dict[Any, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("cat") == "python_function" and (name := function_of(event["name"])):
            calls.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"], name))
    launches: dict[Any, list[tuple[float, float]]] = {}
    for launch, _, seconds in launched(events):
        launches.setdefault(launch["tid"], []).append((launch["ts"], seconds))
    found: dict[str, list] = {}
    for thread, starts in launches.items():
        waiting, around = sorted(calls.get(thread, []), reverse=True), []
        for start, seconds in sorted(starts):
            while waiting and waiting[-1][0] <= start:
                around.append(waiting.pop())
            while around and around[-1][1] < start:
                around.pop()
            entry = found.setdefault(around[-1][2] if around else ELSEWHERE, [0, 0.0])
            entry[0] += 1
            entry[1] += seconds
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def kernels_of(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Number and seconds of the kernels of a step, by function and by kernel."""
    events = trace_of(step, device)
    total: dict[str, list] = {}
    for _, name, seconds in launched(events):
        entry = total.setdefault(name[:120], [0, 0.0])
        entry[0] += 1
        entry[1] += seconds
    longest = sorted(total.items(), key=lambda item: -item[1][1])[:LONGEST]
    return {
        "launches": sum(count for count, _ in total.values()),
        "seconds": sum(seconds for _, seconds in total.values()),
        "by_function": by_function(events),
        "longest": dict(longest),
    }


# ---------------------------------------------------------------- what is looked at


def norm_problem(case: shapes.Case, device: torch.device) -> Problem:
    """Residual and LayerNorm of all frames."""
    rows = case.B * case.T
    weight, bias = (torch.ones(case.D, device=device, requires_grad=True) for _ in range(2))

    def inputs(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        return tuple(
            torch.randn(rows, case.D, device=device, generator=generator).to(case.dtype).requires_grad_()
            for _ in range(2)
        )

    def reference(x, residual):
        return F.layer_norm(x + residual, (case.D,), weight.to(x.dtype), bias.to(x.dtype))

    def ours(x, residual):
        return functional.add_layer_norm(x, residual, weight, bias)

    contenders = {"eager": plain(reference), OURS: plain(ours)}
    return Problem(inputs, contenders, parameters=dict.fromkeys(contenders, [weight, bias]))


def peaks_problem(case: shapes.Case, device: torch.device) -> Problem:
    """The kept frames of a path."""
    frames = shapes.lengths(case.B, case.T, case.lengths)
    path, scores = shapes.planted_path(frames, case.D, case.D, device)
    on_device = frames.to(device)
    return Problem(
        lambda seed: (path, scores),
        {
            "eager": plain(lambda path, scores: eager.ctc_peaks(path, on_device, blank=case.D, scores=scores)),
            OURS: plain(lambda path, scores: functional.ctc_peaks(path, frames, blank=case.D, scores=scores)),
        },
        trains=False,
    )


def splice_problem(case: shapes.Case, device: torch.device) -> Problem:
    """Kept frames in the place of the placeholder in each text."""
    frames = shapes.lengths(case.B, case.T, case.lengths)
    path, scores = shapes.planted_path(frames, case.D, case.D, device)
    peaks = eager.ctc_peaks(path, frames.to(device), blank=case.D, scores=scores)
    ids = torch.zeros(case.B, 64, dtype=torch.int64, device=device)
    ids[:, 1] = 1  # the placeholder
    mask = torch.ones_like(ids)

    def inputs(seed: int) -> tuple:
        generator = torch.Generator(device).manual_seed(seed)
        sizes = (case.B, ids.shape[1], case.D), (len(peaks.index), case.D)
        return tuple(
            torch.randn(*size, device=device, generator=generator).to(case.dtype).requires_grad_() for size in sizes
        )

    def spliced(function):
        return lambda embeddings, speech: function(
            embeddings, ids, mask, speech, peaks.cu_seqlens, audio_placeholder_id=1
        )

    return Problem(inputs, {"eager": plain(spliced(eager.splice)), OURS: plain(spliced(functional.splice))})


def shallow(size: str) -> Dims:
    """The whole model without most of its layers: waits, launches and compilations repeat from layer to layer."""
    return replace(shapes.DIMS[size], layers=2, audio_layers=2)


def stage_case(stage: int, size: str) -> shapes.Case:
    """A step of a stage with clips of equal length and a shallow model."""
    shapes.DIMS[SHALLOW] = shallow(size)
    case = next(case for case in shapes.stages(size) if case.stage == stage)
    return replace(case, size=SHALLOW)


def looked_at(size: str) -> "dict[str, Callable[[torch.device], Problem]]":
    """Name -> the problem, in the order of their worth."""
    from bench import bench_alignment, bench_ctc, bench_linear_cross_entropy, bench_linear_ctc, bench_shrink

    def stage(number: int) -> Callable[[torch.device], Problem]:
        def problem(device: torch.device) -> Problem:
            from bench import bench_stages

            return bench_stages.problem(stage_case(number, size), device)

        return problem

    def of(problem, case: shapes.Case) -> Callable[[torch.device], Problem]:
        return lambda device: problem(case, device)

    linear = {case.name: case for case in shapes.linear_ctc(size)}
    clips = shapes.shrink(size)[0]
    return {
        "linear_ctc, peaky": of(bench_linear_ctc.problem, linear["peaky"]),
        "linear_ctc, random": of(bench_linear_ctc.problem, linear["random"]),
        "ctc": of(bench_ctc.problem, shapes.ctc(size)[:2][-1]),
        "stage 1": stage(1),
        "stage 2": stage(2),
        "shrink_attention": of(bench_shrink.attention_problem, clips),
        "ctc_peaks": of(peaks_problem, clips),
        "splice": of(splice_problem, clips),
        "add_layer_norm": of(norm_problem, clips),
        "linear_cross_entropy": of(bench_linear_cross_entropy.problem, shapes.linear_cross_entropy(size)[0]),
        "alignment": of(bench_alignment.problem, shapes.alignment(size)[0]),
        "shrink": of(bench_shrink.module_problem, clips),
    }


# ---------------------------------------------------------------- measuring


def facts_of(problem: Problem, name: str, device: torch.device) -> dict[str, Any]:
    """The facts of one contender."""
    runner = Runner(
        problem.contenders[name](), problem.parameters.get(name, []), problem.trains, device, problem.counts
    )
    inputs = problem.inputs(0)

    def step() -> None:
        out = runner.forward(inputs)
        if runner.trains:
            runner.backward(out, inputs)

    start = time.perf_counter()
    runner.step(inputs)
    found: dict[str, Any] = {"first_step_seconds": time.perf_counter() - start}  # with compilation
    part = "both" if runner.trains else "forward"
    found["seconds"] = [runner.step(inputs)[part] for _ in range(STEPS)]
    found["peak_bytes"] = runner.peak_bytes(inputs)[part]
    if name.startswith(OURS):
        with noted_waits(device) as waits:
            step()
        found["waits"] = dict(waits)
        found["kernels"] = kernels_of(step, device)
    return found


def forget_compiled() -> None:
    """Let every kernel be compiled again and so be counted. Triton takes what it has compiled before from its files."""
    from triton.runtime import JITFunction

    for name, module in list(sys.modules.items()):
        if name.startswith("soundwave.kernels"):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()


def compilations(stage: int, size: str, device: torch.device, until: float) -> dict[str, Any]:
    """Kernels that Triton compiles in a training with clips and texts of varying lengths.

    Args:
        until: no batch begins later, by `time.monotonic()`.
    """
    import triton

    from bench.model import batch_of, prepare

    names, after_each = Counter(), []

    def compiled(*, fn: Any = None, **_: Any) -> None:
        names[getattr(fn, "name", str(fn)).split(".")[-1]] += 1

    forget_compiled()
    case = replace(stage_case(stage, size), B=BATCH, lengths="mixture")
    draws, begun = random.Random(0), time.monotonic()
    before, triton.knobs.runtime.jit_post_compile_hook = triton.knobs.runtime.jit_post_compile_hook, compiled
    try:
        for _ in range(BATCHES if device.type == "cuda" else 2):
            frames = draws.randint(max(8, case.T // 10), case.T)
            drawn = replace(case, T=frames, U=max(2, frames // draws.randint(6, 12)))
            model = prepare(drawn, device)["ours"]
            model(**batch_of(drawn, device)).loss.backward()
            for parameter in model.parameters():
                parameter.grad = None
            after_each.append(names.total())
            if time.monotonic() > until:
                break
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    return {"all_seconds": time.monotonic() - begun, "after_each_batch": after_each, "by_kernel": dict(names)}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, or the error that it raised."""
    try:
        return measure()
    except Absent as reason:
        return {"absent": str(reason)}
    except Exception:  # The other facts are taken all the same.
        return {"error": traceback.format_exc()}


def free() -> None:
    """Free the GPU's memory of the last operation."""
    gc.collect()
    try:
        torch.cuda.empty_cache()
    except RuntimeError as error:  # After an illegal access nothing works any more; the next fact's error tells it.
        print(f"the GPU's memory could not be freed: {error}")


def wanted(problem: Problem, device: torch.device) -> list[str]:
    """The contenders that are looked at: eager, the yardsticks, and ours as it runs on this device."""
    other = "ours-triton" if device.type != "cuda" else "ours-torch"
    return [name for name in CONTENDERS if name in problem.contenders and not name.startswith(other)]


def line(name: str, contender: str, found: dict[str, Any]) -> str:
    """One line about a contender."""
    if "after_each_batch" in found:
        counts = found["after_each_batch"]
        return f"{name} · {contender}: {counts[-1]} kernels in {len(counts)} batches"
    if "seconds" not in found:
        reason = found.get("absent") or found.get("error", "").strip().splitlines()[-1]
        return f"{name} · {contender}: {reason}"
    text = f"{name} · {contender}: {1e3 * statistics.median(found['seconds']):.3f} ms"
    if "kernels" in found:
        text += f", {found['kernels']['launches']} kernels, {sum(found['waits'].values())} waits"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file")
    parser.add_argument("--tiny", action="store_true", help="rehearse on the CPU at tiny sizes")
    parser.add_argument("--seconds", type=float, default=95.0, help="no fact begins later")
    parser.add_argument("--commit", default="", help="commit of the checkout, where git does not know it")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        sys.exit("no CUDA GPU was found: look at one, or rehearse with --tiny")
    device, size = (torch.device("cpu"), "tiny") if given.tiny else (torch.device("cuda"), "cuda")
    end = time.monotonic() + given.seconds
    content: dict[str, Any] = {
        "benchmark": "gpu_facts", "device": device_name(), "size": size, "date": date.today().isoformat(),
        "commit": commit() or given.commit or "unknown", "versions": installed(), "facts": {}, "compilations": {},
        "shallow": asdict(shallow(size)), "not_run": [],
    }  # fmt: skip

    def save() -> None:
        aside = given.out.with_suffix(".part")
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        aside.replace(given.out)

    failed = 0

    def note(name: str, contender: str, found: dict[str, Any]) -> None:
        nonlocal failed
        failed += "error" in found
        print(line(name, contender, found), flush=True)

    def look_at(name: str, make: Callable[[torch.device], Problem]) -> None:
        made: list[Problem] = []
        error = attempt(lambda: made.append(make(device)) or {})
        content["facts"][name] = found = {"problem": error} if error else {}
        if error:
            note(name, "problem", error)
        for contender in wanted(made[0], device) if made else []:
            found[contender] = attempt(lambda contender=contender: facts_of(made[0], contender, device))
            note(name, contender, found[contender])

    def compile_for(stage: int) -> None:
        until = min(end, time.monotonic() + SECONDS_OF_BATCHES)
        found = content["compilations"][f"stage {stage}"] = attempt(lambda: compilations(stage, size, device, until))
        note("compilations", f"stage {stage}", found)

    todo = {name: lambda name=name, make=make: look_at(name, make) for name, make in looked_at(size).items()}
    counted = {f"compilations, stage {stage}": lambda stage=stage: compile_for(stage) for stage in (1, 2)}
    first = list(todo).index("stage 2") + 1  # the compilations come behind the stages, whose model they use
    for name, task in [*list(todo.items())[:first], *counted.items(), *list(todo.items())[first:]]:
        if time.monotonic() > end:
            content["not_run"].append(name)
        else:
            task()
        if device.type == "cuda":
            free()
        save()
    if content["not_run"]:
        print(f"not run, because the time was over: {', '.join(content['not_run'])}")
    if failed:
        sys.exit(f"{failed} facts could not be taken; the file holds their errors")


if __name__ == "__main__":
    main()
