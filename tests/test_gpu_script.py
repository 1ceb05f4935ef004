"""bench/gpu.sh: the whole of it in a rehearsal on the CPU; its time, its outcomes and what it leaves when it is killed.

Where only the script itself is tested, wheels with small modules `torch` and `pytest` stand for a GPU and for its
tests: the script finds a card, and its parts end as the test wants.
"""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from bench import history
from tests.processes import WITHOUT_COMPILER

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"
ALL = ["facts", "tests", "linear", "ctc", "stages", "train-2", "memcheck", "shrink", "torch", "racecheck"]

TORCH = """
class version:
    cuda = "13.0"

class cuda:
    is_available = staticmethod(lambda: True)
    get_device_name = staticmethod(lambda: "Test Card")

    @staticmethod
    def get_device_properties(_):
        from types import SimpleNamespace
        return SimpleNamespace(total_memory=140 << 30)
"""
# Writes how it was called into its log, and the results that `ENDS` wants for the part.
PYTEST = """
import json, os, sys, time
from pathlib import Path
ENDS = {ends!r}
xml = Path(sys.argv[sys.argv.index("--junitxml") + 1])
end = ENDS.get(xml.stem, "passed")
names = ("TRITON_INTERPRET", "PYTORCH_NO_CUDA_MEMORY_CACHING", "OMP_NUM_THREADS", "OUT")
called = {{"arguments": sys.argv[1:], "environment": {{name: os.environ.get(name) for name in names}}}}
print("called " + json.dumps(called), flush=True)
cases = {{"none": "", "skipped": "<testcase name='a'><skipped/></testcase>"}}.get(end, "<testcase name='a'/>")
try:
    if end == "sleeps":
        Path(os.environ["TMPDIR"], "asleep").touch()
        time.sleep(120)
except KeyboardInterrupt:
    print("interrupted")
finally:
    xml.write_text(f"<testsuites><testsuite>{{cases}}</testsuite></testsuites>")
"""


def command(*arguments: str) -> list[str]:
    return ["bash", str(SCRIPT), "--python", sys.executable, *arguments]


def environment(out: Path, **more: str) -> dict[str, str]:
    (out / "tmp").mkdir(exist_ok=True)
    (out / "out").mkdir(exist_ok=True)
    return {
        "OUT": str(out / "out"), "TMPDIR": str(out / "tmp"), "PATH": "/usr/bin:/bin", "HOME": str(Path.home()),
        "OMP_NUM_THREADS": "1",
    } | WITHOUT_COMPILER | more  # fmt: skip


def gpu(out: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(out, **more), cwd=out, errors="replace"
    )


def wheel(folder: Path, name: str, module: str, tag: str = "py3-none-any") -> Path:
    """A wheel with one module, `name`.py."""
    path = folder / f"{name}-1.0-{tag}.whl"
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", module)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def card(folder: Path, **ends: str) -> list[str]:
    """The arguments with which the script finds a GPU; `ends`: how the tests of a part end, if they do not pass."""
    wheel(folder / "wheels", "torch", TORCH)
    wheel(folder / "wheels", "pytest", PYTEST.format(ends=ends))
    return ["--wheels", str(folder / "wheels")]


class Brought:
    """What a run of the script has left: one archive, with results and logs."""

    def __init__(self, folder: Path):
        (path,) = (folder / "out").iterdir()
        assert path.stat().st_size < 16 << 20
        with tarfile.open(path) as archive:
            self.files = {
                member.name: archive.extractfile(member).read().decode(errors="replace")
                for member in archive.getmembers()
                if member.isfile()
            }

    def one(self, name: str) -> str:
        """The only file whose path ends like this."""
        (found,) = (text for path, text in self.files.items() if path.endswith(name))
        return found

    @property
    def parts(self) -> dict[str, dict]:
        (text,) = (text for path, text in self.files.items() if "/gpu-parts-" in path)
        return {part["part"]: part for part in json.loads(text)["parts"]}

    @property
    def outcomes(self) -> dict[str, str]:
        return {name: part["outcome"] for name, part in self.parts.items()}

    def called(self, part: str) -> dict:
        (line,) = (line for line in self.one(f"/{part}.log").splitlines() if line.startswith("called "))
        return json.loads(line.removeprefix("called "))


# ---------------------------------------------------------------- the whole of it


