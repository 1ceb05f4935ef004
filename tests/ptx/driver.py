"""A Triton driver whose GPU is the emulator: kernels launched on CPU tensors are compiled for a card, then emulated.

    with emulated(86, order="reverse") as log:
        ...any call that launches Triton kernels on CPU tensors...
    assert not log.findings

What it leans on (triton 3.7.1, pinned in constraints.txt; look here first when a newer one fails):

- `triton.runtime.driver`: `active` and `set_active`, and of the active driver what `EmulatedDriver` defines.
  `load_binary` gets the kernel's binary; what it returns as the function comes back in each launch.
  `launcher_cls(source, metadata)` is called with the grid, stream, function, two metadata, two hooks, and all of the
  kernel's arguments.
- `triton.knobs.runtime.add_stages_inspection_hook`, a hook that may change the stages of a compilation: the one from
  PTX to a cubin (ptxas) is replaced by one that keeps the PTX, so the PTX is the binary. Its key is part of the key of
  Triton's caches, so nobody else finds what was compiled so.
- `source.signature`: type of each argument ("*bf16", "i32", "constexpr").

`emulated` says what is missing where that can be seen. Everything is as before when it ends, also by an error.
"""

import ctypes
import hashlib
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.compiling import SHARED_KB
from tests.ptx import Allocation, EmulationError, Launch, Unsupported, program

# The schedules that kernels are run under, as settings of `Launch`.
ORDERS: dict[str, dict[str, Any]] = {
    "lockstep": {"lockstep": True},
    "forward": {"lockstep": False, "order": "forward"},
    "reverse": {"lockstep": False, "order": "reverse"},
    "random": {"lockstep": False, "order": "random", "preempt": True},
    "lanes": {"lockstep": True, "lanes": True},
    "noise": {"lockstep": True, "noise": True},
}
PACKED = {
    "i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I",
    "u64": "<Q", "fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d",
}  # fmt: skip
PTX_STAGE = "the PTX is the binary"


class Finding(NamedTuple):
    kernel: str
    kind: str  # "race", "bounds", "uninit", ...
    text: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind}: {self.text}"


class Launched(NamedTuple):
    """One launch that was emulated. `memory` is a hash of all that its tensors held afterwards, if asked for."""

    kernel: str
    compiled: "Compiled"
    grid: tuple[int, int, int]
    num_warps: int
    report: Any
    seconds: float
    memory: bytes


class Log:
    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.findings: list[Finding] = []


class Prepared:
    """One launch that can be run any number of times, on the memory of the tensors that it got."""

    def __init__(self, compiled: "Compiled", grid, metadata, params, allocations, settings) -> None:
        self.compiled, self.grid, self.num_warps, self.settings = compiled, grid, metadata.num_warps, settings
        self.shared, self.params, self.allocations = metadata.shared, params, allocations

    def launch(self, **settings: Any) -> Launch:
        return Launch(
            self.compiled.program, self.grid, 32 * self.num_warps, self.shared, self.params, self.allocations,
            **self.settings | settings,
        )  # fmt: skip

    def memory(self) -> list[bytes]:
        return [ctypes.string_at(a.base, a.nbytes) for a in self.allocations]

    def restore(self, memory: list[bytes]) -> None:
        for allocation, content in zip(self.allocations, memory, strict=True):
            ctypes.memmove(allocation.base, content, allocation.nbytes)


class Compiled:
    """What stands for a loaded function: the text of the PTX, its translation, and a name for this text."""

    def __init__(self, ptx: str) -> None:
        self.ptx, self.program = ptx, program(ptx)
        self.variant = hashlib.blake2b(ptx.encode(), digest_size=6).hexdigest()


