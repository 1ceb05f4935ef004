"""Kernels written by hand, for the tests of the emulator.

    report = run("ld.global.b32 %r1, [%rd0]; st.global.b32 [%rd1], %r1;", x, y, threads=64)

%rd0, %rd1, ... are the addresses of the arrays, %r0 is the thread's number, %rd20 that number as 64 bits, and `smem`
the shared memory.
"""

import re
import struct
from typing import Any

import numpy as np

from tests.ptx import Allocation, Launch, program
from tests.ptx.races import Report

REGISTER = {1: "rs", 2: "rs", 4: "r", 8: "rd"}  # by bytes


def text(body: str, arrays: int, threads: int, target: str = "sm_90a") -> str:
    params = ", ".join(f".param .u64 .ptr .global .align 1 array_{i}" for i in range(arrays))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [array_{i}];" for i in range(arrays))
    return f"""
.version 8.5
.target {target}
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel({params})
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %rs<32>;
.reg .b32 %r<300>;
.reg .b64 %rd<40>;
{loads}
mov.u32 %r0, %tid.x;
cvt.u64.u32 %rd20, %r0;
{body}
ret;
}}
"""


def run(
    body: str, *arrays: np.ndarray, threads: int = 32, blocks: int = 1, shared: int = 0, target: str = "sm_90a",
    **settings: Any,
) -> Report:  # fmt: skip
    """Run the body on arrays that it may read and write."""
    lines = re.sub(r";(?=[^\n])", ";\n", body)  # one instruction a line, for its number
    allocations = [Allocation(array.ctypes.data, array.nbytes, f"array {i}") for i, array in enumerate(arrays)]
    params = {f"array_{i}": struct.pack("<Q", array.ctypes.data) for i, array in enumerate(arrays)}
    prog = program(text(lines, len(arrays), threads, target))
    return Launch(prog, (blocks, 1, 1), threads, shared, params, allocations, **settings).run()


def address(name: str, array: int, size: int) -> str:
    """Instructions that put the address of this thread's element of an array into the register %`name`."""
    return f"mul.lo.s64 %{name}, %rd20, {size}; add.s64 %{name}, %{name}, %rd{array};"


def apply(instruction: str, dtype: str, *operands: np.ndarray, **settings: Any) -> np.ndarray:
    """Run `instruction` in one lane an element, and return what it gives as `dtype` ("?" for a predicate).

    In its text {d} is the destination and {a}, {b}, ... the operands, e.g. "add.f32 {d}, {a}, {b}".
    """
    count = len(operands[0])
    threads = -(-count // 32) * 32
    padded = [np.ascontiguousarray(np.concatenate([x, np.repeat(x[:1], threads - count)])) for x in operands]
    predicate = dtype == "?"
    out = np.zeros(threads, "u4" if predicate else dtype)
    lines, names = [], {}
    for i, x in enumerate(padded):
        size = x.dtype.itemsize
        names["abcd"[i]] = f"%{REGISTER[size]}{10 + i}"
        lines += [address("rd21", i, size), f"ld.global.b{8 * size} {names['abcd'[i]]}, [%rd21];"]
    size = out.dtype.itemsize
    names["d"] = "%p1" if predicate else f"%{REGISTER[size]}9"
    lines.append(instruction.format(**names) + ";")
    result = "%r9" if predicate else names["d"]
    if predicate:
        lines.append("selp.b32 %r9, 1, 0, %p1;")
    lines += [address("rd21", len(padded), size), f"st.global.b{8 * size} [%rd21], {result};"]
    report = run("\n".join(lines), *padded, out, threads=threads, lockstep=True, **settings)
    assert report.findings == []
    return out[:count] != 0 if predicate else out[:count]


def grid(*values: np.ndarray) -> list[np.ndarray]:
    """Every combination of the values."""
    return [np.ascontiguousarray(x.ravel()) for x in np.meshgrid(*values, indexing="ij")]
