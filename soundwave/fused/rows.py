"""Packed rows: those of each utterance follow those of the utterance before, [N, ...] in place of padded [B, T, ...].

The host knows the lengths, and so where each row stands. Every operation takes either form.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.kernels.checks import as_lengths
from soundwave.kernels.dispatch import to_device


class Packed(NamedTuple):
    """Where packed rows stand among padded ones.

    lengths: int64 [B], on the CPU.
    place: int64 [N], the number of each row among the B·T padded ones, on the device of the rows. None if all
        utterances are equally long, so that it is the row's own number.
    longest: T, the rows of the longest utterance.
    """

    lengths: Tensor
    place: Tensor | None
    longest: int

    @classmethod
    def of(cls, name: str, rows: Tensor, lengths: Tensor | Sequence[int]) -> "Packed":
        """The places of `rows` [N, ...], which an error calls `name`. Lengths on CUDA cost one wait for the device.

        Raises:
            ValueError: lengths that are negative, or that do not add up to N.
        """
        lengths = as_lengths("lengths", lengths)
        if lengths.dim() != 1 or lengths.dtype not in (torch.int32, torch.int64) or lengths.is_meta:
            raise ValueError(f"lengths is {lengths.dtype} {list(lengths.shape)}, but packed rows need integers [B]")
        lengths = lengths.cpu().to(torch.int64)
        batch, longest = len(lengths), int(lengths.max()) if len(lengths) else 0
        if int(lengths.sum()) != len(rows) or (lengths < 0).any():
            raise ValueError(
                f"{name} has {len(rows)} packed rows, but lengths = {lengths.tolist()}: they must add up to the rows"
            )
        if len(rows) == batch * longest:
            return cls(lengths, None, longest)
        sequence, within = places_of(lengths)
        return cls(lengths, to_device(sequence * longest + within, rows.device), longest)

    def pad(self, rows: Tensor, value: float = 0.0) -> Tensor:
        """`rows` [N, ...] as [B, T, ...], with `value` past the lengths."""
        shape = (len(self.lengths), self.longest, *rows.shape[1:])
        if self.place is None:
            return rows.view(shape)
        return rows.new_full((shape[0] * shape[1], *shape[2:]), value).index_copy(0, self.place, rows).view(shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """`padded` [B, T, ...] as [N, ...]."""
        rows = padded.flatten(0, 1)
        return rows if self.place is None else rows.index_select(0, self.place)


def places_of(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Of each packed row its utterance and its number within it: int64 [N] twice, for int [B] on the CPU."""
    lengths = lengths.to(torch.int64)
    sequence = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    return sequence, torch.arange(len(sequence), device="cpu") - (lengths.cumsum(0) - lengths)[sequence]
