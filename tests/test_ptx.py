"""Compiled code without a GPU: every kernel once, a missing barrier is noticed, and what the emulated driver leaves.

`make ptx` runs many more cases under more orders; see docs/proof.md.
"""

import json
import re
import struct
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tests.compiling import ROOT, kernels, run_compiled

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def swept() -> list[dict]:
    """The small cases on both architectures, under all of their orders."""
    done = run_compiled("-m", "tests.ptx", "sweep", "--small", "--json")
    assert done.stdout, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_compiled_kernels_are_as_exact_as_interpreted_ones_and_nothing_is_found(swept):
    assert [run["text"] for run in swept if not run["good"]] == []


def test_every_kernel_has_a_case(swept):
    assert {kernel for run in swept for kernel in run["kernels"]} == kernels()


def test_kernels_whose_warps_exchange_more_run_on_both_architectures(swept):
    both = [{kernel for run in swept if run["arch"] == arch for kernel in run["kernels"]} for arch in (86, 90)]
    for name in (
        "_shrink_attention_fwd",
        "_shrink_attention_dq",
        "_shrink_attention_dkv",
        "_vocab_rows",
        "_ctc_lattice",
    ):
        assert all(f"{name}_kernel" in found for found in both)


def test_a_missing_barrier_is_noticed():
    """Each barrier of two kernels, taken out alone. `make ptx` does so with all kernels."""
    done = run_compiled("-m", "tests.ptx", "mutate", "--arch", 86, "--only", "norm: D1024", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    noticed = [barrier["noticed"] for barrier in json.loads(line)]
    assert len(noticed) > 6 and all(noticed)


def test_a_barrier_that_nothing_notices_needs_a_reason_and_a_reason_such_a_barrier():
    from tests.ptx.mutate import Barrier, Redundant, stale, unexplained

    first = Barrier("f", 86, "v", 0, 4, "x = 1")
    barriers = [first, first._replace(number=1, noticed="race"), first._replace(line="y = 2", noticed="race")]
    known, other = Redundant("f", "x = 1", 1, "because"), Redundant("f", "y = 2", 1, "because")
    assert unexplained(barriers, []) == [first] and unexplained(barriers, [known]) == []
    more = [*barriers, first._replace(variant="w")]  # one more at the line than the reason was given for
    assert unexplained(more, [known]) == [first, more[-1]]
    assert stale(barriers, [known]) == [] and stale(barriers, [known, other]) == [other]


def test_what_is_wrong_with_all_barriers_is_not_taken_for_the_loss_of_one():
    """Two warps store different values; the barrier behind that is redundant, but each run without it has the race."""
    import numpy as np

    from tests.ptx import Allocation, EmulationError
    from tests.ptx.driver import Compiled, Prepared
    from tests.ptx.handwritten import text
    from tests.ptx.mutate import Mutation

    array = np.zeros(1, "u4")
    first_lanes = "and.b32 %r1, %r0, 31;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 st.global.b32 [%rd0], %r0;\n"
    compiled = Compiled(text(first_lanes + "bar.sync 0;", 1, 64))
    prepared = Prepared(
        compiled, (1, 1, 1), SimpleNamespace(num_warps=2, shared=0), {"array_0": struct.pack("<Q", array.ctypes.data)},
        [Allocation(array.ctypes.data, array.nbytes, "X")], {},
    )  # fmt: skip
    with pytest.raises(EmulationError, match="^race: X, byte 0: .*, although no barrier is missing"):
        Mutation(86)(prepared)


# ---- the driver

DRIVER = """
import sys
sys.path.append(".")
import tests.ptx
sys.path.remove(".")
import torch, triton
from triton import knobs
from tests.ptx import EmulationError
from tests.ptx.driver import emulated
from soundwave.fused.functional import add_layer_norm
from soundwave.kernels import shrink_attention
from soundwave.kernels.dispatch import architecture, runs_on_cpu

def state():
    try:
        driver = triton.runtime.driver.active
    except RuntimeError:
        driver = None
    return driver, knobs.runtime.add_stages_inspection_hook

x, cpu = torch.randn(3, 40), torch.device("cpu")
tensors = x, x.flip(0), torch.ones(40), torch.zeros(40)
before = state()
wanted = add_layer_norm(*tensors, impl="torch")

# An architecture chooses its own settings, and an inner driver hands back to the outer one.
with emulated(86) as outer:
    assert runs_on_cpu() and architecture(cpu) == 86
    with emulated(90, order="reverse") as inner:
        assert architecture(cpu) == 90
        torch.testing.assert_close(add_layer_norm(*tensors, impl="triton"), wanted)
    assert architecture(cpu) == 86 and not outer.launches
    torch.testing.assert_close(add_layer_norm(*tensors, impl="triton"), wanted)
assert state() == before
for log, arch in ((outer, 86), (inner, 90)):
    (launched,) = log.launches
    assert f".target sm_{arch}" in launched.compiled.ptx and not log.findings

# After an error all is as before, and the error is a finding.
@triton.jit
def far_kernel(X, N):
    triton.language.store(X + N, 1.0)
try:
    with emulated(86) as log:
        far_kernel[(1,)](x, 1000)
except EmulationError as error:
    assert "bounds" in str(error)
else:
    raise AssertionError("out of bounds")
assert log.findings[0].kind == "bounds" and state() == before

# Without a GPU and without an emulator Triton is refused again.
if before[0] is None:
    assert not runs_on_cpu()
    try:
        add_layer_norm(*tensors, impl="triton")
    except ValueError as error:
        assert "it needs CUDA" in str(error)
    else:
        raise AssertionError("ran")
"""


def test_the_driver_is_gone_when_its_context_ends(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    done = run_compiled(tmp_path / "driver.py")
    assert done.returncode == 0, done.stderr[-3000:]


def test_under_the_interpreter_the_driver_says_why_it_cannot_be_used():
    from triton import knobs

    from tests.ptx.driver import emulated

    if not knobs.runtime.interpret:
        pytest.skip("Triton compiles in this process")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), emulated(86):
        pass


def test_what_is_missing_in_another_triton_is_named(monkeypatch):
    from triton import knobs
    from triton.runtime import driver

    from tests.ptx.driver import emulated

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.delattr(type(driver), "set_active")
    with pytest.raises(RuntimeError, match=r"has no set_active. .* see the beginning of .*driver.py"), emulated(86):
        pass


# ---- somebody else's kernels


def test_the_example_of_the_documentation(tmp_path):
    """The first Python block of proof.md, in a file as the page says: one function is found, the other is not."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "proof.md").read_text(encoding="utf-8"), re.S)[1]
    file = tmp_path / "flip.py"
    file.write_text(code)
    done = run_compiled("-m", "tests.ptx", "run", f"{file}:broken", f"{file}:mended")
    lines = [line for line in done.stdout.splitlines() if line.startswith("sm_")]
    broken, mended = ([line for line in lines if f":{name}:" in line] for name in ("broken", "mended"))
    assert done.returncode == 1 and len(broken) == len(mended) == 12, done.stdout + done.stderr[-3000:]
    assert all("race" in line for line in broken) and all(": ok" in line for line in mended)
    # Without the barrier the results depend on the order: some are right.
    assert any("AssertionError" in line for line in broken) and not all("AssertionError" in line for line in broken)
    done = run_compiled("-m", "tests.ptx", "mutate", f"{file}:mended", "--arch", 86)
    assert done.returncode == 0 and "NOT NOTICED" not in done.stdout and "race" in done.stdout


def test_runs_are_compared_with_one_that_came_to_its_end(monkeypatch):
    """A run that an assertion cuts short has launched less than the others, which is no finding of theirs."""
    import torch

    from tests.ptx import Unsupported, runs
    from tests.ptx.driver import Launched, Log

    logs = []

    @contextmanager
    def emulated(arch, **_):
        logs.append(Log())
        yield logs[-1]

    def launch(memory: bytes) -> None:
        compiled = SimpleNamespace(variant="v", program=SimpleNamespace(kernel=SimpleNamespace(opcodes=dict)))
        report = SimpleNamespace(instructions=1)
        logs[-1].launches.append(Launched("f", compiled, (1, 1, 1), 1, report, 0.0, memory))

    def function():
        launch(b"same")
        if len(logs) == 1:
            torch.testing.assert_close(torch.zeros(1), torch.ones(1))
        if len(logs) == 4:
            raise Unsupported("line 7 of f.py:3: atom.global.add.u32")
        launch(b"same" if len(logs) < 3 else b"other")

    monkeypatch.setattr(runs, "emulated", emulated)
    outcomes = list(runs.run("f", function, 86, ["lockstep", "forward", "reverse", "random"]))
    assert [[finding.kind for finding in outcome.findings] for outcome in outcomes] == [[], [], ["order"], []]
    assert re.search(r"^AssertionError: .*not close.* \(test_ptx.py:\d+\)$", outcomes[0].error)  # not of torch's file
    assert outcomes[3].error == "unsupported: line 7 of f.py:3: atom.global.add.u32"  # no line of the emulator


def test_mutate_says_why_it_took_nothing_out(monkeypatch, capsys, tmp_path):
    from tests.ptx import EmulationError, command

    file = tmp_path / "kernels_of_mine.py"
    file.write_text("def f(): pass\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(command, "mutate", lambda arch, functions: [])
    assert command.main(["mutate", f"{file}:f"]) == 0
    assert "no barrier was found" in capsys.readouterr().out

    def broken(arch, functions):
        raise EmulationError("race: X, byte 0")

    monkeypatch.setattr(command, "mutate", broken)
    with pytest.raises(SystemExit, match="race: X, byte 0\nNo barrier was taken out"):
        command.main(["mutate", f"{file}:f"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "none.py:f"], "there is no file none.py"),
        (["run", "none.py"], "names no function"),
        (["run", "tests/compiling.py:f"], "has no function f"),
        (["sweep", "--order", "sideways"], "invalid choice: 'sideways'"),
        (["run", "x.py:f", "--arch", "75"], "invalid choice: 75"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_words_are_named(words, message, monkeypatch, capsys):
    from tests.ptx.command import main

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert message in f"{end.value.code} {capsys.readouterr().err}"
