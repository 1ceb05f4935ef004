"""What each opcode does that touches memory, other lanes or tensor cores.

Modifiers that change nothing here:

    aligned, sync    every lane of the warp executes it: checked at each call (`warps.active_warps`)
    HINTS            of ld, st and cp.async: which caches keep the line, and how long (createpolicy)
    shared::cta      shared memory of the own block, which .shared means, too
    row, col         of mma: the only layout there is for these shapes
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.ptx.parser import Address, Instruction, Integer, Pair, Register, Sink, Symbol, Vector
from tests.ptx.storage import BITS

if TYPE_CHECKING:
    from tests.ptx.translator import BlockWriter

SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)$")
SHARED = ("shared", "shared::cta")
DEPTHS = {"bf16": 16, "f16": 16, "tf32": 8}  # of one product on tensor cores
HINTS = {"ca", "cg", "cs", "wb", "wt", "L1::no_allocate", "L2::cache_hint"} | {
    f"L1::evict_{when}" for when in ("normal", "unchanged", "first", "last")
}
PLAIN = {"f16": "b16", "bf16": "b16", "f32": "b32", "f64": "b64"}


def elements(operand: Any) -> list:
    return operand.elements if isinstance(operand, Vector) else [operand]


def array(w: BlockWriter, operand: Any) -> str:
    """A list of the registers of an operand, as bits."""
    return "[" + ", ".join(w.read(register, "b32") for register in elements(operand)) + "]"


def require(w: BlockWriter, x: Instruction, *pattern: Any) -> None:
    """The modifiers are those of `pattern`, in that order; a tuple lists what may stand in its place."""
    fits = len(pattern) == len(x.modifiers) and all(
        m in p if isinstance(p, tuple) else m == p for m, p in zip(x.modifiers, pattern, strict=True)
    )
    if not fits:
        raise w.unsupported(f"modifiers {x.modifiers}, wanted {pattern}")


def address(w: BlockWriter, operand: Address) -> str:
    base = operand.base
    if isinstance(base, Register) and BITS[w.program.kinds[base.index]] == 32:
        at = w.name(f"{w.read(base, 's32')}.astype(I8)")
    else:
        at = w.read(base, "s64")
    return w.name(f"{at} + {operand.offset}") if operand.offset else at


def access(w: BlockWriter, x: Instruction) -> tuple[str, str, int]:
    """(space, type, elements) of ld and st."""
    space, *vector, kind = (m for m in x.modifiers if m not in HINTS)
    if len(x.operands) != 2 + ("L2::cache_hint" in x.modifiers):  # the last one is the policy
        raise w.unsupported(f"{len(x.operands)} operands")
    n = int(vector[0][1:]) if vector and vector[0] in ("v2", "v4") else 1
    if len(vector) != (n > 1) or kind not in BITS or space not in ("param", "global", *SHARED):
        raise w.unsupported(f"modifiers {x.modifiers}")
    return "shared" if space in SHARED else space, kind, n


def create_policy(w: BlockWriter, x: Instruction) -> None:
    """What L2::cache_hint takes; nothing else reads it."""
    require(w, x, "fractional", ("L2::evict_last", "L2::evict_first", "L2::evict_normal", "L2::evict_unchanged"), "b64")
    w.write(x.operands[0], "b64", w.read(Integer(0), "b64"))


def load(w: BlockWriter, x: Instruction) -> None:
    space, kind, n = access(w, x)
    destinations, where, size = elements(x.operands[0]), x.operands[1], BITS[kind] // 8
    if len(destinations) != n:
        raise w.unsupported(f"{len(destinations)} destinations")
    if space == "param":
        if not isinstance(where.base, Symbol) or n > 1:
            raise w.unsupported("only a parameter itself can be read")
        found = w.name(f'U.parameter("{where.base.name}", {where.offset}, {size})')
    else:
        w.touch(space, size)
        found = w.name(f"M.load_{space}(U, {address(w, where)}, {w.guard}, {size}, {n}, {w.instruction})")
    kind = PLAIN.get(kind, kind)
    for i, destination in enumerate(destinations):
        view = f".view(I{size})" if kind.startswith("s") else ""
        w.write(destination, kind, f"{found}[{i}]{view}")


def store(w: BlockWriter, x: Instruction) -> None:
    space, kind, n = access(w, x)
    where, sources, size = x.operands[0], elements(x.operands[1]), BITS[kind] // 8
    if len(sources) != n or space == "param":
        raise w.unsupported(f"{len(sources)} sources to {space}")
    w.touch(space, size)
    data = "[" + ", ".join(w.read(source, f"b{BITS[kind]}") for source in sources) + "]"
    w.statement(f"M.store_{space}(U, {address(w, where)}, {data}, {w.guard}, {size}, {w.instruction})")


def member_mask(w: BlockWriter, operand: Any) -> str:
    if isinstance(operand, Integer) and operand.value & 0xFFFFFFFF == 0xFFFFFFFF:
        return "None"
    return w.read(operand, "b32")


def shuffle(w: BlockWriter, x: Instruction) -> None:
    require(w, x, "sync", ("bfly", "idx", "up", "down"), "b32")
    first, *rest = x.operands
    d, within = first.elements if isinstance(first, Pair) else (first, Sink())
    a = w.read(rest[0], "b32")
    if isinstance(rest[1], Integer) and isinstance(rest[2], Integer):
        b, c = (operand.value & 0xFFFFFFFF for operand in rest[1:3])
    else:
        b, c = (w.read(operand, "b32") for operand in rest[1:3])
    found = w.name(
        f'warps.shuffle(U, "{x.modifiers[1]}", {a}, {b}, {c}, {member_mask(w, rest[3])}, {w.guard}, {w.instruction})'
    )
    w.write(d, "b32", f"{found}[0]")
    w.write(within, "pred", f"{found}[1]")


def reduce(w: BlockWriter, x: Instruction) -> None:
    require(w, x, "sync", ("add", "min", "max"), ("s32", "u32", "f32"))
    how, kind = x.modifiers[1:]
    d, a, mask = x.operands
    if kind == "f32" and how == "add":
        raise w.unsupported("a sum of floats")
    value = w.read(a, kind)
    w.write(d, kind, f'warps.reduce(U, "{how}", {value}, {member_mask(w, mask)}, {w.guard}, {w.instruction})')


def synchronise(w: BlockWriter, x: Instruction) -> None:
    require(w, x, "warp", "sync")
    if member_mask(w, x.operands[0]) != "None":
        raise w.unsupported("of some lanes of a warp")
    w.statement(f"warps.synchronise(U, {w.guard}, {w.instruction})")


def fence(w: BlockWriter, x: Instruction) -> None:
    require(w, x, "proxy", "async", SHARED)
    w.statement(f"tensor_cores.fence_proxy(U, {w.guard})")


def matrices(w: BlockWriter, x: Instruction, registers: list) -> bool:
    """Checks ldmatrix and stmatrix; whether matrices are transposed."""
    transposed = "trans" in x.modifiers
    middle = ["trans"] if transposed else []
    require(w, x, "sync", "aligned", "m8n8", ("x1", "x2", "x4"), *middle, SHARED, "b16")
    if len(registers) != int(x.modifiers[3][1:]):
        raise w.unsupported(f"{len(registers)} registers")
    w.touch("shared", 16)
    return transposed


def load_matrices(w: BlockWriter, x: Instruction) -> None:
    registers = elements(x.operands[0])
    transposed = matrices(w, x, registers)
    at = address(w, x.operands[1])
    found = w.name(f"tensor_cores.load_matrices(U, {at}, {len(registers)}, {transposed}, {w.guard}, {w.instruction})")
    for i, register in enumerate(registers):
        w.write(register, "b32", f"{found}[{i}]")


def store_matrices(w: BlockWriter, x: Instruction) -> None:
    transposed = matrices(w, x, elements(x.operands[1]))
    at, data = address(w, x.operands[0]), array(w, x.operands[1])
    w.statement(f"tensor_cores.store_matrices(U, {at}, {data}, {transposed}, {w.guard}, {w.instruction})")


def matrix_product(w: BlockWriter, x: Instruction) -> None:
    """mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32."""
    kind = x.modifiers[-2]
    shape = f"m16n8k{DEPTHS.get(kind)}"
    require(w, x, "sync", "aligned", shape, "row", "col", "f32", tuple(DEPTHS), kind, "f32")
    d, *sources = x.operands
    if [len(elements(operand)) for operand in x.operands] != [4, 4, 2, 4]:
        raise w.unsupported("wanted 4, 4, 2 and 4 registers")
    a, b, c = (array(w, operand) for operand in sources)
    found = w.name(f'tensor_cores.mma(U, "{kind}", {a}, {b}, {c}, {w.guard}, {w.instruction})')
    for i, register in enumerate(elements(d)):
        w.write(register, "b32", f"{found}[{i}]")


def group_product(w: BlockWriter, x: Instruction) -> None:
    """wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {d}, a, b, scale-d, 1, 1, transposed a, transposed b."""
    match x.modifiers:
        case ["fence", "sync", "aligned"]:  # orders registers, which are written at once here
            return
        case ["commit_group", "sync", "aligned"]:
            return w.statement("U.products.commit()")
        case ["wait_group", "sync", "aligned"]:
            return w.statement(f"U.products.wait(U, {x.operands[0].value})")
    kind = x.modifiers[-1]
    require(w, x, "mma_async", "sync", "aligned", x.modifiers[3], "f32", tuple(DEPTHS), kind)
    rows, n, depth = (int(number) for number in SHAPE.match(x.modifiers[3]).groups())
    d, a, b, scale, scale_a, scale_b, *transposed = x.operands
    wanted = 0 if kind == "tf32" else 1 if isinstance(a, Vector) else 2
    if len(transposed) != wanted:
        raise w.unsupported(f"{len(transposed)} operands say what is transposed, wanted {wanted}")
    one = Integer(1)
    if (rows, depth) != (64, DEPTHS[kind]) or len(d.elements) != n // 2 or not scale_a == scale_b == one:
        raise w.unsupported("shape, or scales of A and B other than 1")
    left = array(w, a) if isinstance(a, Vector) else w.read(a, "b64")
    transposed = (0, 0, *(operand.value for operand in transposed))[-2:]  # A in registers and tf32 cannot be
    w.touch("shared", 16)
    if isinstance(a, Vector):
        w.touch_sums(a)
    w.statement(f"U.products.start({w.program.sums_in(d)})")
    found = w.name(
        f'tensor_cores.wgmma(U, ({n}, {depth}), "{kind}", {array(w, d)}, {left}, {w.read(b, "b64")}, '
        f"{w.read(scale, 'pred')}, {transposed}, {w.guard}, {w.instruction})"
    )
    for i, register in enumerate(d.elements):
        w.write(register, "b32", f"{found}[{i}]")


def copy(w: BlockWriter, x: Instruction) -> None:
    """cp.async.cg.shared.global [to], [from], 16, bytes to read."""
    match x.modifiers:
        case ["async", "commit_group"]:
            return w.statement(f"U.copies.commit(U, {w.guard}, {w.instruction})")
        case ["async", "wait_group"]:
            count = x.operands[0].value
            return w.statement(f"U.copies.wait(U, {count}, {w.guard}, {w.instruction})")
    require(w, x, "async", ("ca", "cg"), SHARED, "global")
    to, source, size, *take = x.operands
    if size.value not in (4, 8, 16) or len(take) > 1:
        raise w.unsupported(f"{size.value} bytes")
    w.touch("shared", size.value)
    w.touch("global", size.value)
    count = w.read(take[0], "u32") if take else "None"
    w.statement(
        f"U.copies.issue(U, {address(w, to)}, {address(w, source)}, {size.value}, {count}, {w.guard}, {w.instruction})"
    )


TRANSFERS: dict[str, Callable[[BlockWriter, Instruction], None]] = {
    "ld": load,
    "st": store,
    "shfl": shuffle,
    "redux": reduce,
    "bar": synchronise,
    "fence": fence,
    "ldmatrix": load_matrices,
    "stmatrix": store_matrices,
    "mma": matrix_product,
    "wgmma": group_product,
    "cp": copy,
    "createpolicy": create_policy,
}
