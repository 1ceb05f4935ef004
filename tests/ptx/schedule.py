"""Runs a program over a grid: blocks one after the other, the warps of a block in an order chosen to be unkind.

A GPU gives no order among warps but at barriers. Here they take turns: one warp runs until it waits at bar.sync or
ends, then another, always the first that can ("forward"), always the last ("reverse"), or any ("random"); with
`preempt` the turn changes after every basic block. Results that depend on the order show a missing barrier; and
`races.py` finds it in any order. So all warps of a block may also run together, as one wide array (`lockstep`), which
is several times faster.

Within a warp lanes run together. Where they part at a branch, one side runs first and the other then, and they meet
again at the nearest block that both sides lead through.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.ptx.arithmetic import Approximate
from tests.ptx.asynchronous import Copies
from tests.ptx.memory import GARBAGE, Allocation, Memory
from tests.ptx.races import Races, Report
from tests.ptx.storage import BITS, U4, EmulationError
from tests.ptx.tensor_cores import Products
from tests.ptx.translator import Program, is_barrier

ORDERS = ("forward", "reverse", "random")


class Unit:
    """Lanes that run together: a warp, or all of a block.

    Attributes:
        threads, lane_ids: [lanes] number of each thread in its block, and in its warp.
        warp_starts: [lanes] where in the unit each lane's warp begins.
        warps: [warps] their numbers in the block.
        registers: one array a register.
        alive: [lanes] those that have not ended.
        stack: sides of branches that are open, the innermost last: [block where they meet, next block, mask].
        waiting: next block behind the barrier at which it waits, or None.
    """

    def __init__(
        self, first: int, lanes: int, memory: Memory, approximate: Approximate, arguments: Any, skip_warp_sync: bool
    ):
        self.lanes, self.memory, self.approximate, self.arguments = lanes, memory, approximate, arguments
        self.skip_warp_sync = skip_warp_sync
        self.threads = np.arange(first, first + lanes)
        self.lane_ids = np.arange(lanes) % 32
        self.warp_starts = np.arange(lanes) - self.lane_ids
        self.warps = np.arange(first // 32, (first + lanes) // 32)
        self.lane_maps: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}  # of shuffles by constants
        self.registers: list[np.ndarray] = []
        self.begin_block()

    def begin_block(self) -> None:
        self.alive = np.ones(self.lanes, bool)
        self.stack: list[list] = [[-1, 0, None]]  # a mask of None is all lanes
        self.waiting = None
        self.copies, self.products = Copies(self.memory), Products()

    def parameter(self, name: str, offset: int, size: int) -> list[np.ndarray]:
        return self.arguments(name, offset, size, self.lanes)


class Launch:
    """One launch of a program.

    Args:
        program: from `program(ptx)`.
        grid: blocks in x, y and z.
        num_threads: threads of a block, a multiple of 32.
        shared: bytes of shared memory of a block.
        params: the bytes of each parameter, by its name in the PTX.
        allocations: storage that the kernel may touch.
        order: "forward", "reverse" or "random", of the warps, and of the blocks of the grid.
        preempt: another warp's turn after every basic block, not only at barriers.
        lockstep: all warps of a block together; order and preempt say nothing then of its warps.
        races: whether to look for them.
        lanes: whether to look for races between lanes of a warp, too.
        noise: approximate instructions err by as much as the manual allows.
        skip_barriers: numbers (in `program.barriers`) of barriers that do nothing: to see that they are missed.
        skip_warp_sync: bar.warp.sync does nothing.
        seed: of the random order.
        limit: instructions, of all warps, after which a launch is taken to hang.

    `run()` returns a Report: `findings` are pairs of a kind and a sentence. What leaves no sensible result raises
    EmulationError.
    """

    def __init__(
        self, program: Program, grid: tuple[int, int, int], num_threads: int, shared: int, params: dict[str, bytes],
        allocations: Sequence[Allocation], *, order: str = "forward", lockstep: bool = False, preempt: bool = False,
        races: bool = True, lanes: bool = False, noise: bool = False, skip_barriers: Sequence[int] = (),
        skip_warp_sync: bool = False, seed: int = 0, limit: int = 50_000_000,
    ):  # fmt: skip
        if order not in ORDERS:
            raise ValueError(f"order = {order!r}, wanted one of {ORDERS}")
        if num_threads % 32 or program.kernel.threads not in (None, num_threads):
            raise ValueError(f"num_threads = {num_threads}, but the kernel has .reqntid {program.kernel.threads}")
        self.program, self.grid, self.threads, self.params = program, grid, num_threads, params
        self.order, self.preempt, self.limit = order, preempt, limit
        self.skip = {program.barriers[i] for i in skip_barriers}
        self.random = np.random.default_rng(seed)
        self.report = Report()
        blocks = grid[0] * grid[1] * grid[2]
        self.races = Races(self.report, num_threads // 32, blocks, lanes, races)
        self.memory = Memory(
            list(allocations), shared, program.granules, self.races, self.report,
            asynchronous=program.asynchronous, proxied=program.proxied,
        )  # fmt: skip
        wide, approximate = num_threads if lockstep else 32, Approximate(noise)
        self._parameters: dict[tuple, list[np.ndarray]] = {}
        self.units = [
            Unit(first, wide, self.memory, approximate, self._parameter, skip_warp_sync)
            for first in range(0, num_threads, wide)
        ]
        self._start = self._first_registers(wide)

    def _parameter(self, name: str, offset: int, size: int, lanes: int) -> list[np.ndarray]:
        key = (name, offset, size)
        if key not in self._parameters:
            self._parameters[key] = [np.full(lanes, np.frombuffer(self.params[name], f"u{size}", 1, offset)[0])]
        return self._parameters[key]

    def _first_registers(self, lanes: int) -> list[np.ndarray]:
        """Garbage, and constants. No array of registers is ever written in place, so all may be the same."""
        garbage = {bits: np.full(lanes * bits // 8, GARBAGE, "u1").view(f"u{bits // 8}") for bits in (8, 16, 32, 64)}
        garbage[1] = np.ones(lanes, bool)
        registers = [garbage[BITS[kind]] for kind in self.program.kinds.values()]
        for (value, bits), index in self.program.constants.items():
            registers[index] = np.full(lanes, value, bool if bits == 1 else f"u{bits // 8}")
        return registers

    def _special(self, name: str, unit: Unit, block: tuple[int, int, int]) -> Any:
        base, _, axis = name.partition(".")
        a = "xyz".index(axis) if axis else 0
        match base:
            case "tid":
                return unit.threads if a == 0 else 0
            case "ntid":
                return self.threads if a == 0 else 1
            case "ctaid":
                return block[a]
            case "nctaid":
                return self.grid[a]
            case "laneid":
                return unit.lane_ids
        return unit.threads >> 5  # warpid

    def run(self) -> Report:
        nx, ny, nz = self.grid
        blocks = [(x, y, z) for z in range(nz) for y in range(ny) for x in range(nx)]
        if self.order == "reverse":
            blocks.reverse()
        elif self.order == "random":
            self.random.shuffle(blocks)
        with np.errstate(all="ignore"):
            for number, block in enumerate(blocks):
                self.races.block = number
                self._block(block)
        return self.report

    def _block(self, block: tuple[int, int, int]) -> None:
        self.memory.begin_block()
        for unit in self.units:
            unit.begin_block()
            unit.registers = list(self._start)
            for name, index in self.program.specials.items():
                value = np.asarray(self._special(name, unit, block), U4)
                unit.registers[index] = np.ascontiguousarray(np.broadcast_to(value, unit.lanes))
        while True:
            runnable = [unit for unit in self.units if unit.stack and unit.waiting is None]
            if runnable:
                self._run(self._next(runnable))
            elif any(unit.waiting is not None for unit in self.units):
                self._release()
            else:
                break
        self.races.end_stretch()

    def _next(self, runnable: list[Unit]) -> Unit:
        if self.order == "random":
            return runnable[self.random.integers(len(runnable))]
        return runnable[0 if self.order == "forward" else -1]

    def _release(self) -> None:
        """All wait at the barrier: go on."""
        places = {unit.waiting for unit in self.units}
        if None in places:
            raise EmulationError("diverged: some warps have ended while others wait at a barrier")
        if len(places) > 1:
            lines = sorted(self.program.blocks[place - 1].end.line for place in places)
            raise EmulationError(f"diverged: warps wait at different barriers, of lines {lines}")
        self.report.barriers += 1
        self.races.end_stretch()
        for unit in self.units:
            unit.waiting = None
            unit.copies.end_stretch()
            unit.products.end_stretch(unit)

    def _run(self, unit: Unit) -> None:
        """Until the unit ends or waits; with `preempt`, for one basic block."""
        blocks, report = self.program.blocks, self.report
        while unit.stack:
            top = unit.stack[-1]
            meet, index, mask = top
            if index == meet and len(unit.stack) > 1:
                unit.stack.pop()
                continue
            if index >= len(blocks):
                raise EmulationError("end: the program goes on behind its last instruction")
            block = blocks[index]
            function = block.full if mask is None else block.masked
            if function is None:
                function = self.program.function(index, mask is not None)
            condition = function(unit, unit.registers, mask)
            report.instructions += len(block.instructions)
            if report.instructions > self.limit:
                raise EmulationError(f"hangs: more than {self.limit} instructions")
            end = block.end
            top[1] = index + 1
            if end is None:
                pass
            elif end.opcode == "bra":
                self._branch(unit, index, condition)
            elif not is_barrier(end):
                self._return(unit, condition)
            elif index not in self.skip:
                if mask is not None and (mask != unit.alive).any():
                    raise EmulationError(f"diverged: {end}: {mask.sum()} of {unit.alive.sum()} lanes are there")
                unit.waiting = index + 1
                return
            if self.preempt:
                return

    def _branch(self, unit: Unit, index: int, taken: np.ndarray | None) -> None:
        end, top = self.program.blocks[index].end, unit.stack[-1]
        target, mask = self.program.labels[end.operands[0].name], top[2]
        if taken is None:
            top[1] = target
            return
        yes = taken if mask is None else taken & mask
        no = ~taken if mask is None else ~taken & mask
        if not np.count_nonzero(no):
            top[1] = target
        elif np.count_nonzero(yes):
            if end.modifiers == ["uni"]:
                raise EmulationError(f"diverged: {end}: {yes.sum()} lanes take it and {no.sum()} do not")
            meet = self.program.meet[index]
            top[1] = meet
            unit.stack += [[meet, to, side] for to, side in ((index + 1, no), (target, yes)) if to != meet]

    def _return(self, unit: Unit, condition: np.ndarray | None) -> None:
        mask = unit.stack[-1][2]
        ended = unit.alive if mask is None else mask
        if condition is not None:
            ended = ended & condition
        unit.alive = unit.alive & ~ended
        for entry in unit.stack:
            entry[2] = unit.alive if entry[2] is None else entry[2] & unit.alive
        unit.stack = [entry for entry in unit.stack if entry[2].any()]
