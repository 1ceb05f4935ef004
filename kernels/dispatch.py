"""Which implementation of an operation runs, and its NVTX range on a profiler's timeline.

Every operation exists twice with one signature: in Triton for CUDA tensors, and in torch for any device. `impl="auto"`
takes Triton for CUDA tensors and torch elsewhere. `impl="triton"` where Triton cannot run is an error, so that nothing
is replaced silently.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
IMPLEMENTATIONS = ("auto", "triton", "torch")


def _constant_in_graphs(function: Function) -> Function:
    """Decorator: torch.compile takes the result as a constant, because Triton's knobs cannot be traced.

    torch.compiler.assume_constant_result does the same, but imports torch._dynamo: two seconds at each start.
    """
    function._dynamo_marked_constant = True
    return function


@_constant_in_graphs
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1`), on CPU tensors too."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@_constant_in_graphs
def runs_on_cpu() -> bool:
    """Whether Triton runs kernels on CPU tensors: in its interpreter, or by a driver whose device is the CPU."""
    if interpreted():
        return True
    from triton.runtime import driver

    try:
        return driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # no driver, because there is no GPU
        return False


def architecture(device: torch.device) -> int:
    """The compute capability that kernels on `device` are compiled for: 86 is sm_86, 80 stands for the interpreter."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if interpreted():
        return 80
    from triton.runtime import driver

    return driver.active.get_current_target().arch


def resolve_impl(impl: str, device: torch.device) -> str:
    """What `impl` means for tensors on `device`: "triton" or "torch".

    Raises:
        ValueError: `impl` is not "auto", "triton" or "torch"; or it is "triton", the tensors are not on CUDA, and
            Triton runs nothing on the CPU (see `runs_on_cpu`).
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}, but it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        return "triton" if device.type == "cuda" else "torch"
    if impl == "triton" and device.type != "cuda" and not runs_on_cpu():
        raise ValueError(f"impl = 'triton', but the tensors are on {device}: it needs CUDA, or TRITON_INTERPRET=1")
    return impl


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device`. From the CPU to a GPU the host does not wait until the GPU has come so far."""
    if x.device == device:
        return x
    if x.device.type != "cpu":
        return x.to(device)
    # Without the copy, pinned memory would be read later, when the caller may have changed it.
    x = x.clone()
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        x = x.pin_memory()  # torch refuses to capture a copy of other memory
        _of_graphs.append(x)
    return x.to(device, non_blocking=True)


_of_graphs: list[torch.Tensor] = []  # a CUDA graph sends these again whenever it is replayed, so they have to stay


def to_device_together(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of integers or bools on the CPU, sent to `device` as int64 in one copy; those on it stay as they are.

    Each begins at a multiple of 128 bytes, because Triton compiles another kernel for pointers that are less aligned.
    """
    if all(x.device == device for x in tensors):
        return list(tensors)
    padded = [torch.nn.functional.pad(x.flatten().to(torch.int64), (0, -x.numel() % 16)) for x in tensors]
    sent = to_device(torch.cat(padded), device).split([len(x) for x in padded])
    return [part[: x.numel()].view(x.shape) for part, x in zip(sent, tensors, strict=True)]


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    first = next((x for x in args if isinstance(x, torch.Tensor)), None)
    return nullcontext() if first is None or not first.is_cuda else torch.cuda.device_of(first)


@functools.cache
def _annotate() -> Callable[..., Any] | None:
    """`nvtx.annotate`; None if the package is not installed, because ranges are optional."""
    try:
        from nvtx import annotate
    except ModuleNotFoundError:
        return None
    return annotate


def input_precision() -> str:
    """Precision of `tl.dot` for float32: "tf32" if torch's own products may use it, else "ieee"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def ranged(name: str) -> Callable[[Function], Function]:
    """Decorator: puts each call in an NVTX range, and makes the GPU of the first tensor current, as Triton needs it.

    While `torch.compile` traces a graph it does neither: each operation in the graph opens its range when it runs.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            annotate = _annotate()
            range_ = nullcontext() if annotate is None else annotate(name, domain="soundwave")
            with range_, _device_of(args):
                return function(*args, **kwargs)

        return call

    return decorate
