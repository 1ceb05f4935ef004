"""Runs PTX as Triton emits it, on the CPU, in numpy: every lane of a warp (or of a whole block) is an array element.

What it checks beside the results:
  race     two warps touch the same bytes between two barriers and one of them writes (shared and global memory);
           two blocks of a launch touch the same bytes of global memory and one of them writes
  bounds   an access outside every tensor's storage, or past the shared memory of the launch
  align    a vector access not aligned to its own size (what a wrong divisibility would give)
  uninit   a read of shared memory that nothing wrote
  diverged a barrier or shuffle reached by some threads of the block or warp only
Registers start as garbage. Warps run one at a time between barriers, in an order chosen to be unkind, or all together.
"""

import ctypes
import hashlib
import re

import numpy as np

where = np.where

BITS = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
    "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32, "b64": 64, "f32x2": 64, "u64": 64, "s64": 64,
    "f64": 64,
}  # fmt: skip
NP = {
    "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16": "u2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4", "b64": "u8",
    "f32x2": "u8", "u64": "u8", "s64": "i8", "f64": "f8",
}  # fmt: skip
FLOATS = {"f16", "bf16", "f32", "f64"}
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|laneid|warpid|clusterid|cluster_ctaid|cluster_ctarank)(\.[xyz])?$")


class EmulationError(Exception):
    pass


class Unsupported(EmulationError):
    pass


# ---------------------------------------------------------------------------------------------------------- parsing


class Instr:
    __slots__ = ("pred", "negate", "op", "mods", "args", "text", "line")

    def __repr__(self):
        return self.text


def _split(text):
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += c
    if current.strip():
        parts.append(current.strip())
    return parts


class Kernel:
    """One entry function: parameters, registers and a flat list of instructions and labels."""

    def __init__(self, ptx):
        self.text = ptx
        text = re.sub(r"//[^\n]*", "", ptx)
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        self.target = int(re.search(r"\.target\s+sm_(\d+)", text)[1])
        self.globals = {}
        for m in re.finditer(r"\.(?:extern\s+)?\.?shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]", text):
            self.globals[m[1]] = 0
        if len(self.globals) > 1:
            raise Unsupported(f"several shared arrays: {list(self.globals)}")
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.S)
        self.name = entry[1]
        self.params = [(m[2], m[1]) for m in re.finditer(r"\.param\s+\.(\w+)\b[^,]*?(\w+)\s*(?:,|$)", entry[2].strip())]
        depth, at = 1, entry.end()
        while depth:
            c = text[at]
            depth += (c == "{") - (c == "}")
            at += 1
        self._body(text[entry.end() : at - 1], text[: entry.end()].count("\n"))

    def _body(self, body, first_line):
        self.registers = {}  # unique name -> (index, type)
        self.items = []  # Instr or label
        scopes, at, n = [{}], 0, len(body)
        while True:
            while at < n and body[at].isspace():
                at += 1
            if at >= n:
                break
            line = first_line + body.count("\n", 0, at) + 1 if False else 0
            if body[at] == "{":
                scopes.append({})
                at += 1
                continue
            if body[at] == "}":
                scopes.pop()
                at += 1
                continue
            m = re.compile(r"([$\w]+)\s*:(?!:)").match(body, at)
            if m:
                self.items.append(m[1])
                at = m.end()
                continue
            if re.compile(r"\.(loc|file|pragma|section|maxnreg|reqntid)\b").match(body, at):
                end = body.index("\n", at)
                at = end + 1
                continue
            end = body.index(";", at)
            statement = " ".join(body[at:end].split())
            at = end + 1
            if not statement:
                continue
            if statement.startswith(".reg"):
                kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement).groups()
                for name in _split(names):
                    m = re.match(r"(%?[\w$]+)<(\d+)>$", name)
                    for one in [f"{m[1]}{i}" for i in range(int(m[2]))] if m else [name]:
                        index = len(self.registers)
                        self.registers[index] = kind
                        scopes[-1][one] = index
                continue
            if statement.startswith("."):
                if statement.startswith((".local", ".shared")):
                    raise Unsupported(statement)
                continue
            self.items.append(self._instr(statement, scopes, line))

    def _instr(self, statement, scopes, line):
        x = Instr()
        x.text, x.line, x.pred, x.negate = statement, line, None, False
        if statement.startswith("@"):
            guard, statement = statement.split(None, 1)
            x.negate = guard.startswith("@!")
            x.pred = self._operand(guard.lstrip("@!"), scopes)
        op, _, rest = statement.partition(" ")
        x.op, *x.mods = op.split(".")
        # "L1::evict_last" and the like keep their colons within one part.
        x.args = [self._operand(a, scopes) for a in _split(rest)]
        return x

    def _operand(self, text, scopes):
        text = text.strip()
        if text.startswith("{"):
            return ("vec", [self._operand(t, scopes) for t in _split(text[1:-1])])
        if text.startswith("["):
            m = re.match(r"\[\s*([%$\w.]+)\s*(?:([+-])\s*(-?\w+)\s*)?\]$", text)
            if not m:
                raise Unsupported(f"address {text}")
            offset = int(m[3], 0) * (-1 if m[2] == "-" else 1) if m[3] else 0
            return ("mem", self._operand(m[1], scopes), offset)
        if "|" in text:
            return ("pair", [self._operand(t, scopes) for t in text.split("|")])
        if text == "_":
            return ("sink",)
        if text.startswith("!"):
            return ("not", self._operand(text[1:], scopes))
        for scope in reversed(scopes):
            if text in scope:
                return ("reg", scope[text])
        if SPECIAL.match(text):
            return ("special", text[1:])
        m = re.match(r"0[fF]([0-9a-fA-F]{8})$", text)
        if m:
            return ("bits", int(m[1], 16), 32)
        m = re.match(r"0[dD]([0-9a-fA-F]{16})$", text)
        if m:
            return ("bits", int(m[1], 16), 64)
        m = re.match(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?$", text)
        if m:
            return ("int", int(m[1], 0))
        return ("symbol", text)

    def opcodes(self):
        from collections import Counter

        return Counter(".".join([x.op, *x.mods]) for x in self.items if isinstance(x, Instr))


# ------------------------------------------------------------------------------------------------------- arithmetic


NOISE = False  # whether approximate operations err by as much as the manual allows, in a way that their input decides


def _unit(x):
    u = np.ascontiguousarray(x, "f4").view("u4")
    u = (u ^ (u >> np.uint32(15))) * np.uint32(2654435761)
    return ((u >> np.uint32(8)) & np.uint32(0xFFFF)).astype("f8") / 32768.0 - 1.0


def f_ex2(x):
    y = np.exp2(x.astype("f8"))
    return (y * (1.0 + _unit(x) * 2.0**-22) if NOISE else y).astype("f4")


def f_lg2(x):
    y = np.log2(x.astype("f8"))
    if NOISE:
        y = np.where((x > 0.5) & (x < 2.0), y + _unit(x) * 2.0**-22, y * (1.0 + _unit(x) * 2.0**-22))
    return y.astype("f4")


def f_near(y, x):
    """Of rcp.approx, sqrt.approx, div.full: one or two units in the last place."""
    return (y.astype("f8") * (1.0 + _unit(x) * 2.0**-23)).astype("f4") if NOISE else y


def f_ftz(x):
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def f_fma(x, y, z):
    if x.dtype == np.float32:
        return (x.astype("f8") * y.astype("f8") + z.astype("f8")).astype("f4")
    if x.dtype == np.float16:
        return (x.astype("f8") * y.astype("f8") + z.astype("f8")).astype("f2")
    p = x * y
    cx, cy = x * 134217729.0, y * 134217729.0
    xh, yh = cx - (cx - x), cy - (cy - y)
    xl, yl = x - xh, y - yh
    e = ((xh * yh - p) + xh * yl + xl * yh) + xl * yl
    s = p + z
    b = s - p
    t = (p - (s - b)) + (z - b)
    exact = s + (t + e)
    return np.where(np.isfinite(exact), exact, s)


def f_from_bf16(x):
    return (x.astype("u4") << np.uint32(16)).view("f4")


def f_to_bf16(x):
    u = np.ascontiguousarray(x, "f4").view("u4")
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype("u2")


def f_to_bf16_rz(x):
    return (np.ascontiguousarray(x, "f4").view("u4") >> np.uint32(16)).astype("u2")


def f_tf32(x):  # round to nearest, ties away
    u = x.view("u4")
    return np.where(np.isfinite(x), (u + np.uint32(0x1000)) & np.uint32(0xFFFFE000), u).astype("u4")


def f_to_int(x, how, dtype):
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how](x.astype("f8"))
    info = np.iinfo(dtype)
    high, low = x >= float(info.max), x <= float(info.min)
    inner = np.where(high | low | np.isnan(x), 0.0, x)
    y = inner.astype("i8").astype(dtype) if dtype != "u8" else inner.astype("u8")
    y = np.where(high, dtype_max(dtype), y)
    y = np.where(low, dtype_min(dtype), y)
    return y.astype(dtype)


def dtype_max(dtype):
    return np.array(np.iinfo(dtype).max, dtype)


def dtype_min(dtype):
    return np.array(np.iinfo(dtype).min, dtype)