def test_a_rehearsal_runs_every_part_to_its_end(tmp_path):
    # Three times the usual time: a busy machine must not make a part too slow for its limit.
    done = gpu(tmp_path, "--rehearse", "--commit", "0123abc", "--seconds", "1725")
    brought = Brought(tmp_path)
    assert done.returncode == 0, done.stdout
    assert brought.outcomes == dict.fromkeys(ALL, "passed")
    assert "the kernels run in Triton's interpreter" in done.stdout
    assert all(path.startswith("runs/gpu-rehearsal/") for path in brought.files)  # nothing among what was measured
    for part in ("memcheck", "racecheck"):
        assert f"the tests run without {part}" in brought.one(f"/{part}.log")
        assert brought.parts[part]["tests"]["passed"]
    results = {path: json.loads(text) for path, text in brought.files.items() if path.endswith(".json")}
    assert all(each.keys() >= {"device", "date", "commit", "versions"} for each in results.values())
    benches = [history.BenchRun.model_validate(each) for each in results.values() if "entries" in each]
    measured = {entry.operation for run in benches for entry in run.entries}
    assert measured == {"linear_ctc", "ctc", "stages", "linear_cross_entropy"}
    assert {"two-products", "recompute"} & {entry.contender for run in benches for entry in run.entries}
    check_facts(json.loads(next(text for path, text in brought.files.items() if "/gpu-facts-" in path)))
    check_training(json.loads(next(text for path, text in brought.files.items() if "/train_24gb-2-" in path)))


def check_facts(content: dict) -> None:
    assert not content["not_run"]
    assert len(content["facts"]) == 12 and content["compilations"].keys() == {"stage 1", "stage 2"}
    for name, contenders in content["facts"].items():
        ours = [facts for contender, facts in contenders.items() if contender.startswith("ours")]
        assert ours and "eager" in contenders, name
        for facts in contenders.values():
            assert "error" not in facts and len(facts["seconds"]) and facts["peak_bytes"] > 0
        for facts in ours:
            assert facts["kernels"]["launches"] == sum(count for count, _ in facts["kernels"]["by_function"].values())
    stage = content["facts"]["stage 2"]["ours"]
    assert sum(stage["waits"].values()) > 0
    assert any(line.startswith("soundwave/model/modeling.py:") for line in stage["waits"])
    assert any(line.startswith("kernels/norm.py:") for line in stage["kernels"]["by_function"])
    assert content["facts"]["ctc_peaks"]["ours"]["waits"]  # within an operation that torch knows as one


def check_training(content: dict) -> None:
    assert not content["failures"]
    assert [(run["implementation"], run["kept_per_second"]) for run in content["runs"]] == [
        ("fused", 3.0), ("fused", 25.0)
    ]  # fmt: skip
    for run in content["runs"]:
        assert run["largest_batch"] == 2 and run["audio_seconds_per_second"] > 0
        assert run["kept_frames"] == 2 * run["kept_per_second"] * run["seconds"]  # the planted path
        assert run["phases"].keys() == {"encoder", "ctc", "language model", "backward", "optimiser"}
        # The states of the blank's bias, two scalars, are not counted.
        assert run["parts"]["AdamW's states"] == 2 * run["parts"]["trained weights"] - 8
        assert all(tried["predicted_bytes"] > 0 for tried in run["tried"])


COLLECT = """
import json, sys
import pytest

class Collected:
    def pytest_collection_finish(self, session):
        self.names = [item.nodeid for item in session.items]

found = {}
for part, arguments in json.loads(sys.argv[1]).items():
    collected = Collected()
    pytest.main([*arguments, "--collect-only", "-q", "--no-header"], plugins=[collected])
    found[part] = collected.names
print("found " + json.dumps(found))
"""


