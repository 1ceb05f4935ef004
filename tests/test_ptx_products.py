"""Products on tensor cores and moves of matrices, against sums written out element by element."""

import numpy as np
import pytest

from tests.ptx import EmulationError
from tests.ptx.handwritten import address, run

PIECES = {"bf16": 2, "f16": 2, "tf32": 1}  # numbers in a register
generator = np.random.default_rng(5)


def encode(x: np.ndarray, kind: str) -> np.ndarray:
    """Small whole numbers as they are stored."""
    x = np.ascontiguousarray(x, "f4")
    if kind == "tf32":
        return x.view("u4") | 0xABC  # of tf32 the lowest bits do not count
    return (x.view("u4") >> 16).astype("u2") if kind == "bf16" else x.astype("f2").view("u2")


def pack(values: list[float], kind: str) -> int:
    return int(encode(np.array(values), kind).view("u4")[0])


def fragments(matrix: np.ndarray, where, count: int, kind: str) -> np.ndarray:
    """[count, 32] of registers: `where(register, number in it, lane)` is (row, column)."""
    out = np.zeros((count, 32), "u4")
    for register in range(count):
        for lane in range(32):
            places = [where(register, j, lane) for j in range(PIECES[kind])]
            out[register, lane] = pack([matrix[place] for place in places], kind)
    return out