def f_sat_int(x, dtype):
    info = np.iinfo(dtype)
    return np.clip(x, info.min, info.max).astype(dtype)


def f_div_int(x, y):
    zero = y == 0
    y = np.where(zero, np.ones_like(y), y)
    return np.where(
        zero, np.full_like(x, -1 if x.dtype.kind == "i" else np.iinfo(x.dtype).max), (x - np.fmod(x, y)) // y
    )


def f_rem_int(x, y):
    return np.where(y == 0, x, np.fmod(x, np.where(y == 0, np.ones_like(y), y)))


def f_shl(x, s):
    w = x.dtype.itemsize * 8
    return np.where(s < w, x << np.minimum(s, w - 1).astype(x.dtype), np.zeros_like(x))


def f_shr(x, s):
    w = x.dtype.itemsize * 8
    if x.dtype.kind == "i":
        return x >> np.minimum(s, w - 1).astype(x.dtype)
    return np.where(s < w, x >> np.minimum(s, w - 1).astype(x.dtype), np.zeros_like(x))


def f_mulhi(x, y):
    w = x.dtype.itemsize * 8
    wide = {16: "4", 32: "8"}.get(w)
    if wide:
        wide = x.dtype.kind + wide
        return ((x.astype(wide) * y.astype(wide)) >> np.array(w, wide)).astype(x.dtype)
    a, b = x.view("u8"), y.view("u8")
    m = np.uint64(0xFFFFFFFF)
    s = np.uint64(32)
    al, ah, bl, bh = a & m, a >> s, b & m, b >> s
    t = al * bl
    u = ah * bl + (t >> s)
    v = al * bh + (u & m)
    high = ah * bh + (u >> s) + (v >> s)
    if x.dtype.kind == "i":
        high = high - np.where(x < 0, b, 0) - np.where(y < 0, a, 0)
    return high.astype("u8").view(x.dtype)


def f_wide(x, y):
    wide = x.dtype.kind + str(x.dtype.itemsize * 2)
    return x.astype(wide) * y.astype(wide)


def f_prmt(a, b, c):
    both = (b.astype("u8") << np.uint64(32)) | a.astype("u8")
    out = np.zeros_like(a)
    for i in range(4):
        sel = (c >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> ((sel & np.uint32(7)).astype("u8") * np.uint64(8))) & np.uint64(255)).astype("u4")
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out = out | (np.where(sel & np.uint32(8), sign, byte).astype("u4") << np.uint32(8 * i))
    return out.astype("u4")


def f_lop3(a, b, c, lut):
    out = np.zeros_like(a)
    for i in range(8):
        if lut >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def f_shf(a, b, c, left, wrap):
    n = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype("u8")
    both = (b.astype("u8") << np.uint64(32)) | a.astype("u8")
    if left:
        return ((both << n) >> np.uint64(32)).astype("u4") if True else None
    return (both >> n).astype("u4")


def f_bfe(x, pos, length):
    w = x.dtype.itemsize * 8
    pos, length = np.minimum(pos & np.uint32(255), w), np.minimum(length & np.uint32(255), w)
    u = f_shr(x.view(f"u{w // 8}"), pos)
    one = np.array(1, u.dtype)
    mask = np.where(length >= w, ~np.zeros_like(u), (one << np.minimum(length, w - 1).astype(u.dtype)) - one)
    out = u & mask
    if x.dtype.kind == "i":
        top = np.minimum(pos + length - 1, w - 1)
        sign = (f_shr(x.view(u.dtype), top) & one).astype(bool) & (length > 0)
        out = np.where(sign, out | ~mask, out)
    return out.astype(u.dtype).view(x.dtype)


def f_bfi(a, b, pos, length):
    w = b.dtype.itemsize * 8
    pos, length = np.minimum(pos & np.uint32(255), w), np.minimum(length & np.uint32(255), w)
    one = np.array(1, b.dtype)
    mask = np.where(length >= w, ~np.zeros_like(b), (one << np.minimum(length, w - 1).astype(b.dtype)) - one)
    mask = f_shl(mask, pos)
    return (b & ~mask) | (f_shl(a, pos) & mask)


def f_popc(x):
    return np.bitwise_count(x).astype("u4")


def f_clz(x):
    w = x.dtype.itemsize * 8
    out = np.full(x.shape, w, "u4")
    for i in range(w):
        out = np.where(x >> np.array(i, x.dtype) & np.array(1, x.dtype), np.uint32(w - 1 - i), out)
    return out.astype("u4")


def f_brev(x):
    w = x.dtype.itemsize * 8
    out = np.zeros_like(x)
    one = np.array(1, x.dtype)
    for i in range(w):
        out |= ((x >> np.array(i, x.dtype)) & one) << np.array(w - 1 - i, x.dtype)
    return out


COMPARE = {
    "eq": "({} == {})", "ne": "({} != {})", "lt": "({} < {})", "le": "({} <= {})", "gt": "({} > {})",
    "ge": "({} >= {})", "lo": "({} < {})", "ls": "({} <= {})", "hi": "({} > {})", "hs": "({} >= {})",
}  # fmt: skip


def f_compare(x, y, how):
    nan = np.isnan(x) | np.isnan(y)
    if how == "num":
        return ~nan
    if how == "nan":
        return nan
    unordered = how.endswith("u") and how not in ("u",)
    base = how[:-1] if unordered else how
    result = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal
    }[base](x, y)  # fmt: skip
    return result | nan if unordered else result & ~nan


# ------------------------------------------------------------------------------------------------------- generation


class Block:
    __slots__ = ("instrs", "full", "masked", "end", "sources")


