"""What the lanes of a warp do together: shuffles, reductions, bar.warp.sync.

Each of them waits for every lane of the warp. With lanes that are elsewhere (diverged, or ended) a GPU hangs or takes
garbage, so that stops the launch. A unit may hold several warps; those that are not active at all do not take part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.storage import I8, EmulationError, Unsupported

if TYPE_CHECKING:
    from tests.ptx.parser import Instruction
    from tests.ptx.schedule import Unit

EVERY_LANE = 0xFFFFFFFF
REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}


def active_warps(
    unit: Unit, k: np.ndarray | None, mask: np.ndarray | None, instruction: Instruction
) -> np.ndarray | None:
    """Which warps of the unit take part, as bools; None for all of them.

    Args:
        k: active lanes, None for all.
        mask: the lanes that each lane waits for; None for all lanes of its warp.
    """
    if mask is not None and ((mask if k is None else mask[k]) != EVERY_LANE).any():
        raise Unsupported(f"{instruction}: of some lanes of a warp")
    if k is None:
        return None
    by_warp = k.reshape(-1, 32)
    some, every = by_warp.any(1), by_warp.all(1)
    if (some & ~every).any():
        raise EmulationError(f"diverged: {instruction}: {int(by_warp[some & ~every][0].sum())} of 32 lanes are there")
    return some


def sources(unit: Unit, how: str, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([lanes] place in the unit of the lane that each lane reads, whether that is within its segment)."""
    lane, b, c = unit.lane_ids, (b & np.uint32(31)).astype(I8), c.astype(I8)
    segment, clamp = (c >> 8) & 31, c & 31
    last = (lane & segment) | (clamp & ~segment & 31)
    match how:
        case "bfly":
            source = lane ^ b
        case "up":
            source = lane - b
        case "down":
            source = lane + b
        case _:
            source = (lane & segment) | (b & ~segment & 31)
    within = source >= last if how == "up" else source <= last
    return unit.warp_starts + np.where(within, source, lane), within


def shuffle(
    unit: Unit,
    how: str,
    a: np.ndarray,
    b: Any,
    c: Any,
    mask: np.ndarray | None,
    k: np.ndarray | None,
    instruction: Instruction,
) -> tuple[np.ndarray, np.ndarray]:
    """shfl.sync: (a of another lane, whether that lane is within the segment; otherwise the lane's own a).

    b and c are arrays, or two numbers that are the same for all lanes.
    """
    active_warps(unit, k, mask, instruction)
    if not isinstance(b, int):
        source, within = sources(unit, how, b, c)
        return a[source], within
    if (how, b, c) not in unit.lane_maps:
        unit.lane_maps[how, b, c] = sources(unit, how, np.uint32(b), np.uint32(c))
    source, within = unit.lane_maps[how, b, c]
    return a[source], within


def reduce(
    unit: Unit, how: str, a: np.ndarray, mask: Any, k: np.ndarray | None, instruction: Instruction
) -> np.ndarray:
    """redux.sync: the sum, minimum or maximum over the warp, in every lane of it. Of floats, numbers win over NaN."""
    active_warps(unit, k, mask, instruction)
    operation = REDUCTIONS[how]
    if a.dtype.kind == "f":
        operation = {np.minimum: np.fmin, np.maximum: np.fmax}[operation]
    return np.repeat(operation.reduce(a.reshape(-1, 32), axis=1, dtype=a.dtype), 32)


def synchronise(unit: Unit, k: np.ndarray | None, instruction: Instruction) -> None:
    """bar.warp.sync: what the lanes of a warp did before it is ordered before what they do next."""
    some = active_warps(unit, k, None, instruction)
    warps = unit.warps if some is None else unit.warps[some]
    if not unit.skip_warp_sync:
        unit.memory.races.end_lanes(warps)
