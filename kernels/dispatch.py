"""Which implementation of an operation runs, and its range on a profiler's timeline.

Every operation exists twice behind one signature: Triton for CUDA tensors, torch for any device. `impl="auto"` takes
Triton for CUDA tensors and torch elsewhere. Asking for Triton where it cannot run is an error, never a silent change.
"""

import functools
from collections.abc import Callable
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


@functools.cache
def _annotate() -> Callable[..., Any] | None:
    """`nvtx.annotate`; None without the package, as on a bare machine with PyTorch: ranges change no result."""
    try:
        from nvtx import annotate
    except ModuleNotFoundError:
        return None
    return annotate


def ranged(name: str) -> Callable[[Function], Function]:
    """Decorator: an NVTX range round each call, but none in a compiled graph: there its operations have their own."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or (annotate := _annotate()) is None:
                return function(*args, **kwargs)
            with annotate(name, domain="soundwave"):
                return function(*args, **kwargs)

        return call

    return decorate
