"""How the types of PTX lie in numpy arrays.

A register of PTX is untyped storage of some width: `ld.global.b32 %r1` and `add.f32 %r2, %r1, %r1` read the same
register as bits and as a number. So a register is an array with one element a lane, and each instruction views it as
what it wants: `f32` as float32, `s32` as int32, `b32` as uint32. Predicates are arrays of bool. numpy has no bfloat16:
its registers are uint16, and arithmetic is done in float32 and rounded back (`arithmetic.py`).
"""

import numpy as np

BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
    "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
    "f32x2": 64,
}  # fmt: skip
FLOATS = {"f16", "bf16", "f32", "f64"}
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}  # two halves in one register of 32 bits

U1, U2, U4, U8 = (np.dtype(f"u{size}") for size in (1, 2, 4, 8))
I1, I2, I4, I8 = (np.dtype(f"i{size}") for size in (1, 2, 4, 8))
F2, F4, F8 = (np.dtype(f"f{size}") for size in (2, 4, 8))
B1 = np.dtype("?")
BY_NAME = {
    "U1": U1, "U2": U2, "U4": U4, "U8": U8, "I1": I1, "I2": I2, "I4": I4, "I8": I8, "F2": F2, "F4": F4, "F8": F8,
    "B1": B1,
}  # fmt: skip


def storage_name(ptx_type: str) -> str:
    """Name of the numpy type in which an instruction reads a register: "F4" for f32, "I8" for s64, "U2" for bf16."""
    if ptx_type == "pred":
        return "B1"
    size = BITS[ptx_type] // 8
    if ptx_type in ("f16", "f32", "f64"):
        return f"F{size}"
    return f"I{size}" if ptx_type.startswith("s") else f"U{size}"


def unsigned(bits: int) -> str:
    """Name of the unsigned numpy type of that width; of bool for one bit."""
    return "B1" if bits == 1 else f"U{bits // 8}"


class EmulationError(Exception):
    """What a GPU would stop for, or what leaves nothing sensible to go on with. The message begins with its kind."""


class Unsupported(EmulationError):
    """PTX that the emulator does not know. It is never passed over."""

    def __init__(self, text: str):
        super().__init__(f"unsupported: {text}")
