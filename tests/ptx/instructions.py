"""What each opcode on registers does. (`transfers.py`: those that touch memory, other lanes or tensor cores.)

A handler gets the writer of the block and the instruction, reads operands, and writes expressions of numpy. Every
modifier must be known, or the instruction is Unsupported. These are known and change nothing:

    rn       round to nearest even, as numpy does; a default that Triton often writes out
    lo       of mul and mad: the lower half of the product, as numpy's product of integers is
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.ptx.arithmetic import COMPARISONS
from tests.ptx.parser import Instruction, Integer, Vector
from tests.ptx.storage import BITS, FLOATS, PACKED, storage_name, unsigned

if TYPE_CHECKING:
    from tests.ptx.translator import BlockWriter

FMA = {"f16": "fma_f16", "bf16": "fma_bf16", "f32": "fma", "f64": "fma_f64"}
INTEGER_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
WHOLE = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
# cvt between floats, by (to, from); those to a narrower type need .rn.
WIDENING = {("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f32", "f32"), ("f64", "f64")}
NARROWING = {("f32", "f64"), ("f16", "f32"), ("bf16", "f32")}
Template = Callable[..., str]


def modifiers(w: BlockWriter, x: Instruction, *known: str) -> tuple[list[str], set[str]]:
    """(types, other modifiers) of an instruction, all of which must be `known`."""
    types = [m for m in x.modifiers if m in BITS]
    others = [m for m in x.modifiers if m not in BITS]
    unknown = [m for m in others if m not in known]
    if unknown or not types or len(set(others)) < len(others):
        raise w.unsupported(f"modifiers {unknown or x.modifiers}")
    return types, set(others)


def as_number(w: BlockWriter, operand: Any, ptx_type: str, flushed: bool = False) -> str:
    """The operand as an array that numpy computes with: bf16 as float32."""
    value = w.read(operand, ptx_type)
    if ptx_type == "bf16":
        return f"from_bf16({value})"
    return f"flush({value})" if flushed else value


def write_number(w: BlockWriter, operand: Any, ptx_type: str, expression: str, flushed: bool = False) -> None:
    if ptx_type == "bf16":
        expression = f"to_bf16({expression})"
    w.write(operand, ptx_type, f"flush({expression})" if flushed else expression)


def elementwise(w: BlockWriter, x: Instruction, templates: dict[str, Template], *known: str) -> None:
    """d = f(a, b, ...), where `templates` has f by type, or for all "floats" or "integers".

    Also of packed halves (f16x2, bf16x2), of two float32 in 64 bits (f32x2), and of halves that are added to a float32
    (two types: of the last operand and the result, and of the others).
    """
    types, flags = modifiers(w, x, "rn", *known)
    kind, flushed = types[-1], "ftz" in flags
    scalar = PACKED.get(kind, "f32" if kind == "f32x2" else kind)
    single = types[0] if len(types) == 2 else scalar  # the type in which it is computed
    template = templates.get(single) or templates.get("floats" if single in FLOATS else "integers")
    if template is None or len(types) > 2 or (flushed and scalar != "f32"):
        raise w.unsupported(f"types {types}, modifiers {sorted(flags)}")
    d, *operands = x.operands
    if len(types) == 2:
        if types[0] != "f32" or kind not in ("f16", "bf16") or flushed:
            raise w.unsupported(f"types {types}")
        values = [f"{as_number(w, a, kind)}.astype(F4)" for a in operands[:-1]] + [w.read(operands[-1], "f32")]
        w.write(d, "f32", template(*values))
    elif kind in PACKED:
        values = [w.name(f"{w.read(a, 'b32')}.view(U2)") for a in operands]
        numbers = [f"from_bf16({v})" if scalar == "bf16" else f"{v}.view(F2)" for v in values]
        result = template(*numbers)
        result = f"to_bf16({result})" if scalar == "bf16" else f"({result})"
        w.write(d, "b32", f"{result}.view(U4)")
    elif kind == "f32x2":
        values = [f"{w.read(a, 'b64')}.view(F4)" for a in operands]
        values = [f"flush({v})" for v in values] if flushed else values
        result = template(*values)
        w.write(d, "b64", f"flush({result}).view(U8)" if flushed else f"({result}).view(U8)")
    else:
        values = [as_number(w, a, kind, flushed) for a in operands]
        write_number(w, d, kind, template(*values), flushed)


def simple(templates: dict[str, Template], *known: str) -> Callable[[BlockWriter, Instruction], None]:
    return lambda w, x: elementwise(w, x, templates, *known)


def both(template: Template) -> dict[str, Template]:
    return {"floats": template, "integers": template}


def multiply(w: BlockWriter, x: Instruction) -> None:
    types, flags = modifiers(w, x, "rn", "ftz", "lo", "hi", "wide")
    kind = types[-1]
    if "hi" in flags:
        elementwise(w, x, {"integers": _call("multiply_high")}, "hi")
        return
    if "wide" not in flags:
        elementwise(w, x, both(lambda a, b: f"({a} * {b})"), "ftz", "lo")
        return
    product = f"multiply_wide({w.read(x.operands[1], kind)}, {w.read(x.operands[2], kind)})"
    w.write(x.operands[0], f"{kind[0]}{2 * BITS[kind]}", product)


def multiply_add(w: BlockWriter, x: Instruction) -> None:
    """mad of integers."""
    (kind,), flags = modifiers(w, x, "lo", "wide")
    wide = f"{kind[0]}{2 * BITS[kind]}" if "wide" in flags else kind
    a, b, c = w.read(x.operands[1], kind), w.read(x.operands[2], kind), w.read(x.operands[3], wide)
    if kind in FLOATS or len(flags) != 1:
        raise w.unsupported("mad of integers has .lo or .wide")
    w.write(x.operands[0], wide, f"multiply_wide({a}, {b}) + {c}" if "wide" in flags else f"{a} * {b} + {c}")


def fused(w: BlockWriter, x: Instruction) -> None:
    elementwise(w, x, {kind: _call(name) for kind, name in FMA.items()}, "ftz")


def _call(name: str) -> Template:
    return lambda *values: f"{name}({', '.join(values)})"


def divide(w: BlockWriter, x: Instruction) -> None:
    if "full" in x.modifiers:
        elementwise(w, x, {"f32": _call("U.approximate.div")}, "full", "ftz")
    elif x.modifiers[-1] in FLOATS and "rn" not in x.modifiers:
        raise w.unsupported("division of floats has .rn or .full")
    else:
        elementwise(w, x, {"f32": "({} / {})".format, "f64": "({} / {})".format, "integers": _call("quotient")}, "ftz")


def extreme(name: str) -> Callable[[BlockWriter, Instruction], None]:
    """min, max of two, and from sm_100 on of three float32: a number wins over NaN, but with .NaN the NaN wins."""

    def handler(w: BlockWriter, x: Instruction) -> None:
        nan = "nan_" if "NaN" in x.modifiers else ""
        if len(x.operands) == 4 and x.modifiers[-1] != "f32":
            raise w.unsupported("three operands that are not f32")
        templates = {"floats": lambda *values: functools.reduce(_call(nan + name), values)}
        elementwise(w, x, templates if nan else {**templates, "integers": _call(f"np.{name}")}, "ftz", "NaN")

    return handler


def reciprocal(w: BlockWriter, x: Instruction) -> None:
    if x.modifiers == ["approx", "ftz", "f64"]:
        w.write(x.operands[0], "f64", f"rcp_f64({w.read(x.operands[1], 'f64')})")
    else:
        approximate("rcp", "(1 / {})")(w, x)


def approximate(name: str, exact: str = "") -> Callable[[BlockWriter, Instruction], None]:
    """An opcode with .approx; `exact` is the expression for .rn, if there is one."""

    def handler(w: BlockWriter, x: Instruction) -> None:
        if "approx" in x.modifiers:
            elementwise(w, x, {"f32": _call(f"U.approximate.{name}")}, "approx", "ftz")
        elif exact and "rn" in x.modifiers:
            elementwise(w, x, {"f32": exact.format, "f64": exact.format}, "ftz")
        else:
            raise w.unsupported(f"only .approx{' and .rn' if exact else ''} is known")

    return handler


def logic(template: Template) -> Callable[[BlockWriter, Instruction], None]:
    def handler(w: BlockWriter, x: Instruction) -> None:
        (kind,), _ = modifiers(w, x)
        w.write(x.operands[0], kind, template(*(w.read(a, kind) for a in x.operands[1:])))

    return handler


def shift(name: str) -> Callable[[BlockWriter, Instruction], None]:
    """shl, shr, by constants without looking for shifts that are too wide."""

    def handler(w: BlockWriter, x: Instruction) -> None:
        (kind,), _ = modifiers(w, x)
        value, by = w.read(x.operands[1], kind), x.operands[2]
        if isinstance(by, Integer) and 0 <= by.value < BITS[kind]:
            sign = "<<" if name == "shift_left" else ">>"
            same = f"{storage_name(kind)[0].lower().replace('i', 's')}{BITS[kind]}"
            w.write(x.operands[0], kind, f"{value} {sign} {w.read(by, same)}")
        else:
            w.write(x.operands[0], kind, f"{name}({value}, {w.read(by, 'u32')})")

    return handler


def bit_field(w: BlockWriter, x: Instruction) -> None:
    (kind,), _ = modifiers(w, x)
    a, position, length = w.read(x.operands[1], kind), w.read(x.operands[2], "u32"), w.read(x.operands[3], "u32")
    w.write(x.operands[0], kind, f"bit_field({a}, {position}, {length})")


def permute(w: BlockWriter, x: Instruction) -> None:
    modifiers(w, x)
    a, b, c = (w.read(operand, "b32") for operand in x.operands[1:])
    w.write(x.operands[0], "b32", f"permute_bytes({a}, {b}, {c})")


def count_bits(w: BlockWriter, x: Instruction) -> None:
    (kind,), _ = modifiers(w, x)
    w.write(x.operands[0], "u32", f"np.bitwise_count({w.read(x.operands[1], kind)}).astype(U4)")


def set_predicate(w: BlockWriter, x: Instruction) -> None:
    how, kind = x.modifiers[0], x.modifiers[-1]
    rest = x.modifiers[1:-1]
    if rest not in ([], ["ftz"]) or (rest and kind != "f32") or kind not in BITS:
        raise w.unsupported(f"modifiers {x.modifiers}")
    if how not in (COMPARISONS if kind in FLOATS else INTEGER_COMPARISONS):
        raise w.unsupported(f"comparison {how} of {kind}")
    a, b = (as_number(w, operand, kind, bool(rest)) for operand in x.operands[1:])
    if kind in FLOATS:
        w.write(x.operands[0], "pred", f'compare({a}, {b}, "{how}")')
    else:
        w.write(x.operands[0], "pred", f"({a} {INTEGER_COMPARISONS[how]} {b})")


def select(w: BlockWriter, x: Instruction) -> None:
    (kind,), _ = modifiers(w, x)
    a, b, p = w.read(x.operands[1], kind), w.read(x.operands[2], kind), w.read(x.operands[3], "pred")
    w.write(x.operands[0], kind, f"where({p}, {a}, {b})")


def move(w: BlockWriter, x: Instruction) -> None:
    (kind,), _ = modifiers(w, x)
    d, a = x.operands
    if isinstance(a, Vector):  # the first element has the lowest bits
        parts = [w.read(part, f"b{BITS[kind] // len(a.elements)}") for part in a.elements]
        packed = f"np.stack(({', '.join(parts)}), -1).view({unsigned(BITS[kind])}).ravel()"
        w.write(d, f"b{BITS[kind]}", packed)
    elif isinstance(d, Vector):
        n = len(d.elements)
        each = BITS[kind] // n
        parts = w.name(f"{w.read(a, f'b{BITS[kind]}')}.view({unsigned(each)})")
        for i, element in enumerate(d.elements):
            w.write(element, f"b{each}", f"np.ascontiguousarray({parts}[{i}::{n}])")
    else:
        w.write(d, kind, w.read(a, kind))


def convert(w: BlockWriter, x: Instruction) -> None:
    types, flags = modifiers(w, x, "rn", "ftz", *WHOLE)
    if len(x.operands) != (3 if types[0] in PACKED else 2):
        raise w.unsupported(f"{len(x.operands)} operands")
    if types[0] in PACKED:
        convert_two(w, x, types, flags)
        return
    to, source = types
    d, a = x.operands
    whole = flags & set(WHOLE)
    flushed = "ftz" in flags
    if flushed and "f32" not in types:
        raise w.unsupported("ftz without f32")
    if to in FLOATS and source in FLOATS:
        if (to, source) not in WIDENING | NARROWING or ((to, source) in NARROWING) != ("rn" in flags):
            raise w.unsupported(f"cvt of {source} to {to} with {sorted(flags)}")
        value = as_number(w, a, source, flushed and source == "f32")
        if whole:
            if to != source:
                raise w.unsupported("rounds to a whole number and to another type")
            value = f"np.{WHOLE[whole.pop()]}({value})"
        value = value if to in ("bf16", source) else f"({value}).astype({storage_name(to)})"
        write_number(w, d, to, value, flushed and to == "f32")
    elif source in FLOATS:
        (how,) = whole
        value = as_number(w, a, source, flushed)
        w.write(d, to, f"to_integer(np.{WHOLE[how]}({value}.astype(F8)), {storage_name(to)})")
    elif to in FLOATS:
        exact = f"{w.read(a, source)}.astype(F8)"  # of integers of 32 bits
        if flags != {"rn"} or (to in ("f16", "bf16") and BITS[source] > 32):
            raise w.unsupported(f"cvt of {source} to {to} with {sorted(flags)}")
        if to == "bf16":
            write_number(w, d, to, f"float32_to_odd({exact})")
        elif to == "f16":
            w.write(d, to, f"{exact}.astype(F2)")
        else:
            w.write(d, to, f"{w.read(a, source)}.astype({storage_name(to)})")
    elif flags:
        raise w.unsupported(f"modifiers {sorted(flags)}")
    else:  # the sign of the source extends it
        w.write(d, to, f"{w.read(a, source)}.astype({storage_name(to)})")


def convert_two(w: BlockWriter, x: Instruction, types: list[str], flags: set[str]) -> None:
    """cvt.rn.bf16x2.f32 d, high, low."""
    if types[1:] != ["f32"] or flags != {"rn"}:
        raise w.unsupported(f"cvt of {types[1:]} to {types[0]} with {sorted(flags)}")
    half = "to_bf16({})" if types[0] == "bf16x2" else "{}.astype(F2).view(U2)"
    high, low = (half.format(w.read(a, "f32")) for a in x.operands[1:])
    w.write(x.operands[0], "b32", f"np.stack(({low}, {high}), -1).view(U4).ravel()")


# How many operands an opcode has, the destination included.
OPERANDS = {
    "add": (3,), "sub": (3,), "mul": (3,), "mad": (4,), "fma": (4,), "div": (3,), "rem": (3,), "min": (3, 4),
    "max": (3, 4), "rsqrt": (2,), "createpolicy": (1, 2),
    "abs": (2,), "neg": (2,), "rcp": (2,), "sqrt": (2,), "ex2": (2,), "lg2": (2,), "and": (3,), "or": (3,), "xor": (3,),
    "not": (2,), "shl": (3,), "shr": (3,), "bfe": (4,), "prmt": (4,), "popc": (2,), "setp": (3,), "selp": (4,),
    "mov": (2,), "cvt": (2, 3), "ld": (2, 3), "st": (2, 3), "shfl": (5,), "redux": (3,), "bar": (1,), "fence": (0,),
    "ldmatrix": (2,), "stmatrix": (2,), "mma": (4,), "wgmma": (0, 1, 6, 7, 8), "cp": (0, 1, 3, 4), "bra": (1,),
    "ret": (0,), "exit": (0,), "barrier": (1,),
}  # fmt: skip
OPCODES: dict[str, Callable[[BlockWriter, Instruction], None]] = {
    "add": simple(both("({} + {})".format), "ftz"),
    "sub": simple(both("({} - {})".format), "ftz"),
    "mul": multiply,
    "mad": multiply_add,
    "fma": fused,
    "div": divide,
    "min": extreme("minimum"),
    "max": extreme("maximum"),
    "abs": simple(both(_call("np.abs")), "ftz"),
    "neg": simple(both("(-{})".format), "ftz"),
    "rem": simple({"integers": _call("remainder")}),
    "rcp": reciprocal,
    "rsqrt": approximate("rsqrt"),
    "sqrt": approximate("sqrt", "np.sqrt({})"),
    "ex2": approximate("ex2"),
    "lg2": approximate("lg2"),
    "and": logic("({} & {})".format),
    "or": logic("({} | {})".format),
    "xor": logic("({} ^ {})".format),
    "not": logic("(~{})".format),
    "shl": shift("shift_left"),
    "shr": shift("shift_right"),
    "bfe": bit_field,
    "prmt": permute,
    "popc": count_bits,
    "setp": set_predicate,
    "selp": select,
    "mov": move,
    "cvt": convert,
}