def test_on_a_gpu_each_part_selects_the_tests_that_it_names(tmp_path):
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.write_text('#!/bin/sh\necho "$@"\nshift 8\nexec "$@"\n')  # four options, each with a value
    sanitizer.chmod(0o755)
    # A user's own setting must not let the kernels run in the interpreter.
    done = gpu(tmp_path, *card(tmp_path), PATH=f"{sanitizer.parent}:/usr/bin:/bin", TRITON_INTERPRET="1")
    brought = Brought(tmp_path)
    own = {"facts", "train-2"}  # They need the real torch.
    assert done.returncode == len(own), done.stdout
    assert list(brought.outcomes) == ALL
    assert all((outcome != "passed") == (part in own) for part, outcome in brought.outcomes.items())
    called = {part: brought.called(part) for part in ALL if part not in own}
    assert all(each["environment"]["TRITON_INTERPRET"] == "0" for each in called.values())
    assert all(each["environment"]["OUT"] is None for each in called.values())  # or files would come past the archive
    assert called["memcheck"]["environment"]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "--tool memcheck" in brought.one("/memcheck.log") and "--tool racecheck" in brought.one("/racecheck.log")
    assert any(path.startswith("bench/results/test-card/gpu-parts-") for path in brought.files)
    for part in ("tests", "torch"):
        arguments = called[part]["arguments"]
        assert arguments[arguments.index("--dist") + 1] == "worksteal"
    # The same selections, of the real tests and benches.
    selections = {}
    for part, each in called.items():
        arguments = each["arguments"]
        for option in ("--junitxml", "-n", "--dist", "--results"):
            if option in arguments:
                place = arguments.index(option)
                arguments = arguments[:place] + arguments[place + 2 :]
        bench = any(argument.startswith("bench/") for argument in arguments)
        selections[part] = [*arguments, *(["--size", "cuda"] if bench else [])]
    real = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", COLLECT, json.dumps(selections)],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"},
    )  # fmt: skip
    (line,) = (line for line in real.stdout.splitlines() if line.startswith("found ")) if real.stdout else [real.stderr]
    found = json.loads(line.removeprefix("found "))
    assert len(found["tests"]) > 300 and not any("cuda-torch" in name for name in found["tests"])
    assert len(found["torch"]) > 100 and all("cuda-torch" in name for name in found["torch"])
    assert not set(found["tests"]) & set(found["torch"])
    for part in ("memcheck", "racecheck"):
        files = {name.split("::")[0].split("/")[-1] for name in found[part]}
        names = ("vocab_rows", "active_columns", "ctc", "ctc_peaks", "norm", "splice")
        assert files == {f"test_{name}.py" for name in names}
        assert all("cuda-triton" in name for name in found[part]) and len(found[part]) < 60
    groups = {
        part: {name.split("[")[1].split("-both-")[0] for name in found[part]}
        for part in ("linear", "ctc", "stages", "shrink")
    }
    assert groups["linear"] == {"random", "peaky", "peaky_mixture"}
    assert {name.split("-both-")[1] for name in found["linear"]} == {
        f"{name}]"
        for name in (
            "eager",
            "two-products",
            "recompute",
            "pruned-ctc",
            "ours-torch",
            "ours-torch-exact",
            "ours-triton",
            "ours-triton-exact",
        )
    }
    assert groups["ctc"] == {"V_32", "V_500", "V_5000"}
    assert groups["stages"] == {"stage_1_all_30_s", "stage_2_all_30_s"}
    assert {name.split("/")[-1].split("::")[0] for name in found["shrink"]} == {
        "bench_shrink.py", "bench_linear_cross_entropy.py", "bench_alignment.py"
    }  # fmt: skip


# ---------------------------------------------------------------- arguments


def test_a_part_that_does_not_exist_is_named_with_those_that_do(tmp_path):
    done = gpu(tmp_path, "--rehearse", "train-4")
    assert done.returncode == 64
    assert "unknown part 'train-4'" in done.stderr and "train-3" in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("seconds", ["0", "ten", "1.5"])
def test_seconds_that_are_no_whole_number_are_refused(tmp_path, seconds):
    done = gpu(tmp_path, "--seconds", seconds)
    assert done.returncode == 64
    assert f"--seconds {seconds}: it must be a whole number of at least 1" in done.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_without_a_gpu_only_the_rehearsal_runs(tmp_path):
    done = gpu(tmp_path, "tests")
    assert done.returncode == 65
    assert "no CUDA GPU" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_wheel_for_another_python_is_left_out_and_named(tmp_path):
    other = wheel(tmp_path / "wheels", "other", "", tag="cp27-cp27m-manylinux1_x86_64")
    done = gpu(tmp_path, *card(tmp_path), "ctc")
    assert f"left out {other}" in done.stderr and "not a supported wheel" in done.stderr
    assert Brought(tmp_path).outcomes == {"ctc": "passed"}  # with the modules of the other wheels
    assert done.returncode == 0


# ---------------------------------------------------------------- outcomes


def test_a_part_without_a_test_that_passed_has_failed_and_the_next_one_runs(tmp_path):
    done = gpu(tmp_path, *card(tmp_path, tests="skipped", linear="none"), "tests", "linear", "memcheck", "ctc")
    brought = Brought(tmp_path)
    assert done.returncode == 3
    assert brought.outcomes == {
        "tests": "failed: all tests were skipped",
        "linear": "failed: no test was collected",
        "memcheck": "failed with exit status 1",  # there is no such program on PATH
        "ctc": "passed",
    }
    assert "compute-sanitizer is not installed" in brought.one("/memcheck.log")
    assert "failed: all tests were skipped (1 skipped)" in done.stdout.split("Test Card")[1]  # the summary


