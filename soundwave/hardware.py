"""The device and dtype that this machine uses, with the reasons, and its memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import psutil
import torch

GIB = 2**30


class OutOfMemory(RuntimeError):
    """The memory of the device or of the machine did not suffice. The message is one line: for what, and what to do."""


def free_bytes(device_type: str) -> int:
    """Memory in bytes that is free on the GPU, or that this machine can give to a process."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is what torch or Python raise without memory; on a CPU torch has no type of its own for it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("can't allocate memory", "unable to mmap", "CUDA out of memory", "Cannot allocate memory")
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
