"""Values an operation cannot accept: raised at once where they lie on the CPU, later where they lie on CUDA.

To look at a CUDA tensor the CPU has to wait for the GPU. So the first offender is found on the device and copied
without waiting; its ValueError comes at backward or at the next call, whichever is the first to find the copy there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Message = str | Callable[..., str]
_pending: list[tuple[torch.cuda.Event, Tensor, Message, torch.Size]] = []


def _raise(place: int, value: int, message: Message, shape: torch.Size) -> None:
    where = (place,) if len(shape) == 1 else divmod(place, shape[1])
    if isinstance(message, str):
        raise ValueError(message.format(place=", ".join(map(str, where)), value=value))
    raise ValueError(message(*where, value))


def raise_pending(wait: bool = False) -> None:
    """Raise what earlier calls on CUDA found, as far as it has arrived; with `wait`, all of it."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return  # while a CUDA graph is captured, no event may be asked
    while _pending and (wait or _pending[0][0].query()):
        event, found, message, shape = _pending.pop(0)
        event.synchronize()
        place, value = found.tolist()
        if place < shape.numel():
            _raise(place, value, message, shape)


def report(values: Tensor, wrong: Tensor, message: Message, validate: bool = False) -> None:
    """ValueError for the first of the integers `values` [N] or [N, M] that is `wrong`.

    At once on the CPU or with `validate`, else later. `message` may hold `{value}` and `{place}`, the offender's index;
    or it is a function of index and value. While a CUDA graph is captured, nothing is checked.
    """
    if not values.is_cuda:
        if wrong.any():
            place = int(wrong.flatten().to(torch.uint8).argmax())
            _raise(place, int(values.flatten()[place]), message, values.shape)
    elif values.numel() and not torch.cuda.is_current_stream_capturing():
        last = values.numel() - 1
        places = torch.arange(last + 1, device=values.device)
        place = torch.where(wrong.flatten(), places, last + 1).min()
        found = torch.stack([place, values.flatten()[place.clamp(max=last)].to(torch.int64)])
        host = torch.empty(2, dtype=torch.int64, pin_memory=True).copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _pending.append((event, host, message, values.shape))
        if validate:
            raise_pending(wait=True)