def test_no_part_runs_longer_than_its_time_and_those_that_no_longer_fit_are_named(tmp_path):
    start = time.monotonic()
    done = gpu(tmp_path, *card(tmp_path, ctc="sleeps"), "--seconds", "34", "ctc", "tests", "torch")
    assert time.monotonic() - start < 34
    brought = Brought(tmp_path)
    assert done.returncode == 3
    assert brought.outcomes["ctc"].startswith("stopped at its limit of ")
    assert "interrupted" in brought.one("/ctc.log") and brought.parts["ctc"]["tests"]["passed"] == 1
    assert all(brought.outcomes[part].startswith("not run: ") for part in ("tests", "torch"))
    assert "torch         0 s  not run: " in done.stdout


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_what_was_done_is_there_whenever_it_is_stopped(tmp_path, by):
    process = subprocess.Popen(
        command(*card(tmp_path, linear="sleeps"), "ctc", "linear", "tests"),
        env=environment(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "tmp" / "asleep").exists():
        assert process.poll() is None
        time.sleep(0.05)
    (running,) = (tmp_path / "tmp").glob("*/running")
    running = int(running.read_text())
    process.send_signal(by)
    text, _ = process.communicate()
    if by == signal.SIGKILL:
        os.kill(running, signal.SIGTERM)  # Nothing else could do it.
        assert Brought(tmp_path).outcomes == {"ctc": "passed"}
    else:
        assert process.returncode == 130
        assert "stopped in the part linear" in text
        assert Brought(tmp_path).outcomes == {"ctc": "passed", "linear": "failed with exit status 130"}
        assert not Path(f"/proc/{running}").exists()
    assert json.loads(next(t for n, t in Brought(tmp_path).files.items() if "gpu-parts" in n))["commit"]


# ---------------------------------------------------------------- the facts


@pytest.fixture(scope="module")
def gpu_facts():
    from bench import gpu_facts

    return gpu_facts


def event(cat: str, name: str, start: float, length: float, thread: int = 1, **arguments) -> dict:
    return {"cat": cat, "name": name, "ts": start, "dur": length, "tid": thread, "args": arguments}


def test_a_kernel_belongs_to_the_innermost_function_of_the_library_around_its_launch(gpu_facts):
    events = [
        event("python_function", "/somewhere/site/soundwave/kernels/ctc.py(10): outer", 0, 100),
        event("python_function", "kernels/norm.py(20): inner", 10, 20),
        event("python_function", "torch/nn/functional.py(30): linear", 12, 2),
        event("python_function", "kernels/norm.py(20): inner", 0, 100, thread=2),
        event("cuda_runtime", "cudaLaunchKernel", 13, 1, correlation=1),
        event("cuda_driver", "cuLaunchKernelEx", 50, 1, correlation=2),
        event("cuda_runtime", "cudaMemcpyAsync", 200, 1, correlation=3),
        event("cuda_runtime", "cudaLaunchKernel", 60, 1, thread=2, correlation=4),
        event("kernel", "gemm", 400, 2_000_000, thread=7, correlation=1),
        event("kernel", "_ctc", 300, 1_000_000, thread=7, correlation=2),
        event("gpu_memcpy", "Memcpy DtoH", 500, 500_000, thread=7, correlation=3),
        event("kernel", "_norm", 600, 250_000, thread=7, correlation=4),
    ]
    assert gpu_facts.by_function(events) == {
        "kernels/norm.py:20 inner": [2, 2.25],
        "kernels/ctc.py:10 outer": [1, 1.0],
        gpu_facts.ELSEWHERE: [1, 0.5],
    }


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (ROOT / "kernels" / "ctc.py", "kernels/ctc.py"),
        ("/tmp/site/soundwave/kernels/ctc.py", "kernels/ctc.py"),
        ("/home/soundwave/soundwave/fused/functional.py", "soundwave/fused/functional.py"),
        ("/home/soundwave/bench/race.py", None),
        ("/usr/lib/python3/torch/nn/functional.py", None),
    ],
)
def test_a_file_of_the_library_is_named_by_its_place_in_the_checkout(gpu_facts, file, expected):
    assert gpu_facts.place(str(file)) == expected


def test_a_wait_for_the_gpu_is_noted_at_its_line(gpu_facts, monkeypatch):
    import warnings

    import torch

    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    # A function whose code claims to stand at line 7 of a file of the library.
    library = {"warnings": warnings}
    source = "\n" * 6 + "def waits(): warnings.warn('called a synchronizing CUDA operation')\n"
    exec(compile(source, str(ROOT / "kernels" / "ctc.py"), "exec"), library)
    with gpu_facts.noted_waits(torch.device("cuda")) as seen:
        library["waits"]()
        library["waits"]()
        warnings.warn("Synchronization debug mode … does not yet detect all synchronizing operations", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert seen == {"kernels/ctc.py:7": 2, gpu_facts.ELSEWHERE: 1}
    assert modes == ["warn", "default"]


def test_a_fact_that_fails_notes_its_error(gpu_facts):
    def fails():
        raise RuntimeError("no kernel image is available")

    found = gpu_facts.attempt(fails)
    assert "no kernel image is available" in found["error"]
    assert gpu_facts.line("ctc", "ours", found) == "ctc · ours: RuntimeError: no kernel image is available"
