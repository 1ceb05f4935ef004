"""A CUDA device that is not there: tensors that say `cuda:0`, and a count of every wait and every launch of one.

`OnCuda` wraps a CPU tensor. Python code sees the device `cuda:0` and takes its road for CUDA; each operation runs on
the wrapped tensor. Of Triton's kernels only those run, in the interpreter, whose values decide what comes next: it is
slow. What the others should have written is 0. Below Python torch sees a device of its own, not the
CPU, so that mixing both is the error that it is on CUDA, and that autograd and `Tensor.to` behave as they do there.

A *wait* is what `torch.cuda.set_sync_debug_mode` warns about, judged from the operation and its arguments:

- a value read by the host: `item`, `bool`, `tolist`, an index that is a tensor of no dimension
- a size that depends on values: `nonzero`, an index that is a mask, `unique`, `repeat_interleave` without its size
- a copy to the host, unless it is `non_blocking` into pinned memory
- a copy to the device, unless it is `non_blocking`; an index on the CPU is such a copy
- `Event.synchronize` before the event was seen to have come, and `torch.cuda.synchronize`

A *launch* is an operation of torch that runs a kernel (no view, no empty tensor), or a kernel of Triton. Some of
torch's operations are several kernels on a GPU (`sort`, `cumsum`, `nonzero`), so a profiler shows more.

What it cannot see: a wait inside an operation of torch that this list does not name, allocations that wait, and what a
driver does with a large copy from memory that is not pinned.

`fake_cuda()` changes torch for the whole process, so it belongs into a process of its own (see `count_waits`).
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = Path(__file__).resolve().parents[1]
_setup_privateuseone_for_python_backend("below")
CUDA, CPU, BELOW = torch.device("cuda", 0), torch.device("cpu"), torch.device("below", 0)
DECIDE = ("_ctc_peaks_kernel", "_pack_frames_kernel")  # kernels whose results the host reads
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal}
SIZES = {
    aten.nonzero, aten.nonzero_numpy, aten.masked_select, aten.unique_dim, aten.unique_consecutive, aten._unique,
    aten._unique2, aten.unique_dim_consecutive, aten.bincount, aten._ctc_loss,
}  # fmt: skip
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
COPIES = {aten._to_copy, aten.copy_}
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
WITHOUT_KERNEL = EMPTY | {
    aten.detach, aten.detach_,
    aten._unsafe_view, aten.resize_, aten.lift_fresh, aten.set_, aten.is_same_size, aten._local_scalar_dense,
    aten.split_with_sizes, aten.unsafe_split,
}  # fmt: skip


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on `cuda:0`."""

    _data: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> "OnCuda":
        self = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype, device=BELOW
        )
        self._data = data.detach()
        return self

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def get_device(self) -> int:
        return 0

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class Log:
    """What happened on the device: `waits` and `launches`, by kind and by the line that asked for them."""

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[tuple[str, str]] = Counter()

    def wait(self, what: str) -> None:
        self.waits[what, _line()] += 1

    def launch(self, what: str) -> None:
        self.launches[what, _line()] += 1

    def copy(self) -> "Log":
        other = Log()
        other.waits, other.launches = self.waits.copy(), self.launches.copy()
        return other

    def since(self, earlier: "Log") -> "Log":
        """What has happened since `earlier`, a copy of this log."""
        other = Log()
        other.waits, other.launches = self.waits - earlier.waits, self.launches - earlier.launches
        return other


_log, _runs = Log(), frozenset()


def _line() -> str:
    """The innermost line of this package on the stack, and that of a library below it: `kernels/ctc.py, ctc_nll`."""
    frame, library = sys._getframe(1), ""
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith((str(ROOT / "kernels"), str(ROOT / "soundwave"))):
            return f"`{Path(path).relative_to(ROOT)}` {frame.f_code.co_name}{library}"
        for name in ("transformers", "accelerate"):
            if f"/site-packages/{name}/" in path and not library:
                library = f" ({name}: {frame.f_code.co_name})"
        frame = frame.f_back
    return f"no line of this package{library}"


def _on_cuda(x: Any) -> bool:
    return isinstance(x, OnCuda)


def _below(x: Any) -> Any:
    """A device in place of `cuda`; anything else as it is."""
    if isinstance(x, str):
        return BELOW if x == "cuda" or x.startswith("cuda:") else x
    return BELOW if isinstance(x, torch.device) and x.type == "cuda" else x


def _unwrap(x: Any) -> Any:
    if isinstance(x, torch.device) and x == BELOW:
        return CPU
    return x._data if _on_cuda(x) else x


def _wait_of(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out_on_cuda: bool) -> str | None:
    """What the host waits for in this operation; None if it does not."""
    first = args[0] if args else None
    if name in COPIES:
        source = args[1] if name is aten.copy_ else first
        to_device = _on_cuda(first) if name is aten.copy_ else out_on_cuda
        non_blocking = kwargs.get("non_blocking", name is aten.copy_ and len(args) > 2 and args[2])
        if _on_cuda(source) and not to_device:
            # Tensor.to(non_blocking=True) makes a pinned result itself.
            pinned = name is aten._to_copy or hasattr(first, "_pinned")
            return None if non_blocking and pinned else "copy to the host"
        return "copy to the device" if to_device and not _on_cuda(source) and not non_blocking else None
    if not any(map(_on_cuda, tree_leaves((args, kwargs)))):
        return None
    if name in READS:
        return "value read by the host"
    if name in SIZES or (name is aten.repeat_interleave and kwargs.get("output_size") is None):
        return f"size of {name.__name__}"
    if name in INDEXED:
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return "size of a mask"
        if not all(map(_on_cuda, indices)):
            return "copy of an index to the device"
    return None


