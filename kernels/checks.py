"""Errors of the operations: wrong values, and derivatives that do not exist.

A wrong value on the CPU is a ValueError at once. To read a CUDA tensor the CPU would have to wait for the GPU. So the
GPU finds the first wrong value and copies it to the CPU without waiting. The ValueError comes at backward or at the
next call, as soon as one of them finds that the copy has arrived.

No operation here has forward-mode or second derivatives, nor those of `torch.func`. They are refused, because autograd
would otherwise take them for 0, or end in an error that names neither the operation nor what to do.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Message = str | Callable[..., str]
_pending: list[tuple[torch.cuda.Event, Tensor, Message, torch.Size]] = []


def _raise(place: int, value: int, message: Message, shape: torch.Size) -> None:
    where: list[int] = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        where.insert(0, at)
    if isinstance(message, str):
        raise ValueError(message.format(place=", ".join(map(str, where)), value=value))
    raise ValueError(message(*where, value))


def as_integers(tensor: Tensor) -> Tensor:
    """A tensor of another integer dtype, such as int16 or uint8, as int64, as torch's own losses take it."""
    if tensor.dtype in (torch.int64, torch.int32):
        return tensor
    other = tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized or tensor.dtype == torch.bool
    return tensor if other else tensor.to(torch.int64)


def as_lengths(name: str, lengths: Tensor | Sequence[int]) -> Tensor:
    """A sequence as a tensor on the CPU, whatever torch's default device is; integers as int32 or int64.

    The shape is not checked, and of the dtype nothing but that.

    Raises:
        TypeError: torch can make no tensor of it.
    """
    if isinstance(lengths, Tensor):
        return as_integers(lengths)
    try:
        found = torch.tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} = {lengths!r}, but it must be a tensor or a sequence of integers") from None
    return as_integers(found) if found.numel() else found.long()


def _func_transforms() -> set[Any]:
    """The kinds of `torch.func` transforms that are active here; nearly always none."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return set()
    return {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}


def _within_transforms(x: Tensor) -> Iterator[Tensor]:
    """`x` and what each active `torch.func` transform has wrapped."""
    yield x
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
        yield x


def needs_gradient(x: Tensor | None) -> bool:
    """Whether autograd asks for the gradient of `x`, also where `torch.func.vmap` hides that."""
    if x is None or not torch.is_grad_enabled():
        return False
    return x.requires_grad or bool(_func_transforms()) and any(part.requires_grad for part in _within_transforms(x))


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """NotImplementedError if a derivative of the operation `name` is asked for that it does not have.

    These are forward-mode tangents of `tensors`, which the operation would drop, and the gradients that `torch.func`
    takes. `torch.func.vmap` is let through.
    """
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError(f"{name}: forward-mode derivatives are not there; use reverse mode")
    if torch._C._functorch.TransformType.Grad in _func_transforms() and any(map(needs_gradient, tensors)):
        raise NotImplementedError(
            f"{name}: the derivatives of torch.func (grad, vjp, jacrev, hessian) are not there; "
            "use torch.autograd.grad or loss.backward()"
        )


def refuse_vmap(name: str, *tensors: Any) -> None:
    """NotImplementedError if `torch.func.vmap` runs over one of `tensors`, whose values the operation `name` reads."""
    if not _func_transforms():
        return
    if any(
        torch._C._functorch.is_batchedtensor(part)
        for x in tensors
        if isinstance(x, Tensor)
        for part in _within_transforms(x)
    ):
        raise NotImplementedError(f"{name}: torch.func.vmap is not there, because sizes depend on values; use a batch")


def no_second_derivative(name: str, *gradients: Any) -> None:
    """Make a second derivative of the operation `name` a RuntimeError.

    `gradients` are the custom operations that compute its gradient; none of them can be differentiated.
    """

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{name} has no second derivative: its gradient cannot be differentiated")

    for operation in gradients:
        operation.register_autograd(refuse)


def raise_pending(wait: bool = False) -> None:
    """Raise the errors of earlier calls on CUDA that have arrived; with `wait`, wait for all of them."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # events cannot be queried while a CUDA graph is captured
    while _pending and (wait or _pending[0][0].query()):
        event, found, message, shape = _pending.pop(0)
        event.synchronize()
        place, value = found.tolist()
        if place < shape.numel():
            _raise(place, value, message, shape)


def first_wrong(values: Tensor, wrong: Tensor) -> Tensor:
    """int64 [2] on the device of `values`: the place of the first wrong value, and the value. Nothing is read.

    If none is wrong, the place is the number of values.
    """
    count = values.numel()
    places = torch.arange(count, device=values.device)
    place = torch.where(wrong.flatten(), places, count).min().view(1)
    # A place of no dimension would be read by the host, which would wait for the GPU.
    value = values.flatten().index_select(0, place.clamp(max=count - 1))
    return torch.cat([place, value.to(torch.int64)])


def raise_or_defer(values: Tensor, wrong: Tensor, message: Message, validate: bool = False) -> None:
    """ValueError for the first of the integers `values` (any shape) that is `wrong` (bool, the same shape).

    It comes at once on the CPU or with `validate`, and later otherwise. `message` may contain `{value}` and `{place}`,
    the wrong value and its index; or it is a function of index and value. Nothing is checked while a CUDA graph is
    captured.
    """
    if not values.is_cuda:
        if wrong.any():
            place = int(wrong.flatten().to(torch.uint8).argmax())
            _raise(place, int(values.flatten()[place]), message, values.shape)
    elif values.numel() and not torch.cuda.is_current_stream_capturing():
        found = first_wrong(values, wrong)
        host = torch.empty(2, dtype=torch.int64, pin_memory=True).copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _pending.append((event, host, message, values.shape))
        if validate:
            raise_pending(wait=True)
