"""Which accesses are in danger, whatever the order in which the warps happened to run.

Between two barriers (a stretch) nothing orders the warps of a block, and nothing ever orders the blocks of a grid. So
an access races with another one, if both touch a byte, one of them writes, and they belong to

    two warps in one stretch                     kind "race", in shared or global memory
    two blocks of the grid                       kind "race", in global memory
    two lanes of a warp, bar.warp.sync apart     kind "lanes", if asked for: since Volta lanes have no common clock

Two that write the same value do no harm, and Triton lets them. Memory is looked at in granules, the smallest access of
the program in that space. The shadow of an allocation holds what is known of its granules, page by page, so that a
tensor of many gigabytes costs what is touched of it.
"""

from typing import Any, NamedTuple

import numpy as np

from tests.ptx.parser import Instruction

PAGE = 1 << 16  # granules a page
FEW_READS = 1 << 22  # granules; reads of memory that nobody wrote yet are kept as they are, up to this many


class Report:
    """What a launch did and what was found."""

    def __init__(self):
        self.findings: list[tuple[str, str]] = []
        self.instructions = self.barriers = self.accesses = 0
        self._seen = set()

    def add(self, kind: str, key: Any, text: str) -> None:
        """A finding of `kind`, once for each `key`: the instructions and the memory it is about."""
        if (kind, key) not in self._seen:
            self._seen.add((kind, key))
            self.findings.append((kind, text))


class Access(NamedTuple):
    address: np.ndarray  # [lanes] of the first byte, from the start of the space
    size: int
    threads: np.ndarray  # [lanes] number of the thread in its block
    write: bool
    instruction: Instruction
    data: np.ndarray | None  # [lanes, size in elements]: what was written, if that is known