def _mixed(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether tensors of both devices meet. Numbers, tensors of no dimension on the CPU, may."""
    if name in COPIES or name in INDEXED:
        return False
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return any(map(_on_cuda, tensors)) and any(not _on_cuda(x) and x.dim() for x in tensors)


def _run(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if operation.namespace == "soundwave":  # our own operations see the device
        function = torch._library.custom_ops.OPDEFS[operation._name.partition(".")[0]]._init_fn
        with _Translate(), _Below():
            return function(*args, **kwargs)
    with _Below():  # without autograd torch shows what is made of other operations before it takes it apart
        out = operation.decompose(*args, **kwargs)
    if out is not NotImplemented:
        return out
    name, device = operation.overloadpacket, kwargs.get("device")
    on_cuda = any(map(_on_cuda, tree_leaves((args, kwargs)))) if device is None else torch.device(device) == BELOW
    if wait := _wait_of(name, args, kwargs, on_cuda):
        _log.wait(wait)
    if _mixed(name, args, kwargs):
        raise RuntimeError(f"{operation}: tensors on cuda:0 and on cpu")
    plain = {key: _unwrap(value) for key, value in kwargs.items() if key != "pin_memory"}
    args_, kwargs_ = tree_map(_unwrap, (args, plain))
    if name in INDEXED:
        args_ = (args_[0], [x for x in args_[1]], *args_[2:])
    if "out_dtype" in kwargs_ or operation._overloadname == "dtype":  # the CPU has no product of this kind
        out = _product(name, args_, kwargs_)
    else:
        out = operation(*args_, **kwargs_)
    something = any(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
    if (on_cuda or wait) and something and not operation.is_view and name not in WITHOUT_KERNEL:
        _log.launch(name.__name__)
    if name in EMPTY:
        out.zero_()  # where a kernel that does not run should have written
    if on_cuda:
        out = tree_map(lambda x: OnCuda(x) if isinstance(x, torch.Tensor) else x, out)
    out = return_and_correct_aliasing(operation, args, kwargs, out)
    if kwargs.get("pin_memory"):
        out._pinned = True
    return out


def _product(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """mm, bmm and baddbmm with `out_dtype`, whose products are exact in float32."""
    *tensors, dtype = args if "out_dtype" not in kwargs else (*args, kwargs["out_dtype"])
    return getattr(torch, name.__name__)(*(x.to(dtype) for x in tensors))


class _Below(TorchDispatchMode):
    """Sees what no tensor of the device is an argument of, such as `torch.arange(3, device="cuda")`."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class _Translate(TorchFunctionMode):
    """Python's `cuda` becomes the device below."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("tensor", "as_tensor", "new_tensor"):
            return _made_of_values(name, args, dict(kwargs or {}))
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if name == "tolist" and _on_cuda(args[0]):
            return args[0].cpu().tolist()
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            return args[0].to(BELOW)
        return function(*tree_map(_below, args), **{k: _below(v) for k, v in (kwargs or {}).items()})


def _made_of_values(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.tensor`, `torch.as_tensor` and `Tensor.new_tensor`: made on the CPU and copied, which waits."""
    device = kwargs.pop("device", None)
    if name == "new_tensor":
        like, *args = args
        kwargs.setdefault("dtype", like.dtype)
        device = device or like.device
    if name == "as_tensor" and isinstance(args[0], torch.Tensor):
        return args[0].to(device=_below(device or args[0].device), **kwargs)
    made = torch.tensor(*args, **kwargs)
    return made if device is None else made.to(_below(device))


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """In its parts: torch chooses a kernel by the device, which is not CUDA below."""
    return aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]


class _Event:
    """An event that has come as soon as it is asked."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen = False

    def record(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        self.seen = True
        return True

    def synchronize(self) -> None:
        if not self.seen:
            _log.wait("event")


def _launch(kernel: Any) -> Any:
    run = kernel.run

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _log.launch(self.fn.__name__)
        if self.fn.__name__ not in _runs:
            return None
        return run(self, *tree_map(_unwrap, args), **{key: _unwrap(value) for key, value in kwargs.items()})

    return call


def prepare() -> None:
    """Change torch and Triton for this process."""
    from triton.runtime.interpreter import InterpretedFunction

    InterpretedFunction.run = _launch(InterpretedFunction)
    torch.cuda._lazy_init = lambda: None
    torch.cuda.Event = _Event
    torch.cuda.device_of = lambda _: nullcontext()
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.synchronize = lambda *_: _log.wait("torch.cuda.synchronize")


def to_cuda(x: Any) -> Any:
    """A tensor, or the parameters and buffers of a module in place, on the device; without counting that."""
    if isinstance(x, torch.nn.Module):
        for module in x.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(OnCuda(parameter.data), parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = OnCuda(buffer)
        return x
    return OnCuda(x.detach()).requires_grad_(x.requires_grad)


@contextmanager
def fake_cuda(run: Iterable[str] = DECIDE) -> Iterator[Log]:
    """Within it `cuda` is the device that is not there; yields the log of what happens. `run`: kernels that run."""
    global _log, _runs
    before, (_log, _runs) = (_log, _runs), (Log(), frozenset(run))
    with _Translate(), _Below():
        yield _log
    _log, _runs = before
