"""Every opcode of the emulator against integers and fractions of Python, on odd values."""

import math
import operator
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.handwritten import address, apply, grid, run

INF, NAN = math.inf, math.nan
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
DTYPES = {"f16": "f2", "f32": "f4", "f64": "f8"}


def rounded(exact: Fraction, kind: str) -> float:
    """The exact value, other than 0, to nearest even in a format with (bits, lowest, highest exponent)."""
    bits, lowest, highest = FORMATS[kind]
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()  # or one less
    exponent = max(exponent if size >= Fraction(2) ** exponent else exponent - 1, lowest)
    unit = Fraction(2) ** (exponent - bits + 1)
    value = round(exact / unit) * unit  # Python rounds to even
    if abs(value) >= Fraction(2) ** (highest + 1):
        return INF if exact > 0 else -INF
    return float(value) if value else math.copysign(0.0, exact)


def odd_values(kind: str) -> np.ndarray:
    """Zeros, the smallest and largest of their kind, infinities, NaN, and what does not fit well."""
    bits, lowest, highest = FORMATS[kind]
    one = 2.0 ** (1 - bits)
    values = [
        0.0, -0.0, 1.0, -1.0, 1.0 + one, 1.0 - one / 2, -1.0 - one, 3.0, 0.5, 1.5 * 2.0 ** -(bits + 1),
        -(2.0 ** -bits), 2.0**bits - 1, 2.0**lowest, -(2.0**lowest), 2.0**lowest * (1 - one), 2.0**lowest * one,
        -(2.0**lowest) * one, (2.0 - one) * 2.0**highest, -(2.0 - one) * 2.0**highest, INF, -INF, NAN,
    ]  # fmt: skip
    return store(np.array(values), kind)


def store(values: np.ndarray, kind: str) -> np.ndarray:
    """float64 numbers that the format holds, as the array that a kernel reads."""
    if kind == "bf16":
        return (values.astype("f4").view("u4") >> 16).astype("u2")
    return values.astype(DTYPES[kind])


