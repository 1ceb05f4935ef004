"""Products on tensor cores, and the moves of matrices between shared memory and registers.

A matrix is spread over the lanes of a warp as the PTX manual draws it. With group = lane / 4 and inside = lane % 4:

    mma.m16n8k16   A [16, 16] four registers of two halves: register i, half j holds A[group + 8·(i % 2),
    (16 bits)      2·inside + j + 8·(i / 2)]; B [16, 8] two registers: B[2·inside + j + 8·i, group]; C and D [16, 8]
                   four float32: C[group + 8·(i / 2), 2·inside + i % 2]
    mma.m16n8k8    the same with one tf32 a register: A[group + 8·(i % 2), inside + 4·(i / 2)], B[inside + 4·i, group]
    wgmma.m64nN    of four warps: warp w has rows 16·w to 16·w + 15 of A and D, each laid out as above, D with N / 8
                   blocks of columns beside each other. B, and A if it is not in registers, are read from shared memory
                   as a descriptor of 64 bits says.

Numerics: products are exact in float64, and so nearly is the sum, which is rounded to float32 once. Tensor cores add in
groups with a few bits less, in an order that nobody documents: they err more than this does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.arithmetic import from_bf16
from tests.ptx.races import Access
from tests.ptx.storage import F2, F4, F8, U2, U4, Unsupported
from tests.ptx.warps import active_warps

if TYPE_CHECKING:
    from tests.ptx.parser import Instruction
    from tests.ptx.schedule import Unit

LANE = np.arange(32)
GROUP, INSIDE = LANE // 4, LANE % 4
BYTES = {"bf16": 2, "f16": 2, "tf32": 4}
WIDTHS = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes after which a swizzled row begins anew, by the descriptor's highest bits
PIECE = 16  # bytes that stay together under every swizzle


def numbers(u: np.ndarray, kind: str) -> np.ndarray:
    """Storage to float64: of tf32 the upper 19 bits count."""
    if kind == "tf32":
        return (u & np.uint32(0xFFFFE000)).view(F4).astype(F8)
    return from_bf16(u).astype(F8) if kind == "bf16" else u.view(F2).astype(F8)


def fragment_a(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """[warps, 16, depth] from four registers."""
    stacked = np.stack(registers)  # [k half · 2 + m half, lanes]
    values = numbers(stacked.view(U2) if kind != "tf32" else stacked, kind)
    values = values.reshape(
        len(registers) // 2, 2, -1, 8, 4, 4 // BYTES[kind]
    )  # k half, m half, warp, group, inside, j
    warps = values.shape[2]
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)


def fragment_b(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """[warps, depth, 8] from two registers."""
    stacked = np.stack(registers)
    values = numbers(stacked.view(U2) if kind != "tf32" else stacked, kind)
    values = values.reshape(len(registers), -1, 8, 4, 4 // BYTES[kind])  # k half, warp, group, inside, j
    return values.transpose(1, 0, 3, 4, 2).reshape(values.shape[1], -1, 8)


def from_sums(registers: list[np.ndarray]) -> np.ndarray:
    """[warps, 16, n] of float64 from n / 2 registers of float32."""
    values = np.stack(registers).view(F4).astype(F8).reshape(len(registers) // 4, 2, 2, -1, 8, 4)
    blocks, _, _, warps, _, _ = values.shape  # block of 8 columns, m half, j, warp, group, inside
    return values.transpose(3, 1, 4, 0, 5, 2).reshape(warps, 16, 8 * blocks)


def to_sums(sums: np.ndarray) -> np.ndarray:
    """[n / 2 registers, lanes] of uint32 from [warps, 16, n]."""
    warps, _, n = sums.shape
    values = sums.astype(F4).reshape(warps, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return np.ascontiguousarray(values).reshape(n // 2, warps * 32).view(U4)


def mma(
    unit: Unit, kind: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], k: np.ndarray | None,
    instruction: Instruction,
) -> np.ndarray:  # fmt: skip
    """D = A B + C of every warp."""
    active_warps(unit, k, None, instruction)
    return to_sums(from_sums(c) + fragment_a(a, kind) @ fragment_b(b, kind))


# --- matrices of 8 x 8 halves


def _rows(
    unit: Unit, address: np.ndarray, n: int, k: np.ndarray | None, instruction: Instruction
) -> tuple[Any, np.ndarray]:
    """(active warps, [n, warps, 8] byte of each row): lane 8·i + r of a warp gives row r of matrix i."""
    some = active_warps(unit, k, None, instruction)
    by_warp = address.reshape(-1, 32)
    by_warp = by_warp if some is None else by_warp[some]
    return some, by_warp[:, : 8 * n].reshape(-1, n, 8).transpose(1, 0, 2)


def load_matrices(
    unit: Unit, address: np.ndarray, n: int, transposed: bool, k: np.ndarray | None, instruction: Instruction
) -> np.ndarray:
    """ldmatrix: [n, lanes] of two halves, row `group`, columns 2·inside and 2·inside + 1 of matrix i."""
    some, rows = _rows(unit, address, n, k, instruction)
    out, memory = np.zeros((n, unit.lanes // 32, 32), U4), unit.memory
    if rows.size:
        flat = rows.ravel()
        memory.check_shared(flat, 16, instruction, read=True)
        tiles = memory.shared_table(2, 8)[flat // 16].reshape(*rows.shape, 8)  # [n, warps, 8, 8]
        tiles = np.ascontiguousarray(tiles.swapaxes(2, 3) if transposed else tiles).view(U4)
        out[:, slice(None) if some is None else some] = tiles.reshape(n, -1, 32)
        _note_rows(unit, some, rows, False, instruction, None)
    return out.reshape(n, -1)


def store_matrices(
    unit: Unit,
    address: np.ndarray,
    data: list[np.ndarray],
    transposed: bool,
    k: np.ndarray | None,
    instruction: Instruction,
) -> None:
    """stmatrix: the way back."""
    some, rows = _rows(unit, address, len(data), k, instruction)
    if not rows.size:
        return
    values = np.stack(data).reshape(len(data), -1, 32)
    values = np.ascontiguousarray(values if some is None else values[:, some])
    tiles = values.view(U2).reshape(*rows.shape, 8)
    tiles = np.ascontiguousarray(tiles.swapaxes(2, 3) if transposed else tiles).reshape(-1, 8)
    flat, warps = rows.ravel(), unit.warps if some is None else unit.warps[some]
    unit.memory.check_shared(flat, 16, instruction, read=False)
    unit.memory.put_shared(flat, tiles, np.broadcast_to(warps[None, :, None], rows.shape).ravel())
    _note_rows(unit, some, rows, True, instruction, tiles)


def _note_rows(unit: Unit, some: Any, rows: np.ndarray, write: bool, instruction: Instruction, data: Any) -> None:
    warps = unit.warps if some is None else unit.warps[some]
    threads = np.broadcast_to(warps[None, :, None] * 32, rows.shape).ravel()
    access = Access(rows.ravel(), 16, threads, write, instruction, data)
    unit.memory.races.note(unit.memory.shared_space, access, by_lane=False)


# --- products of four warps, whose operands lie in shared memory: they are read from the call to the wait


class Products:
    """wgmma of one unit: what those that nobody has waited for read, which others must not write before, and the
    registers that they add to. These have their sums at once here, on a GPU only after the wait.
    """

    def __init__(self):
        self.open: list[Access] = []
        self.groups: list[list[Access]] = []
        self.sums: set[int] = set()  # registers, since the last commit
        self.sums_of_groups: list[set[int]] = []

    def start(self, sums: tuple[int, ...]) -> None:
        self.sums.update(sums)

    def commit(self) -> None:
        self.groups.append(self.open)
        self.sums_of_groups.append(self.sums)
        self.open, self.sums = [], set()

    def wait(self, unit: Unit, count: int) -> None:
        while len(self.groups) > count:
            self.sums_of_groups.pop(0)
            for access in self.groups.pop(0):
                unit.memory.races.note(unit.memory.shared_space, access, by_lane=False)

    def touch(self, unit: Unit, registers: tuple[int, ...], instruction: Instruction) -> None:
        """Another instruction reads or writes these registers."""
        if not all(sums.isdisjoint(registers) for sums in (self.sums, *self.sums_of_groups)):
            text = f"registers: touched while wgmma adds to them, before wgmma.wait_group ({instruction})"
            unit.memory.report.add("async", instruction, text)

    def end_stretch(self, unit: Unit) -> None:
        """What is under way goes on into the next stretch between barriers."""
        for access in [*(access for group in self.groups for access in group), *self.open]:
            unit.memory.races.note(unit.memory.shared_space, access, by_lane=False)


def fence_proxy(unit: Unit, k: np.ndarray | None) -> None:
    """fence.proxy.async: wgmma may read what these warps wrote, and these warps' wgmma whatever was written before.

    So both orders are right: write, fence, barrier, wgmma, and write, barrier, fence, wgmma. (What is written before,
    but with no barrier between, is a race.)
    """
    warps, memory = unit.warps if k is None else np.unique(unit.warps.repeat(32)[k]), unit.memory
    memory.unfenced[np.isin(memory.unfenced, warps + 1)] = 0
    memory.fences.update(dict.fromkeys(warps.tolist(), memory.clock))


def _is_published(unit: Unit, pieces: np.ndarray, warps: np.ndarray) -> bool:
    memory, place = unit.memory, pieces // PIECE
    unfenced = memory.unfenced.reshape(-1, PIECE)[place] != 0
    fence = min(memory.fences.get(warp, 0) for warp in warps.tolist())
    return not (unfenced & (memory.stamps.reshape(-1, PIECE)[place] > fence)).any()


def _places(
    descriptor: int, rows: np.ndarray, depth: int, transposed: int, size: int, instruction: Instruction
) -> np.ndarray:
    """[rows, depth] byte of each element: lines of the manual's canonical layouts, swizzled.

    The descriptor holds, in units of 16 bytes, the start (bits 0 to 13), the leading offset (16 to 29) and the stride
    (32 to 45); a base offset (49 to 51) is 0 for tiles that begin where the swizzle does; bits 62, 63 give the width.
    """
    start, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
    width = WIDTHS[descriptor >> 62]
    if descriptor >> 49 & 7 or (transposed and not width):
        raise Unsupported(f"{instruction}: descriptor {descriptor:#x}")
    r, c = rows[:, None], np.arange(depth)[None, :]
    if not width:
        return start + r // 8 * stride + c * size // 16 * leading + r % 8 * 16 + c * size % 16
    if transposed:
        line = width // size
        at = start + r // line * leading + c // 8 * stride + c % 8 * width + r % line * size
    else:
        at = start + r // 8 * stride + r % 8 * width + c * size
    return at ^ (at >> 3 & {128: 0x70, 64: 0x30, 32: 0x10}[width])


def _described(
    unit: Unit, descriptor: int, rows: np.ndarray, depth: int, transposed: int, kind: str, warps: np.ndarray,
    instruction: Instruction,
) -> np.ndarray:  # fmt: skip
    """[rows, depth] of float64, read from shared memory by these warps."""
    size, memory = BYTES[kind], unit.memory
    at = _places(int(descriptor), rows, depth, transposed, size, instruction)
    pieces = np.unique(at // PIECE) * PIECE
    memory.check_shared(pieces, PIECE, instruction, read=True)
    if not _is_published(unit, pieces, warps):
        memory.report.add(
            "proxy",
            instruction,
            f"shared memory: read by wgmma without fence.proxy.async after a write ({instruction})",
        )
    access = Access(np.tile(pieces, len(warps)), PIECE, np.repeat(warps * 32, len(pieces)), False, instruction, None)
    memory.races.note(memory.shared_space, access, by_lane=False)
    unit.products.open.append(access)
    return numbers(memory.shared_table(size, 1)[at // size, 0], kind)


def wgmma(
    unit: Unit, shape: tuple[int, int], kind: str, d: list[np.ndarray], a: Any, b: np.ndarray, scale: np.ndarray,
    transposed: tuple[int, int], k: np.ndarray | None, instruction: Instruction,
) -> np.ndarray:  # fmt: skip
    """D = A B + scale·D of every four warps, at once; `a` is four registers, or the descriptor of A.

    Each warp multiplies its own 16 rows, and reads of A only these.
    """
    some = active_warps(unit, k, None, instruction)
    n, depth = shape
    old = from_sums(d)
    in_registers = isinstance(a, list)
    fragments = fragment_a(a, kind) if in_registers else None
    out = np.zeros_like(old)
    for first in range(0, len(unit.warps), 4):
        here = slice(first, first + 4)
        if some is not None and not some[here].any():
            continue
        lane, warps = 32 * first, unit.warps[here]
        columns = _described(unit, b[lane], np.arange(n), depth, transposed[1], kind, warps, instruction)
        if in_registers:
            left = fragments[here]
        else:
            left = np.stack(
                [
                    _described(
                        unit,
                        a[lane],
                        np.arange(16) + 16 * (w % 4),
                        depth,
                        transposed[0],
                        kind,
                        np.array([w]),
                        instruction,
                    )
                    for w in warps
                ]
            )
        product = left @ columns.T
        out[here] = product + old[here] if scale[lane] else product
    return to_sums(out)