class Utils:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": 1024 * SHARED_KB[self.arch], "multiprocessor_count": 100, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: str):
        """Module, function, registers, spills, most threads a block."""
        return object(), Compiled(binary.decode()), 0, 0, 1024


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature, self.metadata = list(source.signature.items()), metadata
        for name, wanted in (("num_ctas", 1), ("global_scratch_size", 0), ("profile_scratch_size", 0)):
            if (getattr(metadata, name, None) or wanted) != wanted:
                raise Unsupported(f"{source.name}: {name} = {getattr(metadata, name)}, but the emulator takes {wanted}")

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments) -> None:
        kernel, names, sizes, values = function.program.kernel, {}, {}, []
        for (name, kind), value in zip(self.signature, arguments, strict=True):
            if kind == "constexpr":
                continue
            if kind in PACKED:
                values.append(struct.pack(PACKED[kind], value))
            elif kind.startswith("*") and value is None:
                values.append(struct.pack("<Q", 0))
            elif kind.startswith("*") and isinstance(value, torch.Tensor) and value.device.type == "cpu":
                storage = value.untyped_storage()
                if storage.nbytes():
                    names.setdefault(storage.data_ptr(), []).append(name)
                    sizes[storage.data_ptr()] = storage.nbytes()
                values.append(struct.pack("<Q", value.data_ptr()))
            else:
                raise Unsupported(f"{kernel.name}: argument {name} of type {kind} is {type(value).__name__}")
        values += [struct.pack("<Q", 0)] * (len(kernel.params) - len(values))  # scratch memory that is not used
        params = {name: value for (name, _), value in zip(kernel.params, values, strict=True)}
        allocations = [Allocation(base, size, "/".join(names[base])) for base, size in sizes.items()]
        driver = triton.runtime.driver.active
        driver.run(Prepared(function, (x, y, z), self.metadata, params, allocations, driver.settings))


class EmulatedDriver(DriverBase):
    launcher_cls = Launcher

    def __init__(self, arch: int, hashes: bool, on_launch: Callable[[Prepared], Any], settings: dict[str, Any]) -> None:
        self.arch, self.hashes, self.on_launch, self.settings = arch, hashes, on_launch, settings
        self.utils, self.log = Utils(arch), Log()

    def run(self, prepared: Prepared) -> None:
        name, start = prepared.compiled.program.kernel.name, time.perf_counter()
        try:
            report = self.on_launch(prepared)
        except EmulationError as error:
            kind, _, text = str(error).partition(": ")
            self.log.findings.append(Finding(name, *(("error", kind) if not text else (kind, text))))
            raise
        seconds, digest = time.perf_counter() - start, hashlib.blake2b()
        for content in prepared.memory() if self.hashes else ():
            digest.update(content)
        self.log.findings += [Finding(name, *found) for found in report.findings]
        self.log.launches.append(
            Launched(name, prepared.compiled, prepared.grid, prepared.num_warps, report, seconds, digest.digest())
        )

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton never chooses it by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"emulated sm_{self.arch}"  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError(
            "the emulator's time says nothing about a GPU's, so it cannot autotune: launch KERNEL.fn[grid](...), with "
            "the settings of one configuration, in the place of KERNEL[grid](...)"
        )


def _keep_ptx(backend=None, stages=None, options=None, language=None, capability=None):
    """Triton's hook for the stages of a compilation; without arguments the two keys of its caches."""
    if stages is None:
        return PTX_STAGE, PTX_STAGE
    if "cubin" not in stages:
        raise RuntimeError(f"Triton compiles in the stages {', '.join(stages)}, but one named cubin is to be replaced")
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


def _check_triton() -> None:
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so Triton compiles nothing. Start Python without it.")
    for owner, name in ((triton.runtime.driver, "set_active"), (knobs.runtime, "add_stages_inspection_hook")):
        if not hasattr(owner, name):
            raise RuntimeError(
                f"triton {triton.__version__} has no {name}. The emulated driver was written for the version that "
                f"constraints.txt pins; see the beginning of {__file__}."
            )


@contextmanager
def emulated(
    arch: int, *, hashes: bool = False, on_launch: Callable[[Prepared], Any] | None = None, **settings: Any
) -> Iterator[Log]:
    """Triton compiles for `arch` (86 means sm_86) and runs its kernels on CPU tensors in the emulator.

    Args:
        hashes: keep a hash of the memory after each launch, to compare orders with.
        on_launch: called with each launch in place of `launch().run()`, whose report it returns.
        settings: of `Launch`, such as those of `ORDERS`.
    """
    _check_triton()
    if arch not in SHARED_KB:
        raise ValueError(f"arch = {arch}, but it must be one of {', '.join(map(str, SHARED_KB))}")
    driver = EmulatedDriver(arch, hashes, on_launch or (lambda prepared: prepared.launch().run()), settings)
    try:
        before = triton.runtime.driver.active
    except RuntimeError:  # there is no GPU
        before = None
    hook = knobs.runtime.add_stages_inspection_hook
    triton.runtime.driver.set_active(driver)
    knobs.runtime.add_stages_inspection_hook = _keep_ptx
    try:
        yield driver.log
    finally:
        triton.runtime.driver.set_active(before)
        knobs.runtime.add_stages_inspection_hook = hook
