"""cp.async: copies from global to shared memory that go on behind the program's back.

A copy may land at any moment from its issue to the cp.async.wait_group that waits for it. Here it lands as late as it
may, at the wait, so that whoever reads too early gets the old bytes; and until then its bytes are marked: a load or
store that touches them is a finding (`memory.py`), and for races the copy is a write of the issuing warp in every
stretch between barriers that it may land in. The wait is for the lane's own copies only: others need a barrier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.ptx.memory import Memory
from tests.ptx.races import Access
from tests.ptx.storage import I8, U1, Unsupported

if TYPE_CHECKING:
    from tests.ptx.parser import Instruction
    from tests.ptx.schedule import Unit


class Copy(NamedTuple):
    """`size` bytes a lane, of which the first `take` are read, and the rest is 0."""

    to: np.ndarray
    source: np.ndarray
    size: int
    take: np.ndarray
    threads: np.ndarray
    instruction: Instruction


class Copies:
    """The copies of one unit: those since the last commit, and the groups that nobody has waited for."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.open: list[Copy] = []
        self.groups: list[list[Copy]] = []

    def issue(
        self, unit: Unit, to: np.ndarray, source: np.ndarray, size: int, take: np.ndarray | None,
        k: np.ndarray | None, instruction: Instruction,
    ) -> None:  # fmt: skip
        lanes = np.arange(unit.lanes) if k is None else np.flatnonzero(k)
        if not len(lanes):
            return
        take = np.full(len(lanes), size) if take is None else np.minimum(take[lanes].astype(I8), size)
        copy = Copy(to[lanes], source[lanes], size, take, unit.threads[lanes], instruction)
        self.memory.check_shared(copy.to, size, instruction, read=False)
        np.add.at(self.memory.in_flight.reshape(-1, size), copy.to // size, 1)
        self.open.append(copy)
        self._read(copy)  # what is out of bounds is so from the start
        self._note(copy)

    def commit(self, unit: Unit, k: np.ndarray | None, instruction: Instruction) -> None:
        self._together(unit, k, instruction)
        self.groups.append(self.open)
        self.open = []

    def wait(self, unit: Unit, count: int, k: np.ndarray | None, instruction: Instruction) -> None:
        """Until at most `count` groups are under way."""
        self._together(unit, k, instruction)
        while len(self.groups) > count:
            for copy in self.groups.pop(0):
                self._land(copy)

    def end_stretch(self) -> None:
        """What is under way goes on into the next stretch between barriers."""
        for copy in [*(copy for group in self.groups for copy in group), *self.open]:
            self._note(copy)

    @staticmethod
    def _together(unit: Unit, k: np.ndarray | None, instruction: Instruction) -> None:
        if k is not None and (k != unit.alive).any():
            raise Unsupported(f"{instruction}: by some lanes only")

    def _note(self, copy: Copy) -> None:
        access = Access(copy.to, copy.size, copy.threads, True, copy.instruction, None)
        self.memory.races.note(self.memory.shared_space, access, by_lane=False)
        reads = copy.take > 0
        for number, these in self._sources(copy):
            offset = copy.source[reads][these] - self.memory.allocations[number].base
            access = Access(offset, copy.size, copy.threads[reads][these], False, copy.instruction, None)
            self.memory.races.note(self.memory.spaces[number], access, by_lane=False)

    def _sources(self, copy: Copy) -> list[tuple[int, Any]]:
        source = copy.source[copy.take > 0]
        if not len(source):
            return []
        if (copy.take[copy.take > 0] < copy.size).any():
            raise Unsupported(f"{copy.instruction}: a part of the bytes is copied")
        return self.memory.each(source, copy.size, copy.instruction)

    def _read(self, copy: Copy) -> np.ndarray:
        """[lanes, size] bytes."""
        data, reads = np.zeros((len(copy.to), copy.size), U1), copy.take > 0
        some = data[reads]
        for number, these in self._sources(copy):
            allocation = self.memory.allocations[number]
            found = allocation.gather(copy.source[reads][these] - allocation.base, 4, copy.size // 4)
            some[these] = np.ascontiguousarray(found).view(U1)
        data[reads] = some
        return data

    def _land(self, copy: Copy) -> None:
        data, memory = self._read(copy), self.memory
        np.subtract.at(memory.in_flight.reshape(-1, copy.size), copy.to // copy.size, 1)
        rows = data.view("u4")
        memory.put_shared(copy.to, rows, copy.threads >> 5)
        memory.races.note(memory.shared_space, Access(copy.to, copy.size, copy.threads, True, copy.instruction, rows))
