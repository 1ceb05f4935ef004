"""Global and shared memory: loads and stores, checked.

A launch is stopped (EmulationError) by what a GPU would stop for, or what would corrupt the memory of somebody else:

    bounds   bytes outside every tensor's storage, or past the shared memory of the launch
    align    an access whose address is no multiple of its size; a vector of four b32 has 16 bytes

and a finding is written down for what leaves the result to chance:

    uninit   shared memory is read that no thread of the block wrote
    async    a load or a store touches bytes while cp.async is under way to them, or an instruction touches registers
             while wgmma adds to them (`tensor_cores.py`)
    proxy    wgmma reads what was written without fence.proxy.async since (`tensor_cores.py`)

Races are `races.py`. Shared memory and registers hold 0xA5 at first, so that nothing relies on zeros.
"""

from __future__ import annotations

import bisect
import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.races import Access, Races, Report, Space
from tests.ptx.storage import I8, U1, EmulationError

if TYPE_CHECKING:
    from tests.ptx.parser import Instruction
    from tests.ptx.schedule import Unit

GARBAGE = 0xA5


class Allocation:
    """The storage of one tensor.

    Args:
        base: address of its first byte.
        nbytes: its size.
        name: how findings call it.
    """

    def __init__(self, base: int, nbytes: int, name: str):
        self.base, self.nbytes, self.name = base, nbytes, name
        self._buffer = (ctypes.c_uint8 * nbytes).from_address(base)
        self._tables: dict[tuple[int, int], np.ndarray] = {}

    def table(self, size: int, n: int) -> np.ndarray:
        """[rows, n] of elements of `size` bytes over the same bytes."""
        if (size, n) not in self._tables:
            rows = self.nbytes // (size * n)
            self._tables[size, n] = np.frombuffer(self._buffer, f"u{size}", rows * n).reshape(rows, n)
        return self._tables[size, n]

    def gather(self, offset: np.ndarray, size: int, n: int) -> np.ndarray:
        """[lanes, n] from these bytes on."""
        if self.base % (size * n):  # rows of the table are not aligned as the addresses are
            return self.table(size, 1)[offset[:, None] // size + np.arange(n), 0]
        return self.table(size, n)[offset // (size * n)]

    def scatter(self, offset: np.ndarray, size: int, data: np.ndarray) -> None:
        n = data.shape[1]
        if self.base % (size * n):
            self.table(size, 1)[offset[:, None] // size + np.arange(n), 0] = data
        else:
            self.table(size, n)[offset // (size * n)] = data


class Memory:
    """What the lanes of a launch read and write.

    Args:
        allocations: storage that the kernel may touch.
        shared: bytes of shared memory of a block.
        granules: size of the smallest access, by space ("global", "shared").
        asynchronous, proxied: whether the program uses cp.async, wgmma.
    """

    def __init__(
        self, allocations: list[Allocation], shared: int, granules: dict[str, int], races: Races, report: Report,
        *, asynchronous: bool, proxied: bool,
    ):  # fmt: skip
        self.allocations = sorted(allocations, key=lambda a: a.base)
        self.bases = np.array([a.base for a in self.allocations], I8)
        self.ends = np.array([a.base + a.nbytes for a in self.allocations], I8)
        self._bases, self._ends = self.bases.tolist(), self.ends.tolist()
        self.spaces = [Space(a.name, a.nbytes, granules["global"], True) for a in self.allocations]
        self.shared_space = Space("shared memory", shared, granules["shared"], False)
        self.shared_bytes, self.races, self.report = shared, races, report
        self.asynchronous, self.proxied = asynchronous, proxied
        self._whole = -(-shared // 16) * 16 + 16
        self.begin_block()

    def begin_block(self) -> None:
        """Shared memory of the next block of the grid."""
        self.shared = np.full(self._whole, GARBAGE, U1)
        self.written = np.zeros(self._whole, bool)
        self.in_flight = np.zeros(self._whole, np.int16)  # copies under way to a byte
        # For wgmma: 1 + the warp that wrote a byte without a fence since, when that was, and each warp's last fence.
        self.unfenced, self.stamps = np.zeros(self._whole, np.int16), np.zeros(self._whole, np.int32)
        self.clock, self.fences = 0, {}
        self._tables = {}

    def shared_table(self, size: int, n: int) -> np.ndarray:
        if (size, n) not in self._tables:
            self._tables[size, n] = self.shared.view(f"u{size}").reshape(-1, n)
        return self._tables[size, n]

    # --- global memory

    def find(self, address: np.ndarray, total: int, instruction: Instruction) -> int | np.ndarray:
        """Number of the allocation, or of each lane's, that holds the `total` bytes from `address` on."""
        low, high = int(np.minimum.reduce(address)), int(np.maximum.reduce(address))
        first = bisect.bisect_right(self._bases, low) - 1
        if first >= 0 and high + total <= self._ends[first] and not np.count_nonzero(address & (total - 1)):
            return first
        at = self.bases.searchsorted(address, "right") - 1
        wrong = at < 0
        if len(self.allocations):
            wrong = wrong | (address + total > self.ends[np.maximum(at, 0)])
        if wrong.any():
            bad, near = int(address[wrong][0]), int(at[wrong][0])
            where = f"at address {bad:#x}"
            if near >= 0:
                near = self.allocations[near]
                where = f"at byte {bad - near.base} of {near.name}, which has {near.nbytes}"
            raise EmulationError(f"bounds: {instruction}: {total} bytes {where}")
        if (address % total).any():
            raise EmulationError(f"align: {instruction}: address {int(address[address % total != 0][0]):#x}")
        return at

    def each(self, address: np.ndarray, total: int, instruction: Instruction) -> list[tuple[int, Any]]:
        """[(number of an allocation, the lanes that are there)]."""
        which = self.find(address, total, instruction)
        if isinstance(which, int):
            return [(which, slice(None))]
        return [(int(number), which == number) for number in np.unique(which)]

    def load_global(
        self, unit: Unit, address: np.ndarray, k: np.ndarray | None, size: int, n: int, instruction: Instruction
    ) -> np.ndarray:
        """[n, lanes] of n elements a lane; 0 in lanes outside k."""
        lanes = slice(None) if k is None else k.nonzero()[0]
        address, threads = address[lanes], unit.threads[lanes]
        out = np.zeros((n, unit.lanes), f"u{size}")
        if not len(address):
            return out
        found = np.empty((len(address), n), out.dtype)
        for number, these in self.each(address, size * n, instruction):
            offset = address[these] - self.allocations[number].base
            found[these] = self.allocations[number].gather(offset, size, n)
            self.races.note(self.spaces[number], Access(offset, size * n, threads[these], False, instruction, None))
        out[:, lanes] = found.T
        return out

    def store_global(
        self,
        unit: Unit,
        address: np.ndarray,
        data: list[np.ndarray],
        k: np.ndarray | None,
        size: int,
        instruction: Instruction,
    ) -> None:
        lanes = slice(None) if k is None else k.nonzero()[0]
        address, threads = address[lanes], unit.threads[lanes]
        if not len(address):
            return
        rows = np.stack([element[lanes] for element in data], 1)
        for number, these in self.each(address, size * len(data), instruction):
            offset = address[these] - self.allocations[number].base
            self.allocations[number].scatter(offset, size, rows[these])
            access = Access(offset, size * len(data), threads[these], True, instruction, rows[these])
            self.races.note(self.spaces[number], access)

    # --- shared memory

    def check_shared(self, address: np.ndarray, total: int, instruction: Instruction, read: bool) -> None:
        if np.minimum.reduce(address) < 0 or np.maximum.reduce(address) + total > self.shared_bytes:
            raise EmulationError(
                f"bounds: {instruction}: {total} bytes at bytes {address.min()} to {address.max()} of shared memory, "
                f"which has {self.shared_bytes}"
            )
        if np.count_nonzero(address & (total - 1)):
            bad = int(address[address % total != 0][0])
            raise EmulationError(f"align: {instruction}: byte {bad} of shared memory, {total} bytes")
        place = address // total
        if read and np.count_nonzero(self.written.reshape(-1, total)[place]) < total * len(place):
            self.report.add("uninit", instruction, f"shared memory: read before it is written ({instruction})")
        if self.asynchronous and np.count_nonzero(self.in_flight.reshape(-1, total)[place]):
            self.report.add(
                "async", instruction, f"shared memory: touched while cp.async is under way to it ({instruction})"
            )

    def put_shared(self, address: np.ndarray, rows: np.ndarray, warps: np.ndarray) -> None:
        """Write rows [lanes, n] to `address`; `warps` is the warp of each lane."""
        size, n = rows.dtype.itemsize, rows.shape[1]
        place = address // (size * n)
        self.shared_table(size, n)[place] = rows
        self.written.reshape(-1, size * n)[place] = True
        if self.proxied:
            self.clock += 1
            self.unfenced.reshape(-1, size * n)[place] = warps[:, None] + 1
            self.stamps.reshape(-1, size * n)[place] = self.clock

    def load_shared(
        self, unit: Unit, address: np.ndarray, k: np.ndarray | None, size: int, n: int, instruction: Instruction
    ) -> np.ndarray:
        """[n, lanes] of n elements a lane; 0 in lanes outside k."""
        lanes = slice(None) if k is None else k.nonzero()[0]
        address = address[lanes]
        if len(address):
            self.check_shared(address, size * n, instruction, read=True)
            found = self.shared_table(size, n)[address // (size * n)]
            access = Access(address, size * n, unit.threads[lanes], False, instruction, None)
            self.races.note(self.shared_space, access)
            if k is None:
                return np.ascontiguousarray(found.T)
        out = np.zeros((n, unit.lanes), f"u{size}")
        if len(address):
            out[:, lanes] = found.T
        return out

    def store_shared(
        self,
        unit: Unit,
        address: np.ndarray,
        data: list[np.ndarray],
        k: np.ndarray | None,
        size: int,
        instruction: Instruction,
    ) -> None:
        lanes = slice(None) if k is None else k.nonzero()[0]
        address, threads = address[lanes], unit.threads[lanes]
        if not len(address):
            return
        self.check_shared(address, size * len(data), instruction, read=False)
        rows = np.stack([element[lanes] for element in data], 1)
        self.put_shared(address, rows, threads >> 5)
        self.races.note(self.shared_space, Access(address, size * len(data), threads, True, instruction, rows))
