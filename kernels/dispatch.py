"""Which implementation of an operation runs, and its range on a profiler's timeline.

Every operation exists twice behind one signature: Triton for CUDA tensors, torch for any device. `impl="auto"` takes
Triton for CUDA tensors and torch elsewhere. Asking for Triton where it cannot run is an error, never a silent change.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
IMPLEMENTATIONS = ("auto", "triton", "torch")


@torch.compiler.assume_constant_result  # or it could not be traced
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1`), on CPU tensors too."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def resolve_impl(impl: str, device: torch.device) -> str:
    """What `impl` means for tensors on `device`: "triton" or "torch".

    Raises:
        ValueError: `impl` is none of "auto", "triton" and "torch"; or it is "triton" for tensors that are not on CUDA,
            outside Triton's interpreter.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}, but it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        return "triton" if device.type == "cuda" else "torch"
    if impl == "triton" and device.type != "cuda" and not interpreted():
        raise ValueError(f"impl = 'triton', but the tensors are on {device}: it needs CUDA, or TRITON_INTERPRET=1")
    return impl


def _device_of(args: tuple[Any, ...]) -> AbstractContextManager[Any]:
    first = next((x for x in args if isinstance(x, torch.Tensor)), None)
    return nullcontext() if first is None or not first.is_cuda else torch.cuda.device_of(first)


@functools.cache
def _annotate() -> Callable[..., Any] | None:
    """`nvtx.annotate`; None without the package, as on a bare machine with PyTorch: ranges change no result."""
    try:
        from nvtx import annotate
    except ModuleNotFoundError:
        return None
    return annotate


def input_precision() -> str:
    """For `tl.dot` of float32: "tf32" where torch's own products may round to it, else "ieee"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def ranged(name: str) -> Callable[[Function], Function]:
    """Decorator: an NVTX range round each call, with the first tensor's GPU as the current one, where Triton launches.

    Neither in a compiled graph: there the operations in it have their own.
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