class Shadow:
    """Arrays with an element a granule, zero at first, of which only touched pages exist."""

    def __init__(self, granules: int):
        self.table = np.full(granules // PAGE + 2, -1, np.int64)  # page -> its place in the arrays
        self.pages = 0
        self.arrays = {name: np.zeros(0, np.int32) for name in ("owner", "writer", "reader")}

    def places(self, granules: np.ndarray) -> np.ndarray:
        page = granules >> 16
        place = self.table[page]
        if np.count_nonzero(place < 0):
            for new in np.unique(page[place < 0]):
                self.table[new] = self.pages
                self.pages += 1
            for name, array in self.arrays.items():
                if len(array) < self.pages * PAGE:
                    grown = np.zeros(2 * self.pages * PAGE, np.int32)
                    grown[: len(array)] = array
                    self.arrays[name] = grown
            place = self.table[page]
        return (place << 16) | (granules & (PAGE - 1))


class Space:
    """Shared memory, or one allocation of global memory."""

    def __init__(self, name: str, size: int, granule: int, is_global: bool):
        self.name, self.granule, self.is_global = name, granule, is_global
        self.shadow = Shadow(size // granule)
        self.log: list[Access] = []
        self.reads: list[tuple[Access, int]] = []  # of global memory before the first write to it, with their block
        self.waiting = 0
        self.was_written = False

    def spread(self, accesses: list[Access]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(granule, thread, number of the access), one element for each granule that a lane touched."""
        granules, threads, numbers = [], [], []
        for number, access in enumerate(accesses):
            first, per = access.address // self.granule, max(access.size // self.granule, 1)
            if per > 1:
                granules.append((first[:, None] + np.arange(per)).ravel())
                threads.append(np.repeat(access.threads, per))
            else:
                granules.append(first)
                threads.append(access.threads)
            numbers.append(np.full(len(granules[-1]), number))
        return np.concatenate(granules), np.concatenate(threads), np.concatenate(numbers)

    def values(self, accesses: list[Access]) -> np.ndarray:
        """What each granule got, as uint64; of reads, and where it is unknown, 0."""
        out = []
        for access in accesses:
            per = max(access.size // self.granule, 1)
            if access.data is None:
                out.append(np.zeros(len(access.address) * per, np.uint64))
            else:
                out.append(np.ascontiguousarray(access.data).view(f"u{self.granule}").ravel().astype(np.uint64))
        return np.concatenate(out)


class Races:
    """The log of one launch.

    Args:
        warps: of a block; with one there are no races in a block, but of lanes.
        blocks: of the grid; with one there are none between blocks.
        lanes: whether to look for races between the lanes of a warp.
    """

    def __init__(self, report: Report, warps: int, blocks: int, lanes: bool, on: bool):
        self.report, self.warps, self.blocks, self.lanes, self.on = report, warps, blocks, lanes, on
        self.block = 0  # number of the block that runs
        self.touched: dict[int, Space] = {}
        self.by_warp: dict[tuple[int, int], tuple[Space, list[Access]]] = {}

    def note(self, space: Space, access: Access, by_lane: bool = True) -> None:
        """Remember an access until the next barrier. `by_lane`: that one lane made it, not a warp as a whole."""
        if not self.on:
            return
        self.report.accesses += len(access.threads)
        self.touched[id(space)] = space
        space.log.append(access)
        if self.lanes and by_lane:
            warps = access.threads >> 5
            for warp in np.unique(warps):
                mine = warps == warp
                data = None if access.data is None else access.data[mine]
                part = access._replace(address=access.address[mine], threads=access.threads[mine], data=data)
                self.by_warp.setdefault((id(space), int(warp)), (space, []))[1].append(part)

    def end_stretch(self) -> None:
        """At a barrier, and where a block ends."""
        if self.lanes:
            self.end_lanes(None)
        for space in self.touched.values():
            written = any(access.write for access in space.log)
            if written and self.warps > 1:
                self._check(space, space.log, lanes=False)
            if space.is_global and self.blocks > 1:
                self._between_blocks(space, written)
            space.log = []
        self.touched = {}

    def end_lanes(self, warps: np.ndarray | None) -> None:
        """At bar.warp.sync of these warps; None for all."""
        chosen = None if warps is None else {int(warp) for warp in warps}
        for key in [key for key in self.by_warp if chosen is None or key[1] in chosen]:
            space, accesses = self.by_warp.pop(key)
            if any(access.write for access in accesses):
                self._check(space, accesses, lanes=True)

    def _check(self, space: Space, accesses: list[Access], lanes: bool) -> None:
        granules, threads, numbers = space.spread(accesses)
        who = threads if lanes else threads >> 5
        places, data = space.shadow.places(granules), space.values(accesses)
        owner = space.shadow.arrays["owner"]
        write = np.array([access.write for access in accesses])[numbers]
        unknown = np.array([access.data is None for access in accesses])[numbers]
        written = np.flatnonzero(write)
        written = written[np.argsort(who[written], kind="stable")]
        # Several may write the same value into the same bytes. All accesses are compared with the writer of the lowest
        # number and with that of the highest: if any writer is another than who made the access, one of these is.
        for owners in (written[::-1], written):
            owner[places[owners]] = owners + 1  # of several the last stays
            other = owner[places] - 1
            wrong = (other >= 0) & (who[other] != who)
            wrong &= unknown | unknown[other] | (data != data[other])  # of a read nothing is known
            if np.count_nonzero(wrong):
                self._tell(space, accesses, granules, who, numbers, other, wrong, lanes)
            if not np.count_nonzero(who[other[written]] != who[written]):
                break  # each granule has one writer
        owner[places[written]] = 0

    def _tell(
        self, space: Space, accesses: list[Access], granules: np.ndarray, who: np.ndarray, numbers: np.ndarray,
        other: np.ndarray, wrong: np.ndarray, lanes: bool,
    ) -> None:  # fmt: skip
        """Each pair of instructions once, of the accesses that are `wrong` with those at `other`."""
        for pair in np.unique(numbers[wrong] * len(accesses) + numbers[other[wrong]]):
            one, two = (accesses[int(number)] for number in divmod(pair, len(accesses)))
            at = np.flatnonzero(wrong & (numbers * len(accesses) + numbers[other] == pair))[0]
            name, verb = ("lane", "bar.warp.sync") if lanes else ("warp", "barrier")
            self.report.add(
                "lanes" if lanes else "race",
                (space.name, one.instruction, two.instruction),
                f"{space.name}, byte {granules[at] * space.granule}: {name} {who[at]} "
                f"{'writes' if one.write else 'reads'} it ({one.instruction}), {name} {who[other[at]]} writes it "
                f"({two.instruction}), no {verb} between them",
            )

    def _between_blocks(self, space: Space, written: bool) -> None:
        if not written and not space.was_written:
            space.reads += [(access, self.block) for access in space.log]
            space.waiting += sum(len(access.threads) * access.size for access in space.log)
            if space.waiting < FEW_READS * space.granule:
                return
        if space.reads:
            reads, space.reads, space.waiting = space.reads, [], 0
            for block in dict.fromkeys(block for _, block in reads):
                self._of_block(space, [access for access, number in reads if number == block], block)
        space.was_written |= written
        if written or space.was_written:
            self._of_block(space, space.log, self.block)

    def _of_block(self, space: Space, accesses: list[Access], block: int) -> None:
        granules, _, numbers = space.spread(accesses)
        places = space.shadow.places(granules)
        writer, reader = space.shadow.arrays["writer"], space.shadow.arrays["reader"]
        write = np.array([access.write for access in accesses])[numbers]
        before = writer[places]
        wrong = (before != 0) & (before != block + 1)
        read = reader[places]
        wrong |= write & (read != 0) & (read != block + 1)
        for number in np.unique(numbers[wrong]) if np.count_nonzero(wrong) else ():
            at = np.flatnonzero(wrong & (numbers == number))[0]
            instruction = accesses[number].instruction
            self.report.add(
                "race",
                (space.name, instruction),
                f"{space.name}, byte {granules[at] * space.granule}: block {block} of the grid "
                f"{'writes' if write[at] else 'reads'} it ({instruction}), and another block "
                f"{'writes' if before[at] else 'reads'} it, too",
            )
        writer[places[write]] = block + 1
        read_places = places[~write]
        several = (reader[read_places] != 0) & (reader[read_places] != block + 1)
        reader[read_places] = np.where(several, -1, block + 1)
