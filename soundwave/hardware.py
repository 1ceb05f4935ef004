"""The device and dtype that this machine uses, with the reasons, and its memory."""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil
import torch

GIB = 2**30
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20  # an option of glibc's mallopt; bytes


class OutOfMemory(RuntimeError):
    """The memory of the device or of the machine did not suffice. The message is one line: for what, and what to do."""


def free_bytes(device_type: str, root: Path = Path("/")) -> int:
    """Memory in bytes that is free on the GPU, or that this machine, or its container, can give to this process.

    Args:
        device_type: "cuda" or "cpu".
        root: the folder that holds `proc` and `sys`, where Linux tells of the limits of containers.
    """
    if device_type == "cuda":
        # What torch holds without using it can be given to new tensors.
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min([psutil.virtual_memory().available, *_free_in_cgroups(root)])


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """Free memory in bytes of each control group (version 1 or 2) of this process that has a limit.

    The file cache, which is counted as used, is given back when memory is wanted.
    """
    for line in _text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:
            mounts, limit, used, prefix = ("", "unified"), "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mounts, limit, used, prefix = ("memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        for mount in mounts:
            # Each group above has a limit of its own. In a container the path may be that of the host, and the
            # container's own group is at the root.
            parts = Path(group.lstrip("/")).parts
            for depth in range(len(parts), -1, -1):
                folder = root.joinpath("sys/fs/cgroup", mount, *parts[:depth])
                sizes = [_text_of(folder / file).strip() for file in (limit, used)]
                if all(size.isdecimal() for size in sizes):  # not "max"
                    stat = dict(line.split(" ", 1) for line in _text_of(folder / "memory.stat").splitlines())
                    cached = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
                    yield max(0, int(sizes[0]) - max(0, int(sizes[1]) - cached))


def _text_of(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # another system, or no such control group
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is what torch or Python raise without memory; on a CPU torch has no type of its own for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("allocate memory", "unable to mmap", "out of memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (RuntimeError, OSError)) and any(word in str(error) for word in words)


@contextmanager
def memory_named(part: str, advice: str) -> Iterator[None]:
    """Raise OutOfMemory with what was being done, and the advice, in place of torch's own errors of many lines."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {part}; {advice}") from error


def keep_memory_flat() -> None:
    """Let a CPU's memory stay as it is while recordings of ever new lengths are read; for a process of its own.

    oneDNN and torch's layer above it make a program for each shape of a product and keep 1024 of them: hundreds of MiB
    in the first hour. What a batch needs are some dozens. Both read these limits at the first product. And glibc
    learns to keep large blocks for later, which tear its heap to pieces; here they go back to the system.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def pick_device() -> tuple[torch.device, str]:
    """The device that training and inference use, and the reason in words."""
    if torch.cuda.is_available():
        return torch.device("cuda"), f"{torch.cuda.get_device_name()} was found"
    return torch.device("cpu"), "no CUDA device was found"


@cache
def pick_dtype(device_type: str) -> tuple[torch.dtype, str]:
    """The backbones' dtype on a device, and the reason in words.

    With bfloat16 instructions a CPU is several times faster in bfloat16 than in float32, without them several times
    slower. So a short timing decides.
    """
    if device_type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in bfloat16"
        return torch.float32, "the GPU has no bfloat16"
    seconds = {dtype: product_seconds(dtype, patience=0.1) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    dtype = torch.bfloat16 if ratio > 1.2 else torch.float32
    return dtype, f"a bfloat16 product runs {ratio:.1f} x as fast as a float32 one on this CPU"


def product_seconds(dtype: torch.dtype, *, patience: float = 1.0) -> float:
    """Seconds of a product [160, 576] x [576, 1536], as in the MLP of a small language model, on one CPU thread.

    It is the fastest of the products that are done within `patience` seconds. One thread is used and the product is
    short, because other programs then interrupt few of the products: the fastest one shows the machine's own speed.
    """
    generator = torch.Generator().manual_seed(0)  # so that later random draws do not depend on this timing
    x, weight = (torch.randn(rows, 576, generator=generator).to(dtype) for rows in (160, 1536))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best, end = float("inf"), time.perf_counter() + patience
        while (start := time.perf_counter()) < end:
            x @ weight.T
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best