class Program:
    """A kernel translated to one Python function a basic block, twice: for all lanes, and for those of a mask."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.constants = {}  # (value, bits) -> register index past the kernel's own
        self.kinds = dict(kernel.registers)
        self.specials = {}
        self.param_reads = {}
        self.min_size = 16
        blocks, labels = [[]], {}
        ends = {"bra", "ret", "exit", "bar", "barrier", "trap"}
        for item in kernel.items:
            if isinstance(item, str):
                if blocks[-1]:
                    blocks.append([])
                labels[item] = len(blocks) - 1
            else:
                blocks[-1].append(item)
                if item.op in ends and not (item.op in ("bar", "barrier") and item.mods[0] == "warp"):
                    blocks.append([])
        if not blocks[-1]:
            blocks.pop()
        self.labels = labels
        self.blocks = []
        for instrs in blocks:
            block = Block()
            block.end, block.instrs = None, instrs
            lines = []
            for x in instrs:
                if x.op in ends and not (x.op in ("bar", "barrier") and x.mods[0] == "warp"):
                    block.end = x
                else:
                    lines.append((x, self._emit(x)))
            block.sources = lines
            block.full = block.masked = None
            self.blocks.append(block)
        self._reconvergence()
        self.barriers = [i for i, b in enumerate(self.blocks) if b.end is not None and b.end.op in ("bar", "barrier")]

    def _reconvergence(self):
        """The nearest block that every way from a block leads through: where lanes that part meet again."""
        n = len(self.blocks)
        ways = []
        for i, b in enumerate(self.blocks):
            e = b.end
            if e is not None and e.op == "bra":
                to = [self.labels[e.args[0][1]]] + ([i + 1] if e.pred is not None else [])
            elif e is not None and e.op in ("ret", "exit", "trap"):
                to = [n] + ([i + 1] if e.pred is not None else [])
            else:
                to = [i + 1]
            ways.append(to)
        everything = (1 << (n + 1)) - 1
        after = [everything] * n + [1 << n]
        changed = True
        while changed:
            changed = False
            for i in range(n - 1, -1, -1):
                common = everything
                for j in ways[i]:
                    common &= after[j]
                common |= 1 << i
                if common != after[i]:
                    after[i], changed = common, True
        self.meet = []
        for i in range(n):
            others = after[i] & ~(1 << i)
            best, most = n, -1
            for j in range(n + 1):
                if others >> j & 1 and after[j].bit_count() > most:
                    best, most = j, after[j].bit_count()
            self.meet.append(best)

    def function(self, index, masked):
        block = self.blocks[index]
        made = block.masked if masked else block.full
        if made is None:
            lines = ["def f(M, R, m):"]
            for x, statements in block.sources:
                guard = None
                if x.pred is not None:
                    guard = f"R[{x.pred[1]}]"
                    if x.negate:
                        guard = f"~{guard}"
                    guard = f"({guard} & m)" if masked else guard
                elif masked:
                    guard = "m"
                lines.append(f"  k = {guard}")
                for s in statements:
                    if isinstance(s, tuple):
                        lines.append(
                            f"  R[{s[0]}] = {s[1]}" if guard is None else f"  R[{s[0]}] = where(k, {s[1]}, R[{s[0]}])"
                        )
                    else:
                        lines.append(f"  {s}")
            lines.append("  return")
            space = globals()
            made = {}
            exec(compile("\n".join(lines), f"<{self.kernel.name} block {index}>", "exec"), space, made)
            made = made["f"]
            if masked:
                block.masked = made
            else:
                block.full = made
        return made

    # operands

    def _const(self, value, bits):
        key = (value & ((1 << bits) - 1), bits)
        if key not in self.constants:
            index = len(self.kinds)
            self.kinds[index] = f"b{bits}" if bits > 1 else "pred"
            self.constants[key] = index
        return self.constants[key]

    def _special(self, name):
        if name not in self.specials:
            self.specials[name] = len(self.kinds)
            self.kinds[self.specials[name]] = "b32"
        return self.specials[name]

    def rd(self, a, ty):
        bits = BITS[ty]
        kind = a[0]
        if kind == "not":
            return f"(~{self.rd(a[1], 'pred')})"
        if kind == "reg":
            index, width = a[1], BITS[self.kinds[a[1]]]
        elif kind == "special":
            index, width = self._special(a[1]), 32
        elif kind == "int":
            value = a[1]
            if ty in FLOATS:
                raise Unsupported(f"integer {value} as {ty}")
            index, width = self._const(value if bits > 1 else int(value != 0), bits), bits
        elif kind == "bits":
            index, width = self._const(a[1], a[2]), a[2]
            if width != bits:
                raise Unsupported(f"float literal of {width} bits as {ty}")
        elif kind == "symbol" and a[1] in self.kernel.globals:
            index, width = self._const(self.kernel.globals[a[1]], bits), bits
        else:
            raise Unsupported(f"operand {a}")
        text = f"R[{index}]"
        if width != bits:
            text += f'.astype("u{bits // 8}")'
        if ty == "bf16":
            return f"f_from_bf16({text})"
        if ty != "pred" and not NP[ty].startswith("u"):
            text += f'.view("{NP[ty]}")'
        return text

    def wr(self, a, ty, expression):
        """[(register, expression of its storage)]; bf16 values come as float32."""
        if a[0] == "sink":
            return []
        if a[0] != "reg":
            raise Unsupported(f"destination {a}")
        if ty == "pred":
            return [(a[1], expression)]
        if ty == "bf16":
            expression = f"f_to_bf16({expression})"
        bits, width = BITS[ty], BITS[self.kinds[a[1]]]
        unsigned = f'"u{width // 8}"'
        if bits == width:
            if not NP[ty].startswith("u"):
                expression = f"({expression}).view({unsigned})"
        elif bits < width:
            if ty.startswith("s"):
                expression = f'({expression}).astype("i{width // 8}").view({unsigned})'
            else:
                expression = f'({expression}).view("u{bits // 8}").astype({unsigned})'
        else:
            raise Unsupported(f"{bits} bits into a register of {width}")
        return [(a[1], expression)]

    # instructions

    def _emit(self, x):
        method = getattr(self, f"op_{x.op}", None)
        if method is None:
            raise Unsupported(x.text)
        return method(x, x.mods, x.args)

    @staticmethod
    def _type(mods):
        types = [m for m in mods if m in BITS]
        if not types:
            raise Unsupported(".".join(mods))
        return types[-1]

    def _float(self, mods, ty, template, operands):
        """An operation in floating point, flushed if asked to."""
        known = {"rn", "ftz", "approx", "full", "NaN", "sat", ty}
        if set(mods) - known:
            raise Unsupported(f"modifiers {mods}")
        values = [self.rd(a, ty) for a in operands]
        if "ftz" in mods:
            values = [f"f_ftz({v})" for v in values]
        out = template.format(*values)
        if "ftz" in mods:
            out = f"f_ftz({out})"
        if "sat" in mods:
            out = f"np.nan_to_num(np.clip({out}, 0, 1), nan=0.0)"
        return out

    def _packed(self, x, mods, args, ty, template):
        half = ty[:-2]
        parts = []
        for shift in (0, 16):
            values = []
            for a in args[1:]:
                v = f'({self.rd(a, "b32")} >> np.uint32({shift})).astype("u2")'
                values.append(f"f_from_bf16({v})" if half == "bf16" else f'{v}.view("f2")')
            out = template.format(*values)
            parts.append(f"f_to_bf16({out})" if half == "bf16" else f'({out}).view("u2")')
        text = f'({parts[0]}.astype("u4") | ({parts[1]}.astype("u4") << np.uint32(16)))'
        return self.wr(args[0], "b32", text)

    def _binary(self, x, mods, args, template, floating=None):
        types = [m for m in mods if m in BITS]
        ty = types[-1] if types else self._type(mods)
        if ty == "f32x2":  # one operation on twice as many elements
            values = [f'{self.rd(a, "b64")}.view("f4")' for a in args[1:]]
            if "ftz" in mods:
                values = [f"f_ftz({v})" for v in values]
            out = (floating or template).format(*values)
            return self.wr(args[0], "b64", f'np.ascontiguousarray({out}, "f4").view("u8")')
        if len(types) == 2 and types[0] == "f32" and ty in ("f16", "bf16"):  # narrow operands, but the last
            values = [f'({self.rd(a, ty)}).astype("f4")' for a in args[1:-1]] + [self.rd(args[-1], "f32")]
            return self.wr(args[0], "f32", (floating or template).format(*values))
        if ty in ("f16x2", "bf16x2"):
            return self._packed(x, mods, args, ty, floating or template)
        if ty in FLOATS:
            return self.wr(args[0], ty, self._float(mods, ty, floating or template, args[1:]))
        return self.wr(args[0], ty, template.format(*(self.rd(a, ty) for a in args[1:])))

    def op_add(self, x, mods, args):
        if "cc" in mods or "sat" in mods:
            raise Unsupported(x.text)
        return self._binary(x, mods, args, "({} + {})")

    def op_sub(self, x, mods, args):
        if "cc" in mods or "sat" in mods:
            raise Unsupported(x.text)
        return self._binary(x, mods, args, "({} - {})")

    def op_mul(self, x, mods, args):
        ty = self._type(mods)
        if ty in FLOATS or ty.endswith("x2"):
            return self._binary(x, mods, args, "({} * {})")
        a, b = self.rd(args[1], ty), self.rd(args[2], ty)
        if "wide" in mods:
            return self.wr(args[0], f"{ty[0]}{BITS[ty] * 2}", f"f_wide({a}, {b})")
        return self.wr(args[0], ty, f"f_mulhi({a}, {b})" if "hi" in mods else f"({a} * {b})")

    def op_mad(self, x, mods, args):
        ty = self._type(mods)
        if ty in FLOATS:
            return self.op_fma(x, mods, args)
        a, b = self.rd(args[1], ty), self.rd(args[2], ty)
        if "wide" in mods:
            wide = f"{ty[0]}{BITS[ty] * 2}"
            return self.wr(args[0], wide, f"(f_wide({a}, {b}) + {self.rd(args[3], wide)})")
        c = self.rd(args[3], ty)
        return self.wr(args[0], ty, f"(f_mulhi({a}, {b}) + {c})" if "hi" in mods else f"({a} * {b} + {c})")

    def op_fma(self, x, mods, args):
        return self._binary(x, mods, args, "f_fma({}, {}, {})")

    def op_div(self, x, mods, args):
        if "full" in mods or "approx" in mods:
            return self._binary(x, mods, args, "f_near({0} / {1}, {0})")
        return self._binary(x, mods, args, "f_div_int({}, {})", "({} / {})")

    def op_rem(self, x, mods, args):
        return self._binary(x, mods, args, "f_rem_int({}, {})")

    def _extreme(self, x, mods, args, quiet, strict):
        name = strict if "NaN" in mods else quiet
        if len(args) == 4:
            return self._binary(x, mods, args, f"np.{name}(np.{name}({{}}, {{}}), {{}})")
        return self._binary(x, mods, args, f"np.{name}({{}}, {{}})")

    def op_min(self, x, mods, args):
        return self._extreme(x, mods, args, "fmin", "minimum")

    def op_max(self, x, mods, args):
        return self._extreme(x, mods, args, "fmax", "maximum")

    def op_abs(self, x, mods, args):
        return self._binary(x, mods, args, "np.abs({})")

    def op_neg(self, x, mods, args):
        return self._binary(x, mods, args, "(-({}))")

    def op_copysign(self, x, mods, args):  # copysign d, a, b: sign of a, magnitude of b
        return self._binary(x, mods, args, "np.copysign({1}, {0})")

    def op_rcp(self, x, mods, args):
        ty = self._type(mods)
        if "ftz64h" in mods or (ty == "f64" and "approx" in mods):
            text = f'((1.0 / {self.rd(args[1], "f64")}).view("u8") & np.uint64(0xFFFFFFFF00000000)).view("f8")'
            return self.wr(args[0], "f64", text)
        one = {"f32": "np.float32(1)", "f64": "np.float64(1)"}[ty]
        if "approx" in mods:
            return self._binary(x, mods, args, f"f_near({one} / {{0}}, {{0}})")
        return self._binary(x, mods, args, f"({one} / {{}})")

    def op_sqrt(self, x, mods, args):
        if "approx" in mods:
            return self._binary(x, mods, args, "f_near(np.sqrt({0}), {0})")
        return self._binary(x, mods, args, "np.sqrt({})")

    def op_rsqrt(self, x, mods, args):
        ty = self._type(mods)
        return self._binary(x, mods, args, f'(1.0 / np.sqrt(({{}}).astype("f8"))).astype("{NP[ty]}")')

    def op_ex2(self, x, mods, args):
        ty = self._type(mods)
        if ty == "bf16":
            return self.wr(args[0], ty, f"np.exp2({self.rd(args[1], ty)})")
        if ty == "f32":
            return self._binary(x, mods, args, "f_ex2({})")
        return self._binary(x, mods, args, f'np.exp2(({{}}).astype("f8")).astype("{NP[ty]}")')

    def op_lg2(self, x, mods, args):
        return self._binary(x, mods, args, "f_lg2({})")

    def op_sin(self, x, mods, args):
        return self._binary(x, mods, args, 'np.sin(({}).astype("f8")).astype("f4")')

    def op_cos(self, x, mods, args):
        return self._binary(x, mods, args, 'np.cos(({}).astype("f8")).astype("f4")')

    def op_tanh(self, x, mods, args):
        return self._binary(x, mods, args, 'np.tanh(({}).astype("f8")).astype("f4")')

    def _logic(self, x, mods, args, template):
        ty = self._type(mods)
        return self.wr(args[0], ty, template.format(*(self.rd(a, ty) for a in args[1:])))

    def op_and(self, x, mods, args):
        return self._logic(x, mods, args, "({} & {})")

    def op_or(self, x, mods, args):
        return self._logic(x, mods, args, "({} | {})")

    def op_xor(self, x, mods, args):
        return self._logic(x, mods, args, "({} ^ {})")

    def op_not(self, x, mods, args):
        return self._logic(x, mods, args, "(~{})")

    def op_lop3(self, x, mods, args):
        a, b, c = (self.rd(y, "b32") for y in args[1:4])
        return self.wr(args[0], "b32", f"f_lop3({a}, {b}, {c}, {args[4][1]})")

    def op_shl(self, x, mods, args):
        ty = self._type(mods)
        return self.wr(args[0], ty, f"f_shl({self.rd(args[1], ty)}, {self.rd(args[2], 'u32')})")

    def op_shr(self, x, mods, args):
        ty = self._type(mods)
        return self.wr(args[0], ty, f"f_shr({self.rd(args[1], ty)}, {self.rd(args[2], 'u32')})")

    def op_shf(self, x, mods, args):
        a, b, c = (self.rd(y, "b32") for y in args[1:4])
        return self.wr(args[0], "b32", f"f_shf({a}, {b}, {c}, {'l' in mods}, {'wrap' in mods})")

    def op_bfe(self, x, mods, args):
        ty = self._type(mods)
        a, b, c = self.rd(args[1], ty), self.rd(args[2], "u32"), self.rd(args[3], "u32")
        return self.wr(args[0], ty, f"f_bfe({a}, {b}, {c})")

    def op_bfi(self, x, mods, args):
        ty = self._type(mods)
        a, b = self.rd(args[1], ty), self.rd(args[2], ty)
        c, d = self.rd(args[3], "u32"), self.rd(args[4], "u32")
        return self.wr(args[0], ty, f"f_bfi({a}, {b}, {c}, {d})")

    def op_prmt(self, x, mods, args):
        if mods != ["b32"]:
            raise Unsupported(x.text)
        a, b, c = (self.rd(y, "b32") for y in args[1:4])
        return self.wr(args[0], "b32", f"f_prmt({a}, {b}, {c})")

    def op_popc(self, x, mods, args):
        return self.wr(args[0], "u32", f"f_popc({self.rd(args[1], self._type(mods))})")

    def op_clz(self, x, mods, args):
        return self.wr(args[0], "u32", f"f_clz({self.rd(args[1], self._type(mods))})")

    def op_brev(self, x, mods, args):
        ty = self._type(mods)
        return self.wr(args[0], ty, f"f_brev({self.rd(args[1], ty)})")

    def op_setp(self, x, mods, args):
        ty, how = self._type(mods), mods[0]
        combine = next((m for m in mods[1:] if m in ("and", "or", "xor")), None)
        a, b = self.rd(args[1], ty), self.rd(args[2], ty)
        if ty in FLOATS:
            if "ftz" in mods:
                a, b = f"f_ftz({a})", f"f_ftz({b})"
            text = f'f_compare({a}, {b}, "{how}")'
        else:
            text = COMPARE[how].format(a, b)
        destinations = args[0][1] if args[0][0] == "pair" else [args[0]]
        texts = [text, f"(~{text})"]
        if combine:
            other = self.rd(args[3], "pred")
            sign = {"and": "&", "or": "|", "xor": "^"}[combine]
            texts = [f"({t} {sign} {other})" for t in texts]
        out = ["t = [" + ", ".join(texts[: len(destinations)]) + "]"]
        for i, d in enumerate(destinations):
            out += self.wr(d, "pred", f"t[{i}]")
        return out

    def op_set(self, x, mods, args):
        raise Unsupported(x.text)

    def op_selp(self, x, mods, args):
        ty = self._type(mods)
        ty = "b16" if ty == "bf16" else ty
        a, b, p = self.rd(args[1], ty), self.rd(args[2], ty), self.rd(args[3], "pred")
        return self.wr(args[0], ty, f"where({p}, {a}, {b})")

    def op_mov(self, x, mods, args):
        ty = self._type(mods)
        ty = {"f32": "b32", "f64": "b64", "f16": "b16", "bf16": "b16"}.get(ty, ty)
        d, a = args
        if a[0] == "vec":
            parts = a[1]
            each = BITS[ty] // len(parts)
            text = " | ".join(
                f'({self.rd(p, f"b{each}")}.astype("{NP[ty]}") << np.array({each * i}, "{NP[ty]}"))'
                for i, p in enumerate(parts)
            )
            return self.wr(d, ty, f"({text})")
        if d[0] == "vec":
            each = BITS[ty] // len(d[1])
            out = [f"t = {self.rd(a, ty)}"]
            for i, p in enumerate(d[1]):
                out += self.wr(p, f"b{each}", f'(t >> np.array({each * i}, "{NP[ty]}")).astype("u{each // 8}")')
            return out
        return self.wr(d, ty, self.rd(a, ty))

    def op_cvt(self, x, mods, args):
        types = [m for m in mods if m in BITS]
        rest = [m for m in mods if m not in BITS]
        if len(types) == 1:
            types = types * 2
        to, frm = types
        if to in ("bf16x2", "f16x2"):
            if rest not in (["rn"], ["rz"]):
                raise Unsupported(x.text)
            make = {"bf16x2": "f_to_bf16({})", "f16x2": '({}).astype("f2").view("u2")'}[to]
            if rest == ["rz"]:
                make = {"bf16x2": "f_to_bf16_rz({})"}[to]
            high, low = (make.format(self.rd(a, frm)) + '.astype("u4")' for a in args[1:3])
            return self.wr(args[0], "b32", f"({low} | ({high} << np.uint32(16)))")
        a = self.rd(args[1], frm)
        if to == "tf32":
            if "rna" not in rest:
                raise Unsupported(x.text)
            return self.wr(args[0], "tf32", f"f_tf32({a})")
        whole = next((m for m in rest if m in ("rzi", "rni", "rmi", "rpi")), None)
        if set(rest) - {"rn", "rzi", "rni", "rmi", "rpi", "ftz", "sat", "rz"}:
            raise Unsupported(x.text)
        if "ftz" in rest and frm == "f32":
            a = f"f_ftz({a})"
        if frm in FLOATS and to in FLOATS:
            if whole:
                name = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}[whole]
                a = f"np.{name}({a})"
            if to == "bf16":
                a = f'({a}).astype("f4")'
                if "rz" in rest:
                    return self.wr(args[0], "b16", f"f_to_bf16_rz({a})")
            elif to != frm:
                if "rz" in rest:
                    raise Unsupported(x.text)
                a = f'({a}).astype("{NP[to]}")'
            return self.wr(args[0], to, a)
        if frm in FLOATS:
            return self.wr(args[0], to, f'f_to_int({a}, "{whole}", "{NP[to]}")')
        if to in FLOATS:
            return self.wr(args[0], to, f'({a}).astype("{"f4" if to == "bf16" else NP[to]}")')
        if "sat" in rest:
            return self.wr(args[0], to, f'f_sat_int({a}, "{NP[to]}")')
        # The source's sign extends it; the destination's register may be wider than `to`.
        width = BITS[self.kinds[args[0][1]]]
        if BITS[to] <= BITS[frm]:
            return self.wr(args[0], to, f'({a}).astype("{NP[to]}")')
        return self.wr(args[0], to, f'({a}).astype("{NP[to]}")') if width >= BITS[to] else []

    def op_cvta(self, x, mods, args):
        ty = self._type(mods)
        if "shared" in mods or "local" in mods:
            raise Unsupported(x.text)
        return self.wr(args[0], ty, self.rd(args[1], ty))

    # memory

    def _address(self, mem):
        base, offset = mem[1], mem[2]
        if base[0] == "reg" and BITS[self.kinds[base[1]]] == 32:
            return f'(R[{base[1]}].view("i4").astype("i8") + {offset})'
        if base[0] == "reg":
            return f'(R[{base[1]}].view("i8") + {offset})'
        return f'(np.zeros(M.lanes, "i8") + {self.kernel.globals[base[1]] + offset})'

    def _vector(self, mods):
        return next((int(m[1:]) for m in mods if re.match(r"v\d$", m)), 1)

    def op_ld(self, x, mods, args):
        ty, n = self._type(mods), self._vector(mods)
        size = BITS[ty] // 8
        values = args[0][1] if args[0][0] == "vec" else [args[0]]
        if len(values) != n:
            raise Unsupported(x.text)
        plain = {"bf16": "b16", "f16": "b16", "f32": "b32", "f64": "b64"}.get(ty, ty)
        if mods[0] == "param":
            name, offset = args[1][1][1], args[1][2]
            out = [f't = M.param("{name}", {offset}, {size}, {n})']
        elif mods[0] == "shared" or "shared" in mods:
            self.min_size = min(self.min_size, size)
            out = [f"t = M.load_shared({self._address(args[1])}, k, {size}, {n}, {x.text!r})"]
        elif "global" in mods:
            self.min_size = min(self.min_size, size)
            out = [f"t = M.load_global({self._address(args[1])}, k, {size}, {n}, {x.text!r})"]
        else:
            raise Unsupported(x.text)
        for i, v in enumerate(values):
            text = f"t[{i}]" if not plain.startswith("s") else f't[{i}].view("{NP[plain]}")'
            out += self.wr(v, plain, text)
        return out

    def op_st(self, x, mods, args):
        ty, n = self._type(mods), self._vector(mods)
        size = BITS[ty] // 8
        values = args[1][1] if args[1][0] == "vec" else [args[1]]
        self.min_size = min(self.min_size, size)
        space = "shared" if "shared" in mods else "global" if "global" in mods else None
        if space is None or len(values) != n:
            raise Unsupported(x.text)
        data = ", ".join(self.rd(v, f"b{BITS[ty]}") for v in values)
        return [f"M.store_{space}({self._address(args[0])}, [{data}], k, {size}, {x.text!r})"]

    def op_shfl(self, x, mods, args):
        if mods[0] != "sync" or mods[-1] != "b32":
            raise Unsupported(x.text)
        d, p = args[0][1] if args[0][0] == "pair" else (args[0], ("sink",))
        a, b, c, mask = (self.rd(y, "b32") for y in args[1:5])
        out = [f't = M.shuffle("{mods[1]}", {a}, {b}, {c}, {mask}, k, {x.text!r})']
        return out + self.wr(d, "b32", "t[0]") + self.wr(p, "pred", "t[1]")

    def op_vote(self, x, mods, args):
        mask = self.rd(args[2], "b32")
        ty = "b32" if "ballot" in mods else "pred"
        return [
            f't = M.vote("{mods[1]}", {self.rd(args[1], "pred")}, {mask}, k, {x.text!r})',
            *self.wr(args[0], ty, "t"),
        ]

    def op_redux(self, x, mods, args):
        ty = self._type(mods)
        text = f't = M.redux("{mods[1]}", {self.rd(args[1], ty)}, {self.rd(args[2], "b32")}, k, {x.text!r})'
        return [text, *self.wr(args[0], ty, "t")]

    def op_bar(self, x, mods, args):  # bar.warp.sync
        return [f"M.warp_sync(k, {x.text!r})"]

    op_barrier = op_bar

    def op_fence(self, x, mods, args):
        return ["M.proxy_fence()"] if "proxy" in mods else []

    def op_membar(self, x, mods, args):
        return []

    op_prefetch = op_discard = op_nanosleep = op_membar

    def op_createpolicy(self, x, mods, args):
        return self.wr(args[0], "b64", self.rd(("int", 0), "b64"))

    # tensor cores and asynchronous copies

    def op_ldmatrix(self, x, mods, args):
        n = int(next(m for m in mods if re.match(r"x\d$", m))[1:])
        if "m8n8" not in mods or mods[-1] != "b16":
            raise Unsupported(x.text)
        values = args[0][1] if args[0][0] == "vec" else [args[0]]
        self.min_size = min(self.min_size, 2)
        out = [f"t = M.ldmatrix({self._address(args[1])}, {n}, {'trans' in mods}, k, {x.text!r})"]
        for i, v in enumerate(values):
            out += self.wr(v, "b32", f"t[{i}]")
        return out

    def op_stmatrix(self, x, mods, args):
        if "m8n8" not in mods or mods[-1] != "b16":
            raise Unsupported(x.text)
        values = args[1][1] if args[1][0] == "vec" else [args[1]]
        self.min_size = min(self.min_size, 2)
        data = ", ".join(self.rd(v, "b32") for v in values)
        return [f"M.stmatrix({self._address(args[0])}, [{data}], {'trans' in mods}, k, {x.text!r})"]

    def op_mma(self, x, mods, args):
        shape = next(m for m in mods if re.match(r"m\d+n\d+k\d+$", m))
        types = [m for m in mods if m in BITS]
        if types[0] != "f32" or types[3] != "f32" or types[1] != types[2] or "row" not in mods:
            raise Unsupported(x.text)
        d, a, b, c = (y[1] if y[0] == "vec" else [y] for y in args)
        lists = ["[" + ", ".join(self.rd(r, "b32") for r in regs) + "]" for regs in (a, b, c)]
        out = [f't = M.mma("{shape}", "{types[1]}", {", ".join(lists)}, k, {x.text!r})']
        for i, r in enumerate(d):
            out += self.wr(r, "b32", f"t[{i}]")
        return out

    def op_wgmma(self, x, mods, args):
        if mods[0] == "fence":
            return []
        if mods[0] == "commit_group":
            return ["M.wgmma_commit()"]
        if mods[0] == "wait_group":
            return [f"M.wgmma_wait({args[0][1]})"]
        shape = next(m for m in mods if re.match(r"m\d+n\d+k\d+$", m))
        types = [m for m in mods if m in BITS]
        if (
            mods[0] != "mma_async"
            or types[0] != "f32"
            or types[1] != types[2]
            or args[4] != ("int", 1)
            or args[5] != ("int", 1)
        ):
            raise Unsupported(x.text)
        d = args[0][1]
        self.min_size = min(self.min_size, 2)
        regs = "[" + ", ".join(self.rd(r, "b32") for r in d) + "]"
        if args[1][0] == "vec":
            a, trans_a, rest = "[" + ", ".join(self.rd(r, "b32") for r in args[1][1]) + "]", 0, args[6:]
        else:
            a, rest = self.rd(args[1], "b64"), args[6:]
            trans_a, rest = (rest[0][1], rest[1:]) if rest else (0, rest)
        trans_b = rest[0][1] if rest else 0
        scale = self.rd(args[3], "pred")
        out = [
            f't = M.wgmma("{shape}", "{types[1]}", {regs}, {a}, {self.rd(args[2], "b64")}, {scale}, {trans_a}, '
            f"{trans_b}, k, {x.text[:90]!r})"
        ]
        for i, r in enumerate(d):
            out += self.wr(r, "b32", f"t[{i}]")
        return out

    def op_cp(self, x, mods, args):
        if mods[0] != "async":
            raise Unsupported(x.text)
        if "commit_group" in mods:
            return ["M.commit_group(k)"]
        if "wait_group" in mods:
            return [f"M.wait_group({args[0][1]}, k)"]
        if "wait_all" in mods:
            return ["M.commit_group(k)", "M.wait_group(0, k)"]
        if "shared" not in mods or "global" not in mods:
            raise Unsupported(x.text)
        size = args[2][1]
        source = self.rd(args[3], "u32") if len(args) > 3 else "None"
        self.min_size = min(self.min_size, size)
        return [f"M.copy_async({self._address(args[0])}, {self._address(args[1])}, {size}, {source}, k, {x.text!r})"]


_programs = {}


def program(ptx):
    key = hashlib.sha256(ptx.encode()).digest()
    if key not in _programs:
        _programs[key] = Program(Kernel(ptx))
    return _programs[key]


# -------------------------------------------------------------------------------------------------------- execution


class Allocation:
    """The storage of one tensor, as arrays of every element size over the same bytes."""

    def __init__(self, base, nbytes, name):
        self.base, self.nbytes, self.name = base, nbytes, name
        self.views = {
            size: np.frombuffer(
                (getattr(ctypes, f"c_uint{8 * size}") * (nbytes // size)).from_address(base), f"u{size}"
            )
            for size in (1, 2, 4, 8)
            if nbytes >= size
        }


class Report:
    def __init__(self):
        self.findings = []
        self.seen = set()
        self.instructions = self.barriers = self.accesses = 0

    def add(self, kind, text):
        if (kind, text) not in self.seen:
            self.seen.add((kind, text))
            self.findings.append((kind, text))


class Unit:
    """Lanes that run in lockstep: one warp, or all of a block."""

    def __init__(self, machine, first, lanes):
        self.first, self.lanes = first, lanes
        self.stack = [[-1, 0, None]]  # [block where lanes that parted meet, next block, mask; None for all]
        self.alive = np.ones(lanes, bool)
        self.waiting = None  # block after the barrier
        self.wait_id = None


class Launch:
    """One launch of a program over a grid.

    Args:
        order: "forward", "reverse" or "random" order of the warps between barriers (and of the blocks of the grid).
        lockstep: all warps of a block together: fast, for races rely on the detector.
        preempt: change the warp after each basic block instead of at barriers.
        races: whether to look for them. `skip_barriers`: indices of barriers that do nothing (mutation).
    """

    def __init__(
        self, prog, grid, num_threads, shared, params, allocations, *, order="forward", lockstep=False, preempt=False,
        races=True, skip_barriers=(), seed=0, limit=50_000_000, lanes=False,
        noise=False,
    ):  # fmt: skip
        self.noise = noise
        self.prog, self.grid, self.threads, self.shared_bytes = prog, grid, num_threads, shared
        self.allocations = sorted(allocations, key=lambda a: a.base)
        self.bases = np.array([a.base for a in self.allocations], "i8")
        self.ends = np.array([a.base + a.nbytes for a in self.allocations], "i8")
        self.order, self.lockstep, self.preempt, self.races = order, lockstep, preempt, races
        self.skip = {prog.barriers[i] for i in skip_barriers}
        self.rng = np.random.default_rng(seed)
        self.report = Report()
        self.params = params  # name -> bytes
        self.limit = limit
        self.lanes = num_threads if lockstep else 32
        self.g = prog.min_size
        self.template = None
        self.value = {}
        self.by_lane = lanes
        self.skip_warp_sync = False
        if shared:
            self.shared_owner = np.full(shared // self.g + 16, -1, "i8")
        self.owner = [np.full(a.nbytes // self.g + 16, -1, "i8") for a in self.allocations]
        self.block_writer = [np.full(a.nbytes // self.g + 16, -1, "i8") for a in self.allocations]
        self.block_reader = [np.full(a.nbytes // self.g + 16, -1, "i8") for a in self.allocations]

    def run(self):
        global NOISE
        before, NOISE = NOISE, self.noise
        try:
            return self._grid()
        finally:
            NOISE = before

    def _grid(self):
        nx, ny, nz = self.grid
        ids = [(x, y, z) for z in range(nz) for y in range(ny) for x in range(nx)]
        if self.order == "reverse":
            ids.reverse()
        elif self.order == "random":
            self.rng.shuffle(ids)
        with np.errstate(all="ignore"):
            for number, block in enumerate(ids):
                self._block(number, block)
        return self.report

    # one block of the grid

    def _registers(self, unit, block):
        n = unit.lanes
        if self.template is None:  # arrays of registers are never written in place, so all start from the same ones
            garbage = {
                bits: np.full(n, 0xA5A5A5A5A5A5A5A5 & ((1 << bits) - 1), f"u{bits // 8}") for bits in (8, 16, 32, 64)
            }
            garbage[1] = np.ones(n, bool)
            self.template = [garbage[BITS[self.prog.kinds[i]]] for i in range(len(self.prog.kinds))]
            for (value, bits), i in self.prog.constants.items():
                self.template[i] = np.full(n, bool(value)) if bits == 1 else np.full(n, value, f"u{bits // 8}")
        R = list(self.template)
        tid = np.arange(unit.first, unit.first + n, dtype="u4")
        for name, i in self.prog.specials.items():
            base, _, axis = name.partition(".")
            a = "xyz".index(axis) if axis else 0
            value = {
                "tid": tid if a == 0 else 0,
                "ntid": self.threads if a == 0 else 1,
                "ctaid": block[a],
                "nctaid": self.grid[a],
                "laneid": tid % 32,
                "warpid": tid // 32,
                "clusterid": block[a],
                "cluster_ctaid": 0,
                "cluster_ctarank": 0,
            }[base]
            R[i] = np.broadcast_to(np.asarray(value, "u4"), (n,)).copy()
        return R

    def _block(self, number, block):
        self.number = number
        self.shared = {s: None for s in (1, 2, 4, 8)}
        raw = np.full(self.shared_bytes + 16, 0xA5, "u1")
        self.shared_raw = raw
        pad = raw[: len(raw) // 16 * 16]
        self.shared = {s: pad.view(f"u{s}") for s in (1, 2, 4, 8)}
        self.written = np.zeros(self.shared_bytes + 16, bool)
        self.lane_log = {}
        self.unfenced = np.zeros(self.shared_bytes + 16, "i2")  # by byte: 1 + the warp that wrote it last
        self.log = {}  # space -> list of (granules, warps, write)
        self.units = [Unit(self, first, self.lanes) for first in range(0, self.threads, self.lanes)]
        for unit in self.units:
            unit.R = self._registers(unit, block)
            unit.pending, unit.groups_open, unit.wgmma_reads, unit.wgmma_open = [], [], [], []
        while True:
            runnable = [u for u in self.units if u.stack and u.waiting is None]
            if not runnable:
                waiting = [u for u in self.units if u.waiting is not None]
                if not waiting:
                    break
                if len(waiting) != len(self.units):
                    raise EmulationError("diverged: some warps ended while others wait at a barrier")
                if len({u.waiting for u in waiting}) > 1:
                    raise EmulationError(f"diverged: warps wait at different barriers {[u.waiting for u in waiting]}")
                self._release()
                continue
            if self.order == "forward":
                unit = runnable[0]
            elif self.order == "reverse":
                unit = runnable[-1]
            else:
                unit = runnable[self.rng.integers(len(runnable))]
            self._run(unit)
        self._end_epoch()

    def _release(self):
        self._end_epoch()
        self.report.barriers += 1
        for u in self.units:
            u.waiting = None

    def _run(self, unit):
        """Until the unit ends or waits (or one basic block)."""
        self.unit = unit
        blocks, R, report, stack = self.prog.blocks, unit.R, self.report, unit.stack
        while stack:
            top = stack[-1]
            index, mask = top[1], top[2]
            if index == top[0] and len(stack) > 1:
                stack.pop()
                continue
            if index >= len(blocks):
                raise EmulationError("ran past the end")
            block = blocks[index]
            self.prog.function(index, mask is not None)(self, R, mask)
            report.instructions += len(block.instrs)
            if report.instructions > self.limit:
                raise EmulationError("too many instructions")
            end = block.end
            if end is None:
                top[1] = index + 1
            elif end.op == "bra":
                target = self.prog.labels[end.args[0][1]]
                if end.pred is None:
                    top[1] = target
                else:
                    taken = ~R[end.pred[1]] if end.negate else R[end.pred[1]]
                    yes = taken if mask is None else taken & mask
                    no = ~taken if mask is None else ~taken & mask
                    if not no.any():
                        top[1] = target
                    elif not yes.any():
                        top[1] = index + 1
                    else:
                        meet = self.prog.meet[index]
                        top[1] = meet
                        for to, lanes in ((index + 1, no), (target, yes)):
                            if to != meet:
                                stack.append([meet, to, lanes])
            elif end.op in ("ret", "exit"):
                here = np.ones(self.lanes, bool) if mask is None else mask
                if end.pred is not None:
                    here = here & (~R[end.pred[1]] if end.negate else R[end.pred[1]])
                top[1] = index + 1
                unit.alive = unit.alive & ~here
                for entry in stack:
                    entry[2] = unit.alive if entry[2] is None else entry[2] & unit.alive
                unit.stack = stack = [e for e in stack if e[2].any()]
            elif end.op in ("bar", "barrier"):
                if end.pred is not None or "sync" not in end.mods or end.args[0] != ("int", 0) or len(end.args) > 1:
                    raise Unsupported(end.text)
                top[1] = index + 1
                if index not in self.skip:
                    if mask is not None and (mask != unit.alive).any():
                        raise EmulationError(f"diverged: {mask.sum()} of {unit.alive.sum()} lanes at a barrier")
                    unit.waiting = index + 1
                    return
            else:
                raise EmulationError(end.text)
            if self.preempt:
                return

    # memory

    def param(self, name, offset, size, n):
        raw = self.params[name]
        return [np.full(self.lanes, np.frombuffer(raw, f"u{size}", 1, offset + size * i)[0]) for i in range(n)]

    def _lanes(self, k):
        return np.arange(self.lanes) if k is None else np.flatnonzero(k)

    def _warps(self, lanes):
        return (lanes + self.unit.first) >> 5

    def _note(self, space, address, size, lanes, write, text, data=None, plain=False):
        """Remembers an access until the next barrier."""
        if not self.races:
            return
        self.report.accesses += len(lanes)
        per = max(size // self.g, 1)
        granules = address // self.g
        if self.by_lane and plain:
            one, lane = address // self.g, lanes + self.unit.first
            if per > 1:
                one, lane = (one[:, None] + np.arange(per)).ravel(), np.repeat(lane, per)
            kept = None if data is None else np.ascontiguousarray(np.stack(data, 1)).view(f"u{self.g}").ravel()
            self.lane_log.setdefault((space, self.unit.first), []).append((one, lane, write, text, kept))
        warps = self._warps(lanes)
        if per > 1:
            granules = (granules[:, None] + np.arange(per)).ravel()
            warps = np.repeat(warps, per)
        if data is not None:  # what is written, granule by granule: the same value written twice is no race
            data = np.ascontiguousarray(np.stack(data, 1)).view(f"u{self.g}").ravel()
        self.log.setdefault(space, []).append((granules, warps, write, text, data))

    def _end_lanes(self, first=None):
        """Two lanes of a warp touched the same bytes without bar.warp.sync, and one of them wrote."""
        for key in [k for k in self.lane_log if first is None or k[1] == first]:
            entries = self.lane_log.pop(key)
            if not any(e[2] for e in entries):
                continue
            space = key[0]
            owner = self.shared_owner if space == "shared" else self.owner[space]
            value = self.value.setdefault(space, np.zeros(len(owner), "u8"))
            for granules, lane, write, _, data in entries:
                if write:
                    fresh = owner[granules] == -1
                    owner[granules[fresh]] = lane[fresh]
                    value[granules[fresh]] = data[fresh]
            for granules, lane, write, text, data in entries:
                mine = owner[granules]
                wrong = (mine != -1) & (mine != lane) & (mine >> 5 == lane >> 5)
                if write:
                    wrong &= value[granules] != data
                if wrong.any():
                    name = "shared memory" if space == "shared" else self.allocations[space].name
                    self.report.add("lanes", f"{name}: lanes of one warp without bar.warp.sync ({text})")
            for granules, _, write, _, _ in entries:
                if write:
                    owner[granules] = -1

    def _end_epoch(self):
        if self.by_lane:
            self._end_lanes()
        for space, entries in self.log.items():
            owner = self.shared_owner if space == "shared" else self.owner[space]
            name = "shared memory" if space == "shared" else self.allocations[space].name
            writes = [e for e in entries if e[2]]
            touched = []
            value = self.value.setdefault(space, np.zeros(len(owner), "u8"))
            for granules, warps, _, _, data in writes:
                fresh = owner[granules] == -1
                owner[granules[fresh]] = warps[fresh]
                if data is not None:
                    value[granules[fresh]] = data[fresh]
                touched.append(granules)
            if writes:
                for granules, warps, write, text, data in entries:
                    mine = owner[granules]
                    wrong = (mine != -1) & (mine != warps)
                    if write and data is not None:
                        wrong &= value[granules] != data
                    if wrong.any():
                        at = np.flatnonzero(wrong)[0]
                        other = next(
                            (t for g, w, wr, t, _ in writes if ((g == granules[at]) & (w == mine[at])).any()), "?"
                        )
                        self.report.add(
                            "race", f"{name}: warp {warps[at]} {'writes' if write else 'reads'} byte "
                            f"{granules[at] * self.g} ({text}), warp {mine[at]} wrote it ({other}), no barrier between",
                        )  # fmt: skip
                for granules in touched:
                    owner[granules] = -1
            if space != "shared":
                writer, reader = self.block_writer[space], self.block_reader[space]
                for granules, _, write, text, _ in entries:
                    w = writer[granules]
                    if ((w != -1) & (w != self.number)).any():
                        self.report.add("race", f"{name}: two blocks of the grid, one wrote ({text})")
                    if write:
                        r = reader[granules]
                        if ((r != -1) & (r != self.number)).any():
                            self.report.add("race", f"{name}: one block of the grid reads what another writes ({text})")
                        writer[granules] = self.number
                    else:
                        r = reader[granules]
                        reader[granules] = np.where((r == -1) | (r == self.number), self.number, -2)
        self.log = {}
        if not self.races:
            return
        for u in self.units:  # what is under way goes on into the next stretch between barriers
            self.unit = u
            for flat, size, first, text in [r for group in (*u.wgmma_open, u.wgmma_reads) for r in group]:
                self._note("shared", flat, size, np.full(len(flat), first), False, text)
            for to, _, size, _, lanes, text in [c for group in (*u.groups_open, u.pending) for c in group]:
                if len(lanes):
                    self._note("shared", to[lanes], size, lanes, True, text)

    def _find(self, address, total, text):
        """Index of the allocation of every address."""
        low, high = int(address.min()), int(address.max())
        first = int(np.searchsorted(self.bases, low, "right")) - 1
        if first >= 0 and high + total <= self.ends[first] and not (address & (total - 1)).any():
            return first
        at = np.searchsorted(self.bases, address, "right") - 1
        wrong = (at < 0) | (address + total > self.ends[np.maximum(at, 0)])
        if wrong.any():
            bad = int(address[np.flatnonzero(wrong)[0]])
            near = self.allocations[max(int(at[np.flatnonzero(wrong)[0]]), 0)]
            raise EmulationError(
                f"bounds: {text}: {total} bytes at {near.name} {bad - near.base:+d}, which has {near.nbytes} bytes"
            )
        if (address % total).any():
            raise EmulationError(f"align: {text}: address {int(address[np.flatnonzero(address % total)[0]]):#x}")
        return at

    def load_global(self, address, k, size, n, text):
        out = np.zeros((n, self.lanes), f"u{size}")
        lanes = self._lanes(k)
        if len(lanes):
            address = address[lanes]
            which = self._find(address, size * n, text)
            for w in [which] if isinstance(which, int) else np.unique(which):
                these = slice(None) if isinstance(which, int) else which == w
                a, allocation = address[these], self.allocations[w]
                offset = a - allocation.base
                index = offset // size
                view = allocation.views[size]
                for i in range(n):
                    out[i, lanes[these]] = view[index + i]
                self._note(int(w), offset, size * n, lanes[these], False, text, None, True)
        return out

    def store_global(self, address, data, k, size, text):
        lanes = self._lanes(k)
        if not len(lanes):
            return
        n = len(data)
        address = address[lanes]
        which = self._find(address, size * n, text)
        for w in [which] if isinstance(which, int) else np.unique(which):
            these = slice(None) if isinstance(which, int) else which == w
            a, allocation = address[these], self.allocations[w]
            offset = a - allocation.base
            index = offset // size
            view = allocation.views[size]
            for i in range(n):
                view[index + i] = data[i][lanes[these]]
            self._note(int(w), offset, size * n, lanes[these], True, text, [d[lanes[these]] for d in data], True)

    def _check_shared(self, address, total, text):
        if ((address < 0) | (address + total > self.shared_bytes)).any():
            raise EmulationError(f"bounds: {text}: shared byte {int(address.max())} + {total} of {self.shared_bytes}")
        if (address % total).any():
            raise EmulationError(f"align: {text}: shared byte {int(address[np.flatnonzero(address % total)[0]])}")

    def load_shared(self, address, k, size, n, text):
        out = np.zeros((n, self.lanes), f"u{size}")
        lanes = self._lanes(k)
        if len(lanes):
            address = address[lanes]
            self._check_shared(address, size * n, text)
            if not self.written[(address[:, None] + np.arange(size * n)).ravel()].all():
                self.report.add("uninit", text)
            index = address // size
            for i in range(n):
                out[i, lanes] = self.shared[size][index + i]
            self._note("shared", address, size * n, lanes, False, text, None, True)
        return out

    def store_shared(self, address, data, k, size, text):
        lanes = self._lanes(k)
        if not len(lanes):
            return
        n = len(data)
        address = address[lanes]
        self._check_shared(address, size * n, text)
        bytes_ = (address[:, None] + np.arange(size * n)).ravel()
        self.written[bytes_] = True
        self.unfenced[bytes_] = np.repeat(self._warps(lanes) + 1, size * n)
        index = address // size
        for i in range(n):
            self.shared[size][index + i] = data[i][lanes]
        self._note("shared", address, size * n, lanes, True, text, [d[lanes] for d in data], True)

    # warps

    def _whole_warps(self, mask, k, text):
        """Every warp takes part entirely or not at all, or the operation would wait for lanes that are elsewhere."""
        active = self.unit.alive if k is None else np.asarray(k)
        by_warp = active.reshape(-1, 32)
        part = by_warp.any(1) & ~by_warp.all(1)
        if part.any() or (mask[active] != 0xFFFFFFFF).any():
            raise EmulationError(f"diverged: {text}")

    def shuffle(self, how, a, b, c, mask, k, text):
        self._whole_warps(mask, k, text)
        lane = np.arange(self.lanes, dtype="i8") % 32
        base = np.arange(self.lanes, dtype="i8") - lane
        b, c = (b & np.uint32(31)).astype("i8"), c.astype("i8")
        segment, clamp = (c >> 8) & 31, c & 31
        low = lane & segment
        high = low | (clamp & ~segment & 31)
        if how == "bfly":
            j = lane ^ b
            ok = j <= high
        elif how == "up":
            j = lane - b
            ok = j >= high
        elif how == "down":
            j = lane + b
            ok = j <= high
        else:
            j = low | (b & ~segment & 31)
            ok = j <= high
        j = np.where(ok, j, lane)
        return a[base + j], ok

    def vote(self, how, p, mask, k, text):
        self._whole_warps(mask, k, text)
        by_warp = p.reshape(-1, 32)
        if how == "ballot":
            value = (by_warp.astype("u8") << np.arange(32, dtype="u8")).sum(1).astype("u4")
        else:
            value = {"any": by_warp.any(1), "all": by_warp.all(1)}[how]
        return np.repeat(value, 32)

    def redux(self, how, a, mask, k, text):
        self._whole_warps(mask, k, text)
        by_warp = a.reshape(-1, 32)
        operation = {
            "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[how]  # fmt: skip
        return np.repeat(operation.reduce(by_warp, axis=1, dtype=a.dtype), 32)

    def warp_sync(self, k, text):
        if self.skip_warp_sync:
            return
        self._whole_warps(np.full(self.lanes, 0xFFFFFFFF, "u4"), k, text)
        self._end_lanes(self.unit.first)

    # tensor cores: fragments as the PTX manual lays them out

    def ldmatrix(self, address, n, trans, k, text):
        self._whole_warps(np.full(self.lanes, 0xFFFFFFFF, "u4"), k, text)
        out = np.zeros((n, self.lanes), "u4")
        lane = np.arange(32)
        active = np.ones(self.lanes, bool) if k is None else k
        for first in range(0, self.lanes, 32):
            if not active[first]:
                continue
            for i in range(n):
                rows = address[first + 8 * i : first + 8 * i + 8]
                self._check_shared(rows, 16, text)
                if not self.written[(rows[:, None] + np.arange(16)).ravel()].all():
                    self.report.add("uninit", text)
                tile = self.shared[2][(rows // 2)[:, None] + np.arange(8)]
                tile = tile.T if trans else tile
                low, high = tile[lane // 4, lane % 4 * 2].astype("u4"), tile[lane // 4, lane % 4 * 2 + 1].astype("u4")
                out[i, first : first + 32] = low | (high << np.uint32(16))
                self._note("shared", rows, 16, np.full(8, first), False, text)
        return out

    def stmatrix(self, address, data, trans, k, text):
        self._whole_warps(np.full(self.lanes, 0xFFFFFFFF, "u4"), k, text)
        lane = np.arange(32)
        active = np.ones(self.lanes, bool) if k is None else k
        for first in range(0, self.lanes, 32):
            if not active[first]:
                continue
            for i, value in enumerate(data):
                rows = address[first + 8 * i : first + 8 * i + 8]
                self._check_shared(rows, 16, text)
                v = value[first : first + 32]
                tile = np.zeros((8, 8), "u2")
                tile[lane // 4, lane % 4 * 2] = v & np.uint32(0xFFFF)
                tile[lane // 4, lane % 4 * 2 + 1] = v >> np.uint32(16)
                tile = tile.T if trans else tile
                self.written[(rows[:, None] + np.arange(16)).ravel()] = True
                self.unfenced[(rows[:, None] + np.arange(16)).ravel()] = (self.unit.first + first) // 32 + 1
                self.shared[2][(rows // 2)[:, None] + np.arange(8)] = tile
                self._note("shared", rows, 16, np.full(8, first), True, text)

    def mma(self, shape, ty, a, b, c, k, text):
        self._whole_warps(np.full(self.lanes, 0xFFFFFFFF, "u4"), k, text)
        m, n, depth = map(int, re.match(r"m(\d+)n(\d+)k(\d+)", shape).groups())
        if (m, n) != (16, 8):
            raise Unsupported(text)
        warps = self.lanes // 32
        lane = np.arange(32)
        group, inside = lane // 4, lane % 4

        def halves(x):
            u = x.reshape(warps, 32)
            parts = [(u & np.uint32(0xFFFF)).astype("u2"), (u >> np.uint32(16)).astype("u2")]
            return [f_from_bf16(p) if ty == "bf16" else p.view("f2").astype("f4") for p in parts]

        A, B = np.zeros((warps, 16, depth), "f4"), np.zeros((warps, depth, 8), "f4")
        if ty in ("bf16", "f16"):
            for i, x in enumerate(a):  # k16: a0 rows g, k 0-7; a1 rows g+8; a2 rows g, k 8-15; a3
                for j, half in enumerate(halves(x)):
                    A[:, group + 8 * (i % 2), inside * 2 + j + 8 * (i // 2)] = half
            for i, x in enumerate(b):
                for j, half in enumerate(halves(x)):
                    B[:, inside * 2 + j + 8 * i, group] = half
        elif ty == "tf32":
            for i, x in enumerate(a):
                A[:, group + 8 * (i % 2), inside + 4 * (i // 2)] = (
                    (x & np.uint32(0xFFFFE000)).view("f4").reshape(warps, 32)
                )
            for i, x in enumerate(b):
                B[:, inside + 4 * i, group] = (x & np.uint32(0xFFFFE000)).view("f4").reshape(warps, 32)
        else:
            raise Unsupported(text)
        C = np.zeros((warps, 16, 8), "f8")
        for i, x in enumerate(c):
            C[:, group + 8 * (i // 2), inside * 2 + i % 2] = x.view("f4").reshape(warps, 32)
        D = (C + A.astype("f8") @ B.astype("f8")).astype("f4")
        return [
            np.ascontiguousarray(D[:, group + 8 * (i // 2), inside * 2 + i % 2]).reshape(-1).view("u4")
            for i in range(4)
        ]

    # products of a warp group, whose operands shared memory holds: read from the call to the wait

    def proxy_fence(self):
        first = self.unit.first // 32
        mine = (self.unfenced > first) & (self.unfenced <= first + self.lanes // 32)
        self.unfenced[mine] = 0

    def _described(self, descriptor, rows, depth, trans, first, text, size=2):
        d = int(descriptor)
        start, leading, stride = (d & 0x3FFF) << 4, (d >> 16 & 0x3FFF) << 4, (d >> 32 & 0x3FFF) << 4
        width = {0: 0, 1: 128, 2: 64, 3: 32}[d >> 62]
        r, c = np.asarray(rows)[:, None], np.arange(depth)[None, :]
        if not width:
            if trans:
                raise Unsupported(text)
            at = start + r // 8 * stride + c * size // 16 * leading + r % 8 * 16 + c * size % 16
        elif trans:
            per = width // size
            at = start + r // per * leading + c // 8 * stride + c % 8 * width + r % per * size
        else:
            at = start + r // 8 * stride + r % 8 * width + c * size
        if width:
            at = at ^ (at >> 3 & {128: 0x70, 64: 0x30, 32: 0x10}[width])
        flat = at.ravel()
        self._check_shared(flat, size, text)
        if not self.written[(flat[:, None] + np.arange(size)).ravel()].all():
            self.report.add("uninit", text)
        if self.unfenced[flat].any():
            self.report.add("proxy", f"{text}: reads what was written without fence.proxy.async")
        self._note("shared", flat, size, np.full(len(flat), first), False, text)
        self.unit.wgmma_reads.append((flat, size, first, text))
        return self.shared[size][at // size]

    def wgmma(self, shape, ty, d, a, b, scale, trans_a, trans_b, k, text):
        self._whole_warps(np.full(self.lanes, 0xFFFFFFFF, "u4"), k, text)
        _, n, depth = map(int, re.match(r"m(\d+)n(\d+)k(\d+)", shape).groups())
        lane = np.arange(32)
        group, inside = lane // 4, lane % 4
        size = {"bf16": 2, "f16": 2, "tf32": 4}[ty]

        def number(u):
            if ty == "tf32":
                return (u & np.uint32(0xFFFFE000)).view("f4")
            return f_from_bf16(u) if ty == "bf16" else u.view("f2").astype("f4")

        out = np.zeros((len(d), self.lanes), "f4")
        for first in range(0, self.lanes, 32):
            quarter = (self.unit.first + first) // 32 % 4
            if isinstance(a, list):
                A = np.zeros((16, depth), "f4")
                for i, x in enumerate(a):
                    u = x[first : first + 32]
                    if size == 4:
                        A[group + 8 * (i % 2), inside + 4 * (i // 2)] = number(u)
                    else:
                        for j, half in enumerate(
                            ((u & np.uint32(0xFFFF)).astype("u2"), (u >> np.uint32(16)).astype("u2"))
                        ):
                            A[group + 8 * (i % 2), inside * 2 + j + 8 * (i // 2)] = number(half)
            else:
                A = number(self._described(a[first], np.arange(16) + 16 * quarter, depth, trans_a, first, text, size))
            B = number(self._described(b[first], np.arange(n), depth, trans_b, first, text, size))
            D = A.astype("f8") @ B.astype("f8").T
            for i, x in enumerate(d):
                old = x[first : first + 32].view("f4").astype("f8") if scale[first] else 0.0
                out[i, first : first + 32] = old + D[group + 8 * (i // 2 % 2), 8 * (i // 4) + inside * 2 + i % 2]
        return out.view("u4")

    def wgmma_commit(self):
        self.unit.wgmma_open.append(self.unit.wgmma_reads)
        self.unit.wgmma_reads = []

    def wgmma_wait(self, count):
        while len(self.unit.wgmma_open) > count:
            for flat, size, first, text in self.unit.wgmma_open.pop(0):
                self._note("shared", flat, size, np.full(len(flat), first), False, text)

    # asynchronous copies land as late as they may: when they are waited for

    def copy_async(self, to, frm, size, source, k, text):
        lanes = self._lanes(k)
        self.unit.pending.append((to, frm, size, source, lanes, text))
        if len(lanes):  # it may land at once: whoever reads these bytes before the next barrier is in danger
            self._note("shared", to[lanes], size, lanes, True, text)

    def commit_group(self, k):
        self.unit.groups_open.append(self.unit.pending)
        self.unit.pending = []

    def wait_group(self, count, k):
        groups = self.unit.groups_open
        while len(groups) > count:
            for to, frm, size, source, lanes, text in groups.pop(0):
                source = np.full(self.lanes, size) if source is None else source.astype("i8")
                self._check_shared(to[lanes], size, text)
                for lane in lanes:
                    data = np.zeros(size, "u1")
                    take = int(source[lane])
                    if take:
                        address = frm[lane : lane + 1]
                        at = self._find(address, size, text)
                        offset = int(address[0]) - self.allocations[at].base
                        data[:take] = self.allocations[at].views[1][offset : offset + take]
                        self._note(at, np.array([offset]), take, np.array([lane]), False, text)
                    here = int(to[lane])
                    self.shared[1][here : here + size] = data
                    self.written[here : here + size] = True
                    self.unfenced[here : here + size] = (self.unit.first + lane) // 32 + 1
                if len(lanes):
                    self._note("shared", to[lanes], size, lanes, True, text)