def a_place(kind):
    per = PIECES[kind]
    return lambda i, j, lane: (lane // 4 + 8 * (i % 2), lane % 4 * per + j + 4 * per * (i // 2))


def b_place(kind):
    per = PIECES[kind]
    return lambda i, j, lane: (lane % 4 * per + j + 4 * per * i, lane // 4)


def sums_place(i, lane):
    return lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + lane % 4 * 2 + i % 2


def loads(array: int, count: int, first: int, threads: int) -> str:
    """Put array[i, thread] into %r(first + i)."""
    lines = [address("rd21", array, 4)]
    return "".join(lines) + "".join(f"ld.global.b32 %r{first + i}, [%rd21+{4 * threads * i}];" for i in range(count))


def stores(array: int, count: int, first: int, threads: int) -> str:
    return address("rd21", array, 4) + "".join(
        f"st.global.b32 [%rd21+{4 * threads * i}], %r{first + i};" for i in range(count)
    )


def names(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def multiply(kind: str) -> str:
    registers = ", ".join(names(first, count) for first, count in ((40, 4), (10, 4), (20, 2), (30, 4)))
    return f"mma.sync.aligned.m16n8k{8 * PIECES[kind]}.row.col.f32.{kind}.{kind}.f32 {registers};"


@pytest.mark.parametrize("warps", [1, 3])
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma(kind, warps):
    depth, threads = 8 * PIECES[kind], 32 * warps
    matrices = [
        (generator.integers(-9, 9, shape).astype("f4"))
        for shape in ((warps, 16, depth), (warps, depth, 8), (warps, 16, 8))
    ]
    a = np.concatenate([fragments(m, a_place(kind), 4, kind) for m in matrices[0]], 1)
    b = np.concatenate([fragments(m, b_place(kind), 2, kind) for m in matrices[1]], 1)
    c = np.zeros((4, threads), "f4")
    for i in range(4):
        for t in range(threads):
            c[i, t] = matrices[2][t // 32][sums_place(i, t % 32)]
    out = np.zeros((4, threads), "f4")
    body = loads(0, 4, 10, threads) + loads(1, 2, 20, threads) + loads(2, 4, 30, threads)
    body += multiply(kind)
    body += stores(3, 4, 40, threads)
    for lockstep in (True, False):
        out[:] = 0
        assert run(body, a, b, c, out, threads=threads, lockstep=lockstep).findings == []
        for i in range(4):
            for t in range(threads):
                product = matrices[0][t // 32] @ matrices[1][t // 32] + matrices[2][t // 32]
                assert out[i, t] == product[sums_place(i, t % 32)]


def test_sums_of_mma_are_rounded_once():
    """1 + 15 · 2^-25: added one by one in float32, each term would be lost."""
    a = np.zeros((16, 16), "f4")
    a[:, 0], a[:, 1:] = 1.0, 2.0**-12
    b = np.ones((16, 8), "f4")
    b[1:] = 2.0**-13
    out = np.zeros((4, 32), "f4")
    body = loads(0, 4, 10, 32) + loads(1, 2, 20, 32) + "".join(f"mov.b32 %r{i}, 0;" for i in range(30, 34))
    body += multiply("bf16")
    fragment = fragments(a, a_place("bf16"), 4, "bf16"), fragments(b, b_place("bf16"), 2, "bf16")
    assert run(body + stores(2, 4, 40, 32), *fragment, out).findings == []
    assert (out == np.float32(1 + 15 * 2.0**-25)).all() and out[0, 0] > 1


@pytest.mark.parametrize("transposed", [False, True], ids=["", "trans"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix_and_stmatrix(n, transposed):
    """Rows lie 32 bytes apart. What ldmatrix reads, stmatrix writes elsewhere."""
    trans = ".trans" if transposed else ""
    halves = generator.integers(0, 2**16, (8 * n, 8)).astype("u2")
    out, back = np.zeros((n, 32), "u4"), np.zeros((8 * n, 4), "u4")
    row = names(2, 4)
    body = f"""setp.lt.u32 %p1, %r0, {8 * n}; mul.lo.s32 %r1, %r0, 32; add.s32 %r6, %r1, 2048;
        mul.wide.u32 %rd23, %r0, 16; add.s64 %rd24, %rd23, %rd0; add.s64 %rd25, %rd23, %rd2;
        @%p1 ld.global.v4.b32 {row}, [%rd24]; @%p1 st.shared.v4.b32 [%r1], {row}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {names(10, n)}, [%r1];
        stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%r6], {names(10, n)}; bar.sync 0;
        @%p1 ld.shared.v4.b32 {row}, [%r6]; @%p1 st.global.v4.b32 [%rd25], {row};
        {stores(1, n, 10, 32)}"""
    assert run(body, halves, out, back, shared=4096).findings == []
    for i in range(n):
        tile = halves[8 * i : 8 * i + 8].astype("u4")
        tile = tile.T if transposed else tile
        for lane in range(32):
            low, high = tile[lane // 4, 2 * (lane % 4)], tile[lane // 4, 2 * (lane % 4) + 1]
            assert out[i, lane] == low | high << 16
    assert (back.view("u2") == halves).all()


def test_ldmatrix_reads_what_was_written_and_rows_are_aligned():
    body = "mul.lo.s32 %r1, %r0, 16; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1+{}];"
    out = np.zeros(1, "u4")
    assert [kind for kind, _ in run(body.replace("{}", "0"), out, shared=512).findings] == ["uninit"]
    with pytest.raises(EmulationError, match="^align"):
        run(body.replace("{}", "8"), out, shared=1024)
    with pytest.raises(EmulationError, match="^bounds"):
        run(body.replace("{}", "384"), out, shared=496)


# --- wgmma


def swizzled(row: int, byte: int, width: int, start: int) -> int:
    """Byte of a matrix whose rows of `width` bytes are swizzled: pieces of 16 bytes change places by the row."""
    pieces = width // 16
    turn = row * width // 128 % 8 % pieces if width < 128 else row % 8
    piece = byte // 16 ^ turn
    return start + row * width + piece * 16 + byte % 16


def lay_out(matrix: np.ndarray, kind: str, width: int, start: int, memory: np.ndarray) -> int:
    """Write a matrix, whose rows have `width` bytes, into shared memory; its descriptor."""
    size = 4 if kind == "tf32" else 2
    stored = encode(matrix, kind).view("u1").reshape(*matrix.shape, size)
    for r in range(matrix.shape[0]):
        for c in range(matrix.shape[1]):
            at = swizzled(r, c * size, width, start)
            memory[at : at + size] = stored[r, c]
    swizzle = {128: 1, 64: 2, 32: 3}[width]
    return start >> 4 | 1 << 16 | (8 * width >> 4) << 32 | swizzle << 62


FILL = """mul.wide.u32 %rd24, %r0, 4; add.s64 %rd23, %rd0, %rd24;
    shl.b32 %r3, %r0, 2;
    $FILL: ld.global.b32 %r2, [%rd23]; st.shared.b32 [%r3], %r2; add.s64 %rd23, %rd23, 512; add.s32 %r3, %r3, 512;
    setp.lt.u32 %p1, %r3, {total}; @%p1 bra $FILL;"""
PUBLISH = "fence.proxy.async.shared::cta; bar.sync 0;"


def product(kind: str, n: int, a: str, b: int, transposed: str, scale: bool = False) -> str:
    depth = 8 * PIECES[kind]
    return f"""mov.b64 %rd30, {b}; setp.eq.s32 %p2, 0, {0 if scale else 1}; wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n{n}k{depth}.f32.{kind}.{kind}
        {names(100, n // 2)}, {a}, %rd30, %p2, 1, 1{transposed};
        wgmma.commit_group.sync.aligned;"""


def group_sums(out: np.ndarray, n: int) -> np.ndarray:
    """[64, n] from [n / 2, 128]."""
    sums = np.zeros((64, n))
    for i in range(n // 2):
        for t in range(128):
            row, column = sums_place(i, t % 32)
            sums[16 * (t // 32) + row, column] = out[i, t]
    return sums


@pytest.mark.parametrize("lockstep", [True, False], ids=["lockstep", "by warps"])
@pytest.mark.parametrize(
    ("kind", "n", "width"), [("bf16", 8, 128), ("f16", 32, 64), ("bf16", 16, 32), ("tf32", 16, 128)]
)
def test_wgmma_of_two_matrices_in_shared_memory(kind, n, width, lockstep):
    columns = width // (4 if kind == "tf32" else 2)  # a swizzled row; the product is of its first columns
    depth = 8 * PIECES[kind]
    a, b = generator.integers(-9, 9, (64, columns)), generator.integers(-9, 9, (n, columns))
    memory = np.zeros(64 * width + 1024 + n * width, "u1")
    memory = np.concatenate([memory, np.zeros(-len(memory) % 512, "u1")])
    at_b = -(-64 * width // 1024) * 1024
    descriptors = lay_out(a, kind, width, 0, memory), lay_out(b, kind, width, at_b, memory)
    out, start = np.zeros((n // 2, 128), "f4"), generator.integers(-5, 5, (n // 2, 128)).astype("f4")
    body = f"""{FILL.format(total=len(memory))} {loads(2, n // 2, 100, 128)} {PUBLISH} mov.b64 %rd31, {descriptors[0]};
        {product(kind, n, "%rd31", descriptors[1], ", 0, 0" if kind != "tf32" else "", scale=True)}
        wgmma.wait_group.sync.aligned 0; {stores(1, n // 2, 100, 128)}"""
    report = run(body, memory, out, start, threads=128, shared=len(memory), lockstep=lockstep)
    assert report.findings == []
    wanted = a[:, :depth] @ b[:, :depth].T + group_sums(start, n)
    np.testing.assert_array_equal(group_sums(out, n), wanted)


@pytest.mark.parametrize("width", [128, 64, 32])
def test_wgmma_of_registers_and_a_transposed_matrix(width):
    """B lies as it is used: [k, n], rows of n."""
    n = width // 2
    a, b = generator.integers(-9, 9, (64, 16)), generator.integers(-9, 9, (16, n))
    memory = np.zeros(-(-16 * width // 512) * 512, "u1")
    descriptor = lay_out(b, "bf16", width, 0, memory)
    registers = np.concatenate([fragments(a[16 * w : 16 * w + 16], a_place("bf16"), 4, "bf16") for w in range(4)], 1)
    out = np.zeros((n // 2, 128), "f4")
    body = f"""{FILL.format(total=len(memory))} {loads(2, 4, 10, 128)} {PUBLISH}
        {product("bf16", n, names(10, 4), descriptor, ", 1")} wgmma.wait_group.sync.aligned 0;
        {stores(1, n // 2, 100, 128)}"""
    assert run(body, memory, out, registers, threads=128, shared=len(memory), lockstep=True).findings == []
    np.testing.assert_array_equal(group_sums(out, n), a @ b)


def faulty(before: str = PUBLISH, after: str = "wgmma.wait_group.sync.aligned 0; bar.sync 0;", **settings):
    """Kinds of findings of a product with other fences, and with a write after it."""
    memory = np.zeros(8 * 128 + 512, "u1")
    descriptor = lay_out(np.ones((8, 64)), "bf16", 128, 0, memory)
    body = f"""{FILL.format(total=len(memory))} {loads(1, 4, 10, 128)} {before}
        {product("bf16", 8, names(10, 4), descriptor, ", 0")} {after} shl.b32 %r3, %r0, 2; st.shared.b32 [%r3], 0;"""
    registers = np.zeros((4, 128), "u4")
    return sorted(
        {kind for kind, _ in run(body, memory, registers, threads=128, shared=len(memory), **settings).findings}
    )


@pytest.mark.parametrize("lockstep", [True, False], ids=["lockstep", "by warps"])
def test_wgmma_needs_its_fence_its_barriers_and_its_wait(lockstep):
    assert faulty(lockstep=lockstep) == []
    assert "proxy" in faulty(before="bar.sync 0;", lockstep=lockstep)
    assert "race" in faulty(before="fence.proxy.async.shared::cta;", lockstep=lockstep)
    assert "race" in faulty(after="wgmma.wait_group.sync.aligned 0;", lockstep=lockstep)
    assert "race" in faulty(after="bar.sync 0;", lockstep=lockstep)  # still reading


@pytest.mark.parametrize("lockstep", [True, False], ids=["lockstep", "by warps"])
def test_the_fence_is_before_the_barrier_or_behind_it_in_every_warp(lockstep):
    """Triton's comes behind it, in the warps that read."""
    assert faulty(before="fence.proxy.async.shared::cta; bar.sync 0;", lockstep=lockstep) == []
    assert faulty(before="bar.sync 0; fence.proxy.async.shared::cta;", lockstep=lockstep) == []
    one = "bar.sync 0; setp.lt.u32 %p3, %r0, 32; @%p3 fence.proxy.async.shared::cta;"
    assert faulty(before=one, lockstep=lockstep) == ["proxy"]
    assert "race" in faulty(before="fence.proxy.async.shared::cta;", lockstep=lockstep)


ANOTHER = """wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
    {%r110, %r111, %r112, %r113}, {a}, %rd30, %p2, 1, 1, 0; wgmma.commit_group.sync.aligned;"""
FIRST, OTHER = names(100, 4), names(10, 4)  # sums of the first product, factors of both
WAIT = "wgmma.wait_group.sync.aligned 0; bar.sync 0;"
TWO = ANOTHER.replace("{a}", OTHER) + " wgmma.wait_group.sync.aligned 1; "
TOUCHES = {
    "read": ("add.f32 %r4, %r4, %r101; {wait}", True),
    "written": ("mov.b32 %r103, 0; {wait}", True),
    "read in another block": ("bra.uni $ON; $ON: st.global.b32 [%rd1], %r100; {wait}", True),
    "a factor of the next product": (ANOTHER.replace("{a}", FIRST) + "{wait}", True),
    "read behind the wait": ("{wait} add.f32 %r4, %r4, %r101;", False),
    "others are read": ("add.f32 %r4, %r4, %r10; {wait}", False),
    "the older of two": (TWO + "mov.b32 %r4, %r100; {wait}", False),
    "the newer of two": (TWO + "mov.b32 %r4, %r110; {wait}", True),
}


@pytest.mark.parametrize("lockstep", [True, False], ids=["lockstep", "by warps"])
@pytest.mark.parametrize(("after", "found"), TOUCHES.values(), ids=TOUCHES)
def test_the_sums_of_wgmma_are_there_behind_its_wait(after, found, lockstep):
    assert faulty(after=after.replace("{wait}", WAIT), lockstep=lockstep) == (["async"] if found else [])


# --- shuffles and reductions

SHUFFLES = {  # the lane that lane t reads, or None
    ("bfly", 4, 31): lambda t: t ^ 4,
    ("up", 1, 0): lambda t: t - 1 if t >= 1 else None,
    ("up", 16, 0): lambda t: t - 16 if t >= 16 else None,
    ("down", 3, 31): lambda t: t + 3 if t + 3 < 32 else None,
    ("idx", 5, 31): lambda t: 5,
    ("idx", 3, 0x181F): lambda t: t // 8 * 8 + 3,  # segments of eight lanes
    ("bfly", 8, 0x181F): lambda t: None if t ^ 8 > t // 8 * 8 + 7 else t ^ 8,
    ("down", 1, 0x181F): lambda t: t + 1 if t % 8 < 7 else None,
}


@pytest.mark.parametrize(("how", "by", "clamp"), SHUFFLES)
def test_shuffles(how, by, clamp):
    out, within = np.zeros(64, "u4"), np.zeros(64, "u4")
    body = f"""add.s32 %r1, %r0, 1000; shfl.sync.{how}.b32 %r2|%p1, %r1, {by}, {clamp}, -1; selp.b32 %r3, 1, 0, %p1;
        {address("rd21", 0, 4)} st.global.b32 [%rd21], %r2; {address("rd21", 1, 4)} st.global.b32 [%rd21], %r3;"""
    for lockstep in (True, False):
        assert run(body, out, within, threads=64, lockstep=lockstep).findings == []
        source = [SHUFFLES[how, by, clamp](t % 32) for t in range(64)]
        assert within.tolist() == [s is not None for s in source]
        assert out.tolist() == [1000 + t // 32 * 32 + (t % 32 if s is None else s) for t, s in enumerate(source)]


@pytest.mark.parametrize(
    ("how", "kind"), [("add", "s32"), ("min", "s32"), ("max", "s32"), ("min", "u32"), ("max", "f32")]
)
def test_reductions_over_a_warp(how, kind):
    x = generator.integers(-(2**31), 2**31, 64).astype("i4")
    x = {"s32": x, "u32": x.view("u4"), "f32": x.astype("f4")}[kind]
    if kind == "f32":
        x[::3] = np.nan
    out = np.zeros_like(x)
    body = f"""{address("rd21", 0, 4)} ld.global.b32 %r1, [%rd21]; redux.sync.{how}.{kind} %r2, %r1, -1;
        {address("rd21", 1, 4)} st.global.b32 [%rd21], %r2;"""
    assert run(body, x, out, threads=64, lockstep=True).findings == []
    operation = {"add": np.add, "min": np.fmin, "max": np.fmax}[how]
    for w in range(2):
        assert (out[32 * w : 32 * w + 32] == operation.reduce(x[32 * w : 32 * w + 32], dtype=x.dtype)).all()
