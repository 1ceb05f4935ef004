"""What the lanes of a warp do together: shuffles, reductions, bar.warp.sync.

Each of them waits for every lane of the warp. With lanes that are elsewhere (diverged, or ended) a GPU hangs or takes
garbage, so that stops the launch. A unit may hold several warps; those that are not active at all do not take part.
"""

from typing import Any

import numpy as np

from tests.ptx.storage import I8, EmulationError, Unsupported

EVERY_LANE = 0xFFFFFFFF
REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}


def active_warps(unit: Any, k: np.ndarray | None, mask: np.ndarray | None, instruction: Any) -> np.ndarray | None:
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


def shuffle(
    unit: Any, how: str, a: np.ndarray, b: np.ndarray, c: np.ndarray, mask: np.ndarray | None, k: np.ndarray | None,
    instruction: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """shfl.sync: (a of another lane, whether that lane is within the segment; otherwise the lane's own a)."""
    active_warps(unit, k, mask, instruction)
    lane = unit.lane_ids
    b, c = (b & np.uint32(31)).astype(I8), c.astype(I8)
    segment, clamp = (c >> 8) & 31, c & 31
    highest = (lane & segment) | (clamp & ~segment & 31)
    if how == "bfly":
        source = lane ^ b
        within = source <= highest
    elif how == "up":
        source = lane - b
        within = source >= highest
    elif how == "down":
        source = lane + b
        within = source <= highest
    else:
        source = (lane & segment) | (b & ~segment & 31)
        within = source <= highest
    source = np.where(within, source, lane)
    return a[unit.warp_starts + source], within


def reduce(unit: Any, how: str, a: np.ndarray, mask: Any, k: np.ndarray | None, instruction: Any) -> np.ndarray:
    """redux.sync: the sum, minimum or maximum over the warp, in every lane of it. Of floats, numbers win over NaN."""
    active_warps(unit, k, mask, instruction)
    operation = REDUCTIONS[how]
    if a.dtype.kind == "f":
        operation = {np.minimum: np.fmin, np.maximum: np.fmax}[operation]
    return np.repeat(operation.reduce(a.reshape(-1, 32), axis=1, dtype=a.dtype), 32)


def synchronise(unit: Any, k: np.ndarray | None, instruction: Any) -> None:
    """bar.warp.sync: what the lanes of a warp did before it is ordered before what they do next."""
    some = active_warps(unit, k, None, instruction)
    warps = unit.warps if some is None else unit.warps[some]
    if not unit.skip_warp_sync:
        unit.memory.races.end_lanes(warps)
