"""Arithmetic of PTX on arrays with one element a lane: rounding, fused products, integers, approximations.

numpy's float32 and float64 round as IEEE 754 says, and so does PTX with `.rn`. What is left for this file:

    fma           one rounding of x·y + z. In float64 the product of two float32 is exact, and the sum is rounded to odd
                  first, which makes the second rounding, to float32, the right one (Boldo and Melquiond, "Emulation of
                  a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    bf16          arithmetic in float32, then to nearest even: 24 bits are more than twice 8 and 2, so that rounding
                  twice is rounding once.
    ftz           subnormal operands and results are zeros of the same sign.
    approximate   ex2, lg2, rcp, sqrt, rsqrt and div.full are rounded from float64, or off by as much as the manual
                  allows.
"""

from fractions import Fraction

import numpy as np

from tests.ptx.storage import F2, F4, F8, I8, U1, U2, U4, U8

SMALLEST_F32 = 2.0**-126  # the smallest normal number
SUBNORMAL = (np.float64(SMALLEST_F32).view(U8) << np.uint64(1)) - np.uint64(1)
SPLIT = 134217729.0  # 2**27 + 1, which parts a float64 into two halves of 26 bits

# --- rounding


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (x.astype(U4) << np.uint32(16)).view(F4)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, to nearest even; every NaN becomes the NaN 0x7fff of the hardware."""
    u = np.ascontiguousarray(x, F4).view(U4)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(U2)


def flush(x: np.ndarray) -> np.ndarray:
    """.ftz of float32."""
    small = np.abs(x) < np.float32(SMALLEST_F32)
    return np.where(small, np.copysign(np.float32(0), x), x) if np.count_nonzero(small) else x


def two_sum(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(s, e): s is x + y as rounded, and s + e is x + y exactly (Knuth)."""
    s = x + y
    t = s - x
    return s, (x - (s - t)) + (y - t)


def to_odd(s: np.ndarray, e: np.ndarray) -> np.ndarray:
    """s + e rounded to odd, where s is s + e to nearest: a number that is not exact ends in a 1."""
    u = s.view(I8)
    inexact = ((e > 0) | (e < 0)) & ((u & 1) == 0)  # a NaN in e comes of an infinite s, which stays
    away = (e > 0) == (s > 0)
    return np.where(inexact, u + np.where(away, 1, -1), u).view(F8)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z of float32, rounded once."""
    product, z = np.multiply(x, y, dtype=F8), z.astype(F8)
    s = product + z
    # Rounding s again errs only where s is half way between two float32, or where these are subnormal.
    u = s.view(U8)
    halfway = (u & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    subnormal = (u << np.uint64(1)) - np.uint64(1) < SUBNORMAL  # a zero wraps around
    if np.count_nonzero(halfway | subnormal):
        s = to_odd(*two_sum(product, z))
        s = np.where(s == 0, product + z, s)  # keeps the sign of a zero
    return s.astype(F4)


def fma_f16(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z of float16, rounded once."""
    product, z = x.astype(F8) * y.astype(F8), z.astype(F8)
    s = to_odd(*two_sum(product, z))
    return np.where(s == 0, product + z, s).astype(F2)


