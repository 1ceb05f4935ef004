"""From instructions to numpy: every basic block becomes a Python function over arrays with one element a lane.

A basic block runs from a label or a branch to the next one, so its instructions are executed one after the other by
the same lanes. It is translated twice, for all lanes and for those of a mask `m`. `add.f32 %r3, %r1, %r2` becomes

    v1 = R[1].view(F4)
    v2 = R[2].view(F4)
    v3 = (v1 + v2)                 # where(m, (v1 + v2), R[3].view(F4)) under a mask
    R[3] = v3

where R is the list of registers. A register keeps its name as long as it is not written, is viewed once as each type,
and goes back to R once, at the end; one that no other block reads does not go back at all, and needs no mask.

Lanes that part at a branch meet again at the nearest block that every way leads through (the immediate
post-dominator), as a GPU's compiler arranges it.
"""

import hashlib
from typing import Any

import numpy as np

from tests.ptx import arithmetic, tensor_cores, warps
from tests.ptx.instructions import OPCODES, OPERANDS
from tests.ptx.parser import (
    Address,
    Float,
    Instruction,
    Integer,
    Kernel,
    Not,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from tests.ptx.storage import BITS, BY_NAME, Unsupported, storage_name, unsigned
from tests.ptx.transfers import TRANSFERS

ENDS = {"bra", "ret", "exit"}  # and bar.sync
HANDLERS = {**OPCODES, **TRANSFERS}


def ends_block(x: Instruction) -> bool:
    return x.opcode in ENDS or is_barrier(x)


def is_barrier(x: Instruction) -> bool:
    return x.opcode in ("bar", "barrier") and x.modifiers[0] != "warp"


def is_under_way(x: Instruction, before: bool) -> bool:
    """Whether a wgmma may be under way behind an instruction."""
    if x.opcode != "wgmma":
        return before
    if x.modifiers[0] == "wait_group":
        return before and x.operands != [Integer(0)]
    return before or x.modifiers[0] == "mma_async"


def registers_in(operand: Any) -> set[int]:
    match operand:
        case Register(index):
            return {index}
        case Vector(elements) | Pair(elements):
            return {index for element in elements for index in registers_in(element)}
        case Not(inner):
            return registers_in(inner)
        case Address(base, _):
            return registers_in(base)
    return set()


class Block:
    """Instructions, and the one that says where to go on, if there is one."""

    def __init__(self, instructions: list[Instruction]):
        self.end = instructions[-1] if ends_block(instructions[-1]) else None
        self.instructions = instructions
        self.full = self.masked = None  # functions, made when they are first called


class Program:
    """A kernel, ready to be launched.

    Attributes:
        kernel: what was parsed.
        blocks: basic blocks; `barriers` are the numbers of those that end at a bar.sync, in the order of the text.
        meet: for each block the one where lanes meet that part at its end.
        granules: bytes of the smallest access to "global" and "shared" memory.
        sums: registers to which a wgmma adds; `under_way` says of each block whether one may not have ended before it.
        constants, specials: registers beyond the kernel's own, by (value, bits) and by name.
    """

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.kinds = dict(kernel.registers)
        self.constants: dict[tuple[int, int], int] = {}
        self.specials: dict[str, int] = {}
        self.granules = {"global": 16, "shared": 16}
        self.labels: dict[str, int] = {}
        parts: list[list[Instruction]] = [[]]
        for item in kernel.items:
            if isinstance(item, str):
                if parts[-1]:
                    parts.append([])
                self.labels[item] = len(parts) - 1
            else:
                parts[-1].append(item)
                if ends_block(item):
                    parts.append([])
        self.blocks = [Block(part) for part in parts if part]
        self.barriers = [i for i, block in enumerate(self.blocks) if block.end is not None and is_barrier(block.end)]
        self.instructions = kernel.instructions()
        self._numbers = {id(x): number for number, x in enumerate(self.instructions)}
        opcodes = {x.opcode for x in self.instructions}
        self.asynchronous, self.proxied = "cp" in opcodes, "wgmma" in opcodes
        self._check_ends()
        self.sums = {
            register
            for x in self.instructions
            if x.opcode == "wgmma" and x.modifiers[0] == "mma_async"
            for register in registers_in(x.operands[0])
        }
        self.under_way = self._find_under_way()
        self.meet = self._find_meetings()
        self.local: set[int] = set()
        self._find_local()
        self._names = {
            **BY_NAME, **vars(arithmetic), "np": np, "where": np.where, "tensor_cores": tensor_cores, "warps": warps,
            "I": self.instructions,
        }  # fmt: skip

    def _check_ends(self) -> None:
        for block in self.blocks:
            x = block.end
            if x is None:
                continue
            known = {
                "bra": [[], ["uni"]],
                "ret": [[]],
                "exit": [[]],
                "bar": [["sync"]],
                "barrier": [["sync", "aligned"]],
            }
            if x.modifiers not in known[x.opcode] or len(x.operands) not in OPERANDS[x.opcode]:
                raise Unsupported(f"{x}")
            if x.opcode == "bra" and x.operands[0].name not in self.labels:
                raise Unsupported(f"{x}: no such label")
            if is_barrier(x) and (x.guard is not None or x.operands != [Integer(0)]):
                raise Unsupported(f"{x}: only barrier 0, of all threads, without a condition")

    def _find_meetings(self) -> list[int]:
        """The immediate post-dominator of each block; len(blocks) is the end. Sets of blocks are bits of an integer."""
        n = len(self.blocks)
        after = [(1 << (n + 1)) - 1] * n + [1 << n]
        changed = True
        while changed:
            changed = False
            for i in range(n - 1, -1, -1):
                common = (1 << (n + 1)) - 1
                for j in self._ways(i):
                    common &= after[j]
                common |= 1 << i
                if common != after[i]:
                    after[i], changed = common, True
        meet = []
        for i in range(n):
            others = after[i] & ~(1 << i)
            # The nearest of them is followed by all others.
            meet.append(
                max((j for j in range(n + 1) if others >> j & 1), key=lambda j: after[j].bit_count(), default=n)
            )
        return meet

    def _ways(self, i: int) -> list[int]:
        x = self.blocks[i].end
        if x is None or is_barrier(x):
            return [i + 1]
        to = self.labels[x.operands[0].name] if x.opcode == "bra" else len(self.blocks)
        return [to] if x.guard is None else [to, i + 1]

    def sums_in(self, *operands: Any) -> tuple[int, ...]:
        """The registers of these operands to which a wgmma adds."""
        return tuple(sorted(self.sums & {register for operand in operands for register in registers_in(operand)}))

    def _find_under_way(self) -> list[bool]:
        """For each block whether a wgmma may be under way where it begins."""
        under_way, changed = [False] * (len(self.blocks) + 1), self.proxied
        while changed:
            changed = False
            for i, block in enumerate(self.blocks):
                now = under_way[i]
                for x in block.instructions:
                    now = is_under_way(x, now)
                for j in self._ways(i) if now else ():
                    changed |= not under_way[j]
                    under_way[j] = True
        return under_way

    def _find_local(self) -> None:
        """Registers that one block writes before it reads them, and no other block mentions.

        Translating every block once also finds whatever is not supported.
        """
        seen: dict[int, int] = {}
        for index in range(len(self.blocks)):
            writer = self._translate(index, masked=False)
            for register, written_first in writer.first_use.items():
                if written_first and register not in seen:
                    self.local.add(register)
                else:
                    self.local.discard(register)
                seen[register] = index

    def _translate(self, index: int, masked: bool) -> "BlockWriter":
        writer, block, under_way = BlockWriter(self, masked), self.blocks[index], self.under_way[index]
        for x in block.instructions:
            if x is block.end:
                break
            handler = HANDLERS.get(x.opcode)
            if handler is None:
                raise Unsupported(f"{x}: opcode {x.opcode}")
            if len(x.operands) not in OPERANDS[x.opcode]:
                raise Unsupported(f"{x}: {len(x.operands)} operands")
            writer.begin(x)
            try:
                if under_way and x.opcode != "wgmma":
                    writer.touch_sums(*x.operands)
                under_way = is_under_way(x, under_way)
                handler(writer, x)
            except (IndexError, KeyError, ValueError, AttributeError, StopIteration) as error:
                raise Unsupported(f"{x}: {type(error).__name__} {error}") from error
        writer.finish(block.end)
        return writer

    def function(self, index: int, masked: bool) -> Any:
        """f(U, R, m) of block `index`: runs it on unit U with registers R; returns the condition of its branch."""
        block = self.blocks[index]
        made = block.masked if masked else block.full
        if made is None:
            lines = ["def f(U, R, m):", "    M = U.memory"]
            lines += [f"    {line}" for line in self._translate(index, masked).lines]
            space: dict[str, Any] = {}
            exec(compile("\n".join(lines), f"<{self.kernel.name}, block {index}>", "exec"), self._names, space)
            made = space["f"]
            if masked:
                block.masked = made
            else:
                block.full = made
        return made

    def constant(self, value: int, bits: int) -> int:
        key = (value & ((1 << bits) - 1), bits)
        if key not in self.constants:
            self.constants[key] = len(self.kinds)
            self.kinds[len(self.kinds)] = f"b{bits}" if bits > 1 else "pred"
        return self.constants[key]

    def special(self, name: str) -> int:
        if name not in self.specials:
            self.specials[name] = len(self.kinds)
            self.kinds[len(self.kinds)] = "b32"
        return self.specials[name]

    def number(self, x: Instruction) -> int:
        return self._numbers[id(x)]


class BlockWriter:
    """Writes the Python of one block. Handlers of opcodes call `read`, `write`, `name` and `statement`."""

    def __init__(self, program: Program, masked: bool):
        self.program, self.masked = program, masked
        self.lines: list[str] = []
        self.guard: str | None = None  # name of the mask of the present instruction, None for all lanes
        self.first_use: dict[int, bool] = {}  # register -> whether it is written, by every lane, before it is read
        self._instruction: Instruction | None = None
        self._known: dict[int, dict[str, str]] = {}  # register -> numpy type -> variable
        self._latest: dict[int, str] = {}  # register -> variable that was written last
        self._guards: dict[tuple[int, bool], str] = {}

    # --- for the handlers

    @property
    def instruction(self) -> str:
        """The present instruction, as the code written here calls it."""
        return f"I[{self.program.number(self._instruction)}]"

    def unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"{self._instruction}: {what}")

    def statement(self, text: str) -> None:
        self.lines.append(text)

    def name(self, expression: str) -> str:
        """A variable that holds the expression."""
        variable = f"v{len(self.lines)}"
        self.lines.append(f"{variable} = {expression}")
        return variable

    def touch(self, space: str, size: int) -> None:
        """An access of `size` bytes is made to that space."""
        self.program.granules[space] = min(self.program.granules[space], size)

    def touch_sums(self, *operands: Any) -> None:
        """The present instruction reads or writes these operands, which a wgmma may still be adding to."""
        if registers := self.program.sums_in(*operands):
            self.statement(f"U.products.touch(U, {registers}, {self.instruction})")

    def read(self, operand: Any, ptx_type: str) -> str:
        """The operand as an array of the type's numpy type; bf16 as the bits that it is stored in."""
        bits, storage = BITS[ptx_type], storage_name(ptx_type)
        match operand:
            case Not(inner):
                return f"(~{self.read(inner, 'pred')})"
            case Register(index):
                pass
            case Special(name):
                index = self.program.special(name)
            case Integer(value):
                if storage.startswith("F"):
                    raise self.unsupported(f"integer {value} as {ptx_type}")
                index = self.program.constant(int(value != 0) if bits == 1 else value, bits)
            case Float(value, width):
                index = self.program.constant(value, width)
            case Symbol(name) if name in self.program.kernel.shared:
                index = self.program.constant(0, bits)
            case _:
                raise self.unsupported(f"operand {operand}")
        width = BITS[self.program.kinds[index]]
        if width == bits:
            return self._register(index, storage)
        if width < bits or isinstance(operand, Float) or ptx_type == "pred":
            raise self.unsupported(f"{width} bits as {ptx_type}")
        narrow = f"{self._register(index, unsigned(width))}.astype({unsigned(bits)})"
        return self.name(narrow if storage == unsigned(bits) else f"{narrow}.view({storage})")

    def write(self, operand: Any, ptx_type: str, expression: str) -> None:
        """Give the operand the value of an expression of the type's numpy type. A wider register is extended."""
        if isinstance(operand, Sink):
            return
        if not isinstance(operand, Register):
            raise self.unsupported(f"destination {operand}")
        index, bits = operand.index, BITS[ptx_type]
        storage, width = storage_name(ptx_type), BITS[self.program.kinds[operand.index]]
        if bits > width:
            raise self.unsupported(f"{ptx_type} into a register of {width} bits")
        if bits < width:
            wide = f"I{width // 8}" if storage.startswith("I") else unsigned(width)
            plain = storage if storage.startswith("I") else unsigned(bits)
            expression, storage = f"({expression}).view({plain}).astype({wide})", wide
        predicated = self._instruction.guard is not None
        if predicated or (self.masked and index not in self.program.local):
            expression = f"where({self.guard}, {expression}, {self._register(index, storage)})"
        self.first_use.setdefault(index, True)
        variable = self.name(expression)
        self._guards.pop((index, False), None)
        self._guards.pop((index, True), None)
        self._known[index] = {storage: variable}
        self._latest[index] = variable

    # --- for the translation

    def begin(self, x: Instruction) -> None:
        self._instruction = x
        if x.guard is None:
            self.guard = "m" if self.masked else None
            return
        key = (x.guard.index, x.negated)
        if key not in self._guards:
            predicate = self._register(x.guard.index, "B1")
            expression = f"~{predicate}" if x.negated else predicate
            if self.masked:
                expression = f"({expression}) & m"
            self._guards[key] = self.name(expression)
        self.guard = self._guards[key]

    def finish(self, end: Instruction | None) -> None:
        condition = None
        if end is not None and end.guard is not None:
            predicate = self._register(end.guard.index, "B1")
            condition = f"~{predicate}" if end.negated else predicate
        self.lines += [f"R[{i}] = {name}" for i, name in self._latest.items() if i not in self.program.local]
        self.lines.append(f"return {condition}")

    def _register(self, index: int, storage: str) -> str:
        known = self._known.setdefault(index, {})
        if storage not in known:
            if index in self.program.kernel.registers:
                self.first_use.setdefault(index, False)
            here = self._latest.get(index, f"R[{index}]")
            known[storage] = self.name(here if storage == "B1" else f"{here}.view({storage})")
        return known[storage]


_programs: dict[bytes, Program] = {}


def program(ptx: str) -> Program:
    """The program of a PTX text; each text is translated once in a process."""
    key = hashlib.sha256(ptx.encode()).digest()
    if key not in _programs:
        _programs[key] = Program(Kernel(ptx))
    return _programs[key]