def load(array: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return (array.astype("u4") << 16).view("f4").astype("f8")
    return array.astype("f8")


def expected(exact, plain, kind: str, *operands: np.ndarray) -> np.ndarray:
    """By fractions where all are finite, otherwise, and for the sign of a zero, by float64 as IEEE 754 says."""
    out = []
    with np.errstate(all="ignore"):
        for row in zip(*operands, strict=True):
            value = float(plain(*(np.float64(x) for x in row)))
            if all(math.isfinite(x) for x in row):
                fraction = exact(*(Fraction(float(x)) for x in row))
                value = rounded(fraction, kind) if fraction else math.copysign(0.0, value)
            out.append(value)
    return np.array(out)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal numbers, signs of zeros included; any NaN for NaN."""
    assert (np.isnan(found) == np.isnan(wanted)).all()
    number = ~np.isnan(wanted)
    np.testing.assert_array_equal(found[number], wanted[number])
    np.testing.assert_array_equal(np.signbit(found[number]), np.signbit(wanted[number]))


def check(instruction: str, kind: str, function, operands: list[np.ndarray], plain=None) -> None:
    found = load(apply(instruction, operands[0].dtype.str[1:], *operands), kind)
    wanted = expected(function, plain or function, kind, *(load(x, kind) for x in operands))
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["add", "sub", "mul"])
def test_sums_and_products_round_to_nearest_even(name, kind):
    function = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[name]
    check(f"{name}.{kind} {{d}}, {{a}}, {{b}}", kind, function, grid(odd_values(kind), odd_values(kind)))


@pytest.mark.parametrize("kind", FORMATS)
def test_fma_rounds_once(kind):
    generator = np.random.default_rng(1)
    x, y, z = grid(*[odd_values(kind)] * 3)
    bits = FORMATS[kind][0]
    # Products and sums that end half way, or one unit of a far smaller number from it.
    a, b = (1 + generator.integers(0, 2**bits, (2, 4000)) * 2.0 ** (1 - bits)) * [[1.0], [-1.0]]
    c = generator.choice([1.0, -1.0], 4000) * 2.0 ** generator.integers(-3 * bits, 2 * bits, 4000).clip(
        -24 if kind == "f16" else -99
    )
    c = c.clip(-(2.0**15), 2.0**15)
    extra = [store(v, kind) for v in (a, b, c)]
    operands = [np.concatenate(pair) for pair in zip((x, y, z), extra, strict=True)]
    check(f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}}", kind, lambda x, y, z: x * y + z, operands)


def test_fma_by_way_of_float64_would_round_twice():
    """x·y is 64 - 2^-34: in float64 the sum is a tie, and to nearest even that goes the wrong way."""
    x, y, z = (np.array([v], "f4") for v in (8 * (1 + 2.0**-20), 8 * (1 - 2.0**-20), 2.0**30 + 128))
    twice = np.float32(np.float64(x[0]) * np.float64(y[0]) + np.float64(z[0]))
    assert apply("fma.rn.f32 {d}, {a}, {b}, {c}", "f4", x, y, z) == 2.0**30 + 128 != twice


def test_fma_with_a_subnormal_result_would_round_twice_elsewhere():
    """z + 2^-150 - 2^-190: of a subnormal float32 2^-150 is half a unit."""
    x, y, z = (
        np.array([v], "f4") for v in (2.0**-75 * (1 + 2.0**-20), 2.0**-75 * (1 - 2.0**-20), 2.0**-127 + 2.0**-149)
    )
    twice = np.float32(np.float64(x[0]) * np.float64(y[0]) + np.float64(z[0]))
    assert apply("fma.rn.f32 {d}, {a}, {b}, {c}", "f4", x, y, z) == z != twice


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2", "f32x2"])
def test_packed_pairs_are_two_numbers(kind):
    half = kind[:-2]
    values = [
        np.resize(store(np.array(v), half), 32) for v in ([1.5, -2.0, INF, 0.0], [3.0, 0.25, 1.0, -0.0], [1.0, 7.0])
    ]
    packed = [x.view(f"u{2 * x.dtype.itemsize}") for x in values]
    found = apply(f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}}", packed[0].dtype.str[1:], *packed)
    x, y, z = (load(v, half) for v in values)
    assert_same(load(found.view(values[0].dtype), half), x * y + z)


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_halves_are_added_to_a_float32(half):
    x, z = grid(odd_values(half), odd_values("f32"))
    wanted = expected(operator.sub, operator.sub, "f32", load(x, half), load(z, "f32"))
    assert_same(apply(f"sub.rn.f32.{half} {{d}}, {{a}}, {{b}}", "f4", x, z).astype("f8"), wanted)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_quotients_and_roots(kind):
    x, y = grid(odd_values(kind), odd_values(kind))
    with np.errstate(all="ignore"):
        assert_same(apply(f"div.rn.{kind} {{d}}, {{a}}, {{b}}", DTYPES[kind], x, y), x / y)
        assert_same(apply(f"sqrt.rn.{kind} {{d}}, {{a}}", DTYPES[kind], x), np.sqrt(x))
        assert_same(apply(f"rcp.rn.{kind} {{d}}, {{a}}", DTYPES[kind], x), 1 / x)


@pytest.mark.parametrize("kind", ["bf16", "f32", "f64"])
def test_a_number_wins_over_nan_in_max_unless_it_says_nan(kind):
    x, y = grid(odd_values(kind), odd_values(kind))
    a, b = load(x, kind), load(y, kind)
    for name, choose in (("max", max), ("min", min)):
        wanted = []
        for u, v in zip(a, b, strict=True):
            if math.isnan(u) or math.isnan(v):
                wanted.append(v if math.isnan(u) else u)
            elif u == v:
                wanted.append(choose((u, v), key=lambda s: math.copysign(1, s)))
            else:
                wanted.append(choose(u, v))
        found = load(apply(f"{name}.{kind} {{d}}, {{a}}, {{b}}", x.dtype.str[1:], x, y), kind)
        assert_same(found, np.array(wanted))
        wanted = np.where(np.isnan(a) | np.isnan(b), NAN, wanted)
        assert_same(load(apply(f"{name}.NaN.{kind} {{d}}, {{a}}, {{b}}", x.dtype.str[1:], x, y), kind), wanted)


def test_the_largest_of_three():
    x, y, z = grid(*[odd_values("f32")[::3]] * 3)
    assert_same(apply("max.f32 {d}, {a}, {b}, {c}", "f4", x, y, z), np.fmax(np.fmax(x, y), z))
    assert_same(apply("min.NaN.f32 {d}, {a}, {b}, {c}", "f4", x, y, z), np.minimum(np.minimum(x, y), z))


def test_ftz_flushes_operands_and_results_to_zeros_of_their_sign():
    x, y = grid(odd_values("f32"), odd_values("f32"))
    with np.errstate(all="ignore"):
        flush = lambda v: np.where(np.abs(v) < np.float32(2.0**-126), np.copysign(np.float32(0), v), v)  # noqa: E731
        wanted = flush(flush(x) * flush(y))
        assert_same(apply("mul.ftz.f32 {d}, {a}, {b}", "f4", x, y), wanted)
        wanted = flush((flush(x).astype("f8") * flush(y) + flush(x)).astype("f4"))
        assert_same(apply("fma.rn.ftz.f32 {d}, {a}, {b}, {a}", "f4", x, y), wanted)
    assert_same(apply("abs.ftz.f32 {d}, {a}", "f4", x), np.abs(flush(x)))
    np.testing.assert_array_equal(apply("setp.lt.ftz.f32 {d}, {a}, {b}", "?", x, y), flush(x) < flush(y))


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_comparisons_know_nan(kind):
    x, y = grid(odd_values(kind), odd_values(kind))
    a, b = load(x, kind), load(y, kind)
    nan = np.isnan(a) | np.isnan(b)
    ordered = {"eq": a == b, "ne": (a != b) & ~nan, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    wanted = {**ordered, **{f"{name}u": value | nan for name, value in ordered.items()}, "num": ~nan, "nan": nan}
    for how, value in wanted.items():
        np.testing.assert_array_equal(apply(f"setp.{how}.{kind} {{d}}, {{a}}, {{b}}", "?", x, y), value, err_msg=how)


def test_signs_and_sizes():
    x = odd_values("f64")
    assert_same(apply("neg.f64 {d}, {a}", "f8", x), -x)
    assert_same(apply("abs.f64 {d}, {a}", "f8", x), np.abs(x))


# --- approximations


def exact_function(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        x, y = x.astype("f8"), y.astype("f8")
        results = {
            "ex2": np.exp2(x), "lg2": np.log2(x), "rcp": 1 / x, "sqrt": np.sqrt(x), "rsqrt": 1 / np.sqrt(x),
            "div": x / y,
        }  # fmt: skip
        return results[name]


APPROXIMATIONS = {
    "ex2": "ex2.approx.f32 {d}, {a}", "lg2": "lg2.approx.f32 {d}, {a}", "rcp": "rcp.approx.f32 {d}, {a}",
    "sqrt": "sqrt.approx.f32 {d}, {a}", "rsqrt": "rsqrt.approx.f32 {d}, {a}", "div": "div.full.f32 {d}, {a}, {b}",
}  # fmt: skip


@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximations_err_by_the_manuals_bound_when_asked_to(name):
    generator = np.random.default_rng(2)
    x, y = generator.uniform(0.01, 100, (2, 2000)).astype("f4")
    x[:1000] = generator.uniform(0.5, 2, 1000)
    truth = exact_function(name, x, y)
    near_one = (x > 0.5) & (x < 2)
    size = np.abs(truth)
    bound = {
        "ex2": size * 2.0**-22, "lg2": np.where(near_one, 1.0, size) * 2.0**-22, "rcp": np.spacing(truth.astype("f4")),
        "sqrt": size * 2.0**-23, "rsqrt": size * 2.0**-22.9, "div": 2 * np.spacing(truth.astype("f4")),
    }[name].astype("f8")  # fmt: skip
    quiet = apply(APPROXIMATIONS[name], "f4", x, y).astype("f8")
    np.testing.assert_array_equal(quiet, truth.astype("f4"))
    loud = apply(APPROXIMATIONS[name], "f4", x, y, noise=True).astype("f8") - truth
    half_unit = np.where(near_one & (name == "lg2"), np.spacing(np.abs(truth).astype("f4")) / 2, 0)
    assert (np.abs(loud) <= bound + half_unit).all()
    assert np.mean(np.abs(loud) / bound) > 0.45 and 0.4 < np.mean(loud > 0) < 0.6
    again = apply(APPROXIMATIONS[name], "f4", x[::-1].copy(), y[::-1].copy(), noise=True)[::-1]
    np.testing.assert_array_equal(again.astype("f8") - truth, loud)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_approximations_of_odd_values(name, noise):
    x = odd_values("f32")[np.abs(odd_values("f32")) != np.float32(1.0)]
    x = np.concatenate([x, np.array([1, -1, 127, 128, -126, -150], "f4")])
    y = np.ones_like(x)
    with np.errstate(over="ignore"):
        truth = exact_function(name, x, y).astype("f4")
    special = ~np.isfinite(truth) | ((truth == 0) & (name != "lg2"))  # about lg2(1) the manual says no more than 2^-22
    found = apply(APPROXIMATIONS[name], "f4", x, y, noise=noise)
    assert_same(found[special], truth[special])
    np.testing.assert_allclose(found[~special], truth[~special], rtol=3e-7, atol=2.0**-22 if name == "lg2" else 1e-45)


def test_rcp_of_float64_keeps_the_upper_half():
    x = np.array([3.0, -0.7, 1e300, 2.0**-1030, INF, -INF, 0.0, -0.0, 1e308, NAN])
    found = apply("rcp.approx.ftz.f64 {d}, {a}", "f8", x)
    assert (found[:4].view("u8") & 0xFFFFFFFF == 0).all()
    np.testing.assert_allclose(found[:3], 1 / x[:3], rtol=2.0**-20)
    assert_same(found[3:], np.array([INF, 0.0, -0.0, INF, -INF, 0.0, NAN]))


# --- integers

INTEGERS = {
    "s16": np.array([0, 1, -1, 5, 2**15 - 1, -(2**15)], "i2"),
    "u16": np.array([0, 1, 7, 2**15, 2**16 - 1], "u2"),
    "s32": np.array([0, 1, -1, 2, -7, 1000, 2**31 - 1, -(2**31), -(2**31) + 1, 65536], "i4"),
    "u32": np.array([0, 1, 2, 7, 31, 2**31 - 1, 2**31, 2**32 - 1, 65535], "u4"),
    "s64": np.array([0, 1, -1, 3, -7, 2**31, -(2**31), 2**63 - 1, -(2**63), -(2**63) + 1], "i8"),
    "u64": np.array([0, 1, 7, 2**32 - 1, 2**32, 2**63, 2**64 - 1], "u8"),
}


def wrap(values: list[int], dtype: str) -> np.ndarray:
    bits = np.dtype(dtype).itemsize * 8
    return np.array([v & (2**bits - 1) for v in values], f"u{bits // 8}").view(dtype)


def check_integers(instruction: str, dtype: str, function, *operands: np.ndarray) -> None:
    wanted = wrap([function(*(int(v) for v in row)) for row in zip(*operands, strict=True)], dtype)
    np.testing.assert_array_equal(apply(instruction, dtype, *operands), wanted, err_msg=instruction)


def towards_zero(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


def of_dividend_sign(x: int, y: int) -> int:
    return x - y * towards_zero(x, y)


@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_arithmetic_wraps(kind):
    values = INTEGERS[kind]
    x, y = grid(values, values)
    dtype, bits = values.dtype.str[1:], values.dtype.itemsize * 8
    for name, function in {
        "add": operator.add,
        "sub": operator.sub,
        "mul.lo": operator.mul,
        "min": min,
        "max": max,
    }.items():
        check_integers(f"{name}.{kind} {{d}}, {{a}}, {{b}}", dtype, function, x, y)
    for name, function in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        check_integers(f"{name}.b{bits} {{d}}, {{a}}, {{b}}", dtype, function, x, y)
    check_integers(f"not.b{bits} {{d}}, {{a}}", dtype, operator.invert, values)
    check_integers(f"mul.hi.{kind} {{d}}, {{a}}, {{b}}", dtype, lambda a, b: a * b >> bits, x, y)
    check_integers(f"mad.lo.{kind} {{d}}, {{a}}, {{b}}, {{a}}", dtype, lambda a, b: a * b + a, x, y)
    if kind.startswith("s"):
        check_integers(f"neg.{kind} {{d}}, {{a}}", dtype, operator.neg, values)
    if bits > 16:
        safe = (y != 0) & ~((x == np.iinfo(dtype).min) & (y == np.array(-1).astype(dtype)) & (kind[0] == "s"))
        check_integers(f"div.{kind} {{d}}, {{a}}, {{b}}", dtype, towards_zero, x[safe], y[safe])
        check_integers(f"rem.{kind} {{d}}, {{a}}, {{b}}", dtype, of_dividend_sign, x[safe], y[safe])


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_products(kind):
    x, y = grid(INTEGERS[kind], INTEGERS[kind])
    z = np.resize(INTEGERS[f"{kind[0]}64"], len(x))
    check_integers(f"mul.wide.{kind} {{d}}, {{a}}, {{b}}", f"{x.dtype.kind}8", operator.mul, x, y)
    check_integers(
        f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}}", f"{x.dtype.kind}8", lambda a, b, c: a * b + c, x, y, z
    )


@pytest.mark.parametrize("kind", INTEGERS)
def test_shifts_by_the_width_and_more(kind):
    values = INTEGERS[kind]
    dtype, bits = values.dtype.str[1:], values.dtype.itemsize * 8
    x, s = grid(values, np.array([0, 1, 5, bits - 1, bits, bits + 1, 64, 200, 2**31], "u4"))
    check_integers(f"shl.b{bits} {{d}}, {{a}}, {{b}}", dtype, lambda a, n: a << n if n < bits else 0, x, s)
    check_integers(f"shr.{kind} {{d}}, {{a}}, {{b}}", dtype, lambda a, n: a >> min(n, bits), x, s)
    for by in (0, 3, bits - 1, bits, bits + 9):
        check_integers(f"shl.b{bits} {{d}}, {{a}}, {by}", dtype, lambda a, n=by: a << n if n < bits else 0, values)
        check_integers(f"shr.{kind} {{d}}, {{a}}, {by}", dtype, lambda a, n=by: a >> min(n, bits), values)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_integer_comparisons_know_the_sign(kind):
    x, y = grid(INTEGERS[kind], INTEGERS[kind])
    for how in ("eq", "ne", "lt", "le", "gt", "ge"):
        wanted = getattr(operator, how)(x, y)
        np.testing.assert_array_equal(apply(f"setp.{how}.{kind} {{d}}, {{a}}, {{b}}", "?", x, y), wanted)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_bit_fields(kind):
    values = INTEGERS[kind]
    bits = values.dtype.itemsize * 8
    edges = np.array([0, 1, 7, 28, bits - 1, bits, 60, 255, 256 + 3], "u4")

    def field(x, position, length):  # as the manual writes it
        position, length = position & 255, length & 255
        bit = lambda i: (x >> i) & 1  # noqa: E731
        unsigned = kind[0] == "u" or length == 0
        sign = 0 if unsigned else bit(min(position + length - 1, bits - 1))
        return sum((bit(position + i) if i < length and position + i <= bits - 1 else sign) << i for i in range(bits))

    check_integers(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}}", values.dtype.str[1:], field, *grid(values, edges, edges))


def test_bytes_are_permuted():
    a, b, selector = grid(
        np.array([0x04030281, 0xFF7F8000], "u4"), np.array([0x88776655], "u4"),
        np.array([0x3210, 0x7654, 0x0000, 0xFEDC, 0x8888, 0x1B5A, 0xFFFF3210], "u4"),
    )  # fmt: skip

    def permuted(a, b, selector):
        source, out = a.to_bytes(4, "little") + b.to_bytes(4, "little"), []
        for i in range(4):
            choice = selector >> 4 * i & 15
            byte = source[choice & 7]
            out.append((255 if byte & 128 else 0) if choice & 8 else byte)
        return int.from_bytes(bytes(out), "little")

    check_integers("prmt.b32 {d}, {a}, {b}, {c}", "u4", permuted, a, b, selector)


def test_bits_are_counted():
    check_integers("popc.b32 {d}, {a}", "u4", int.bit_count, INTEGERS["u32"])
    check_integers("popc.b64 {d}, {a}", "u4", int.bit_count, INTEGERS["u64"])


# --- moves and conversions


@pytest.mark.parametrize(
    ("to", "source"), [("s64", "s32"), ("u64", "u32"), ("u32", "u64"), ("u16", "u32"), ("u32", "u16"), ("s32", "s16")]
)
def test_integers_are_cut_and_extended_by_the_sources_sign(to, source):
    dtype = f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}"
    check_integers(f"cvt.{to}.{source} {{d}}, {{a}}", dtype, int, INTEGERS[source])


def test_hints_for_caches_change_nothing():
    x, out = np.arange(64, dtype="u4"), np.zeros(64, "u4")
    body = f"""createpolicy.fractional.L2::evict_last.b64 %rd25, 1.0; {address("rd21", 0, 8)} {address("rd22", 1, 8)}
        ld.global.L1::evict_last.L2::cache_hint.v2.b32 {{%r1, %r2}}, [%rd21], %rd25;
        st.global.cs.b32 [%rd22], %r1; st.global.L1::no_allocate.b32 [%rd22+4], %r2;"""
    assert run(body, x, out).findings == []
    np.testing.assert_array_equal(out, x)


def test_a_narrow_load_extends_by_its_type():
    x = np.array([0, 1, 127, 128, 255], "u1")
    assert apply("mov.b16 {d}, {a}", "u2", x).tolist() == [0, 1, 127, 128, 255]
    out, bytes_ = np.zeros(32, "i2"), np.resize(x, 32)
    body = f"{address('rd21', 0, 1)} ld.global.s8 %rs1, [%rd21]; {address('rd22', 1, 2)} st.global.b16 [%rd22], %rs1;"
    assert run(body, bytes_, out).findings == []
    assert out[:5].tolist() == [0, 1, 127, -128, -1]


@pytest.mark.parametrize(("to", "source"), [("f32", "f64"), ("f16", "f32"), ("bf16", "f32")])
def test_narrower_floats_round_to_nearest_even(to, source):
    generator = np.random.default_rng(3)
    bits, lowest, _ = FORMATS[to]
    some = (1 + generator.integers(0, 2 ** (bits + 2), 500) * 2.0 ** (-bits - 1)) * 2.0 ** generator.integers(
        -9, 9, 500
    )
    small = generator.integers(0, 64, 100) * 2.0 ** (lowest - bits - 1)
    values = np.concatenate([odd_values(source), store(np.concatenate([some, small]), source)])
    dtype = {"f32": "f4", "f16": "f2", "bf16": "u2"}[to]
    found = load(apply(f"cvt.rn.{to}.{source} {{d}}, {{a}}", dtype, values), to)
    assert_same(found, expected(lambda x: x, lambda x: x, to, values.astype("f8")))


@pytest.mark.parametrize(("to", "source"), [("f64", "f32"), ("f32", "f16"), ("f32", "bf16")])
def test_wider_floats_are_exact(to, source):
    values = odd_values(source)
    assert_same(apply(f"cvt.{to}.{source} {{d}}, {{a}}", DTYPES[to], values).astype("f8"), load(values, source))


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_whole_numbers(kind):
    x = np.concatenate([odd_values(kind), np.array([0.5, 1.5, 2.5, -0.5, -1.5, 7.7, -7.7], DTYPES[kind])])
    for how, function in {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.items():
        assert_same(apply(f"cvt.{how}.{kind}.{kind} {{d}}, {{a}}", DTYPES[kind], x), function(x))
        for to, low, high in (("s32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1), ("s64", -(2**63), 2**63 - 1)):
            clamped = [0 if math.isnan(v) else int(min(max(Fraction(v), low), high)) if math.isfinite(v)
                       else (high if v > 0 else low) for v in (float(v) for v in function(x))]  # fmt: skip
            dtype = f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}"
            found = apply(f"cvt.{how}.{to}.{kind} {{d}}, {{a}}", dtype, x)
            np.testing.assert_array_equal(found, wrap(clamped, dtype))


@pytest.mark.parametrize("source", ["s32", "u32", "s64"])
def test_integers_to_floats(source):
    for to in ("f32", "f64", *([] if source == "s64" else ["f16", "bf16"])):
        close = 257 << np.arange(22, dtype=np.int64)  # halfway between two bf16, and a bit above and below
        near = [(close + step).astype(INTEGERS[source].dtype) for step in (-1, 0, 1)]
        values = np.concatenate([INTEGERS[source], *near])
        wanted = [rounded(Fraction(int(v)), to) if v else 0.0 for v in values]
        found = apply(f"cvt.rn.{to}.{source} {{d}}, {{a}}", DTYPES.get(to, "u2"), values)
        assert_same(load(found, to), np.array(wanted))


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_two_floats_become_a_pair_the_first_above(half):
    x, y = grid(odd_values("f32"), odd_values("f32"))
    found = apply(f"cvt.rn.{half}x2.f32 {{d}}, {{a}}, {{b}}", "u4", x, y)
    low, high = (found & 0xFFFF).astype("u2"), (found >> 16).astype("u2")
    view = (lambda u: u) if half == "bf16" else (lambda u: u.view("f2"))
    for part, source in ((view(high), x), (view(low), y)):
        assert_same(load(part, half), expected(lambda v: v, lambda v: v, half, source.astype("f8")))


def test_registers_are_packed_and_unpacked_lowest_first():
    x = np.array([0x1122334455667788, 0x8000000000000001], "u8")
    assert apply("mov.b64 {{%r1, %r2}}, {a}; mov.b64 {d}, {{%r2, %r1}}", "u8", x).tolist() == [
        0x5566778811223344, 0x0000000180000000,
    ]  # fmt: skip
    assert apply("mov.b64 {{%r1, _}}, {a}; mov.b32 {d}, %r1", "u4", x).tolist() == [0x55667788, 1]
    assert apply("mov.b32 {{%rs1, %rs2}}, {a}; mov.b32 {d}, {{%rs2, %rs1}}", "u4", np.array([0xAAAABBBB], "u4")) == [
        0xBBBBAAAA
    ]


def test_select_and_predicates():
    x = np.array([-3, 0, 4], "i4")
    body = "setp.lt.s32 %p2, {a}, 1; setp.gt.s32 %p3, {a}, -1; "
    assert apply(body + "and.pred %p4, %p2, %p3; selp.b32 {d}, {a}, 9, %p4", "i4", x).tolist() == [9, 0, 9]
    assert apply(body + "not.pred %p4, %p2; mov.pred %p5, %p4; selp.b32 {d}, 1, 0, %p5", "i4", x).tolist() == [0, 0, 1]
    assert apply(body + "xor.pred {d}, %p2, -1", "?", x).tolist() == [False, False, True]
    assert apply("mov.b32 {d}, 7; " + body + "@%p2 add.s32 {d}, {a}, {a}; @!%p3 mov.b32 {d}, 1", "i4", x).tolist() == [
        1,
        0,
        7,
    ]
    assert apply("setp.eq.s32 %p2, {a}, 0; selp.f32 {d}, 0f3F800000, 0fBF800000, %p2", "f4", x).tolist() == [-1, 1, -1]