def fma_bf16(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z of bfloat16 that lie in float32: the result is rounded to odd there, and to bfloat16 by `to_bf16`."""
    product, z = x.astype(F8) * y.astype(F8), z.astype(F8)
    s = to_odd(*two_sum(product, z))
    s = np.where(s == 0, product + z, s)
    return float32_to_odd(s)


def float32_to_odd(x: np.ndarray) -> np.ndarray:
    """float64 to float32, rounded to odd: `to_bf16` then rounds as if it were the only rounding."""
    short = x.astype(F4)
    error = x - short.astype(F8)
    u = short.view(np.int32)
    inexact = ((error > 0) | (error < 0)) & ((u & 1) == 0) & np.isfinite(short)
    return np.where(inexact, u + np.where((error > 0) == (x > 0), np.int32(1), np.int32(-1)), u).view(F4)


def fma_f64(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z of float64, rounded once."""
    product = x * y
    high_x, high_y = x * SPLIT, y * SPLIT
    high_x, high_y = high_x - (high_x - x), high_y - (high_y - y)
    low_x, low_y = x - high_x, y - high_y
    error = ((high_x * high_y - product) + high_x * low_y + low_x * high_y) + low_x * low_y
    t, t_error = two_sum(z, error)
    v, v_error = two_sum(product, t)
    out = v + to_odd(*two_sum(t_error, v_error))
    plain = product + z
    out = np.where((out == 0) | ~np.isfinite(out), plain, out)
    # The error of a product below 2**-968 is subnormal, and halves of large numbers overflow.
    size, largest = np.abs(product), np.maximum(np.abs(x), np.abs(y))
    finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(z)
    extreme = finite & (((size < 2.0**-960) & (x != 0) & (y != 0)) | (np.maximum(size, largest) > 2.0**990))
    for lane in np.flatnonzero(extreme | finite & (np.abs(z) > 2.0**990)):
        exact = Fraction(float(x[lane])) * Fraction(float(y[lane])) + Fraction(float(z[lane]))
        try:
            out[lane] = float(exact) if exact else plain[lane]
        except OverflowError:
            out[lane] = np.copysign(np.inf, 1 if exact > 0 else -1)
    return out


def maximum(x: np.ndarray, y: np.ndarray, of: np.ufunc = np.fmax) -> np.ndarray:
    """max of floats: a number wins over NaN, and +0 is larger than -0."""
    unsigned = f"u{x.dtype.itemsize}"
    return np.where(x == y, (x.view(unsigned) & y.view(unsigned)).view(x.dtype), of(x, y))


def minimum(x: np.ndarray, y: np.ndarray, of: np.ufunc = np.fmin) -> np.ndarray:
    unsigned = f"u{x.dtype.itemsize}"
    return np.where(x == y, (x.view(unsigned) | y.view(unsigned)).view(x.dtype), of(x, y))


def nan_maximum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """max.NaN: a NaN wins."""
    return maximum(x, y, np.maximum)


def nan_minimum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return minimum(x, y, np.minimum)


# --- approximate instructions: the manual bounds their errors, and does not say more


class Approximate:
    """ex2.approx and the like: rounded from float64, or (noise) off by the whole bound.

    The sign of the error is decided by the bits of the operand, so that equal operands have equal results. Bounds of
    the PTX manual for float32:

        ex2   2^-22, relative                   rcp       1 ulp
        lg2   2^-22, absolute for an operand    sqrt      2^-23, relative
              in (0.5, 2), otherwise relative   rsqrt     2^-22.9, relative
                                                div.full  2 ulp
    """

    def __init__(self, noise: bool = False):
        self.noise = noise

    @staticmethod
    def _sign(x: np.ndarray) -> np.ndarray:
        u = np.ascontiguousarray(x, F4).view(U4)
        u = (u ^ (u >> np.uint32(15))) * np.uint32(2654435761)
        return np.where(u & np.uint32(0x10000), 1.0, -1.0)

    @staticmethod
    def _within(y: np.ndarray, bound: np.ndarray) -> np.ndarray:
        """The float32 next to y + bound that is no farther from y."""
        nearest = y.astype(F4)
        out = (y + bound).astype(F4)
        out = np.where(np.abs(out.astype(F8) - y) > np.abs(bound), np.nextafter(out, nearest), out)
        # Exact zeros, infinities and results too small for a normal number stay as they are.
        return np.where(np.isfinite(nearest) & (np.abs(y) >= 2.0**-125), out, nearest)

    def ex2(self, x: np.ndarray) -> np.ndarray:
        y = np.exp2(x.astype(F8))
        return self._within(y, y * self._sign(x) * 2.0**-22) if self.noise else y.astype(F4)

    def lg2(self, x: np.ndarray) -> np.ndarray:
        y = np.log2(x.astype(F8))
        if not self.noise:
            return y.astype(F4)
        bound = self._sign(x) * 2.0**-22
        near_one = (x > 0.5) & (x < 2.0)
        return np.where(near_one, (y + bound).astype(F4), self._within(y, np.abs(y) * bound))

    def rcp(self, x: np.ndarray) -> np.ndarray:
        return self._ulps(1.0 / x.astype(F8), 1, x)

    def sqrt(self, x: np.ndarray) -> np.ndarray:
        y = np.sqrt(x.astype(F8))
        return self._within(y, y * self._sign(x) * 2.0**-23) if self.noise else y.astype(F4)

    def rsqrt(self, x: np.ndarray) -> np.ndarray:
        y = 1.0 / np.sqrt(x.astype(F8))
        return self._within(y, y * self._sign(x) * 2.0**-22.9) if self.noise else y.astype(F4)

    def div(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self._ulps(x.astype(F8) / y.astype(F8), 2, x)

    def _ulps(self, y: np.ndarray, ulps: int, x: np.ndarray) -> np.ndarray:
        out = y.astype(F4)
        if not self.noise:
            return out
        return self._within(y, self._sign(x) * np.ldexp(np.float64(ulps), np.frexp(out)[1] - 24))


def rcp_f64(x: np.ndarray) -> np.ndarray:
    """rcp.approx.ftz.f64: 1/x with the lower half of its bits cut off, and subnormal operands and results flushed."""
    small = np.abs(x) < 2.0**-1022
    y = 1.0 / np.where(small, np.copysign(0.0, x), x)
    cut = (y.view(U8) & np.uint64(0xFFFFFFFF00000000)).view(F8)
    cut = np.where(np.abs(y) < 2.0**-1022, np.copysign(0.0, y), cut)
    return np.where(np.isnan(y), y, cut)


# --- integers


def to_integer(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A float64 without fraction to an integer: what is too large or too small is clamped, NaN becomes 0."""
    info = np.iinfo(dtype)
    high, low = x >= float(info.max), x <= float(info.min)
    inner = np.where(high | low | np.isnan(x), 0.0, x)
    return np.where(high, info.max, np.where(low, info.min, inner.astype(dtype))).astype(dtype)


def quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """div of integers, towards zero. The manual leaves division by zero open: all bits are set."""
    zero = y == 0
    y = np.where(zero, np.ones_like(y), y)
    return np.where(zero, ~np.zeros_like(x), (x - np.fmod(x, y)) // y)


def remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """rem of integers, with the sign of x. Of a division by zero all bits are set."""
    zero = y == 0
    return np.where(zero, ~np.zeros_like(x), np.fmod(x, np.where(zero, np.ones_like(y), y)))


def shift_left(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """shl: shifts by the width or more give 0."""
    width = x.dtype.itemsize * 8
    return np.where(s < width, x << np.minimum(s, width - 1).astype(x.dtype), np.zeros_like(x))


def shift_right(x: np.ndarray, s: np.ndarray) -> np.ndarray:
    """shr: shifts by the width or more give 0, or only copies of the sign."""
    width = x.dtype.itemsize * 8
    shifted = x >> np.minimum(s, width - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(s < width, shifted, np.zeros_like(x))


def multiply_wide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """mul.wide: the whole product, twice as wide."""
    wide = f"{x.dtype.kind}{x.dtype.itemsize * 2}"
    return x.astype(wide) * y.astype(wide)


def multiply_high(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """mul.hi: the upper half of the product."""
    bits = x.dtype.itemsize * 8
    if bits < 64:
        return (multiply_wide(x, y) >> bits).astype(x.dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a, b = x.view(U8), y.view(U8)
    middle = (a >> half) * (b & low) + ((a & low) * (b & low) >> half)
    other = (a & low) * (b >> half) + (middle & low)
    high = (a >> half) * (b >> half) + (middle >> half) + (other >> half)
    if x.dtype.kind == "i":  # a negative number was taken for one that is 2**64 larger
        high = high - np.where(x < 0, b, 0) - np.where(y < 0, a, 0)
    return high.view(x.dtype)


def bit_field(x: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: `length` bits of x from `position` on. Of a signed x the field's highest bit is copied upwards."""
    width = x.dtype.itemsize * 8
    position, length = np.minimum(position & np.uint32(255), width), np.minimum(length & np.uint32(255), width)
    u = x.view(f"u{width // 8}")
    one = np.array(1, u.dtype)
    inside = np.minimum(length, width - position)
    mask = np.where(inside >= width, ~np.zeros_like(u), (one << np.minimum(inside, width - 1).astype(u.dtype)) - one)
    field = shift_right(u, position) & mask
    if x.dtype.kind == "u":
        return field
    sign = np.minimum(position.astype(I8) + length - 1, width - 1).clip(0)
    negative = (shift_right(u, sign.astype(U4)) & one).astype(bool) & (length > 0)
    return np.where(negative, field | ~mask, field).view(x.dtype)


def permute_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each byte of the result is one of the eight bytes of b:a, or eight copies of such a byte's sign."""
    both = (b.astype(U8) << np.uint64(32)) | a.astype(U8)
    out = np.zeros_like(a)
    for place in range(4):
        choice = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = (both >> ((choice & np.uint32(7)).astype(U8) * np.uint64(8))).astype(U1).astype(U4)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out = out | (np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * place))
    return out


def compare(x: np.ndarray, y: np.ndarray, how: str) -> np.ndarray:
    """setp of floats. With a NaN the ordered comparisons (lt, ne) are false, and the unordered (ltu, neu) true."""
    match how:
        case "num":
            return (x == x) & (y == y)
        case "nan":
            return (x != x) | (y != y)
        case "ne":
            return (x < y) | (x > y)
        case "equ":
            return ~((x < y) | (x > y))
    return ORDERED[how](x, y) if how in ORDERED else ~ORDERED[OPPOSITE[how]](x, y)


ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
OPPOSITE = {"neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
COMPARISONS = {*ORDERED, *OPPOSITE, "ne", "equ", "num", "nan"}
