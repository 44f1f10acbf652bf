"""Arithmetic of the quantizers for Hopper, in registers: scales, quotients and formats."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantize.instructions import flushed, larger, product, reciprocal
from pallas_kernels.quantize.reference import E4M3, E5M6_BITS, E5M6_MIN_EXPONENT, tile_scale

Array = jax.Array

# Quotients are those of IEEE division, rounded to E4M3, without dividing: that would take more instructions than the
# time of a memory-bound kernel has room for, and XLA lets LLVM divide with an error. A product with the reciprocal is off
# by an ulp or two and so moves ties. What is enough depends on x:
#   SHORT   bfloat16: high * (1 + rest) with 35 bits of the reciprocal. Right for every pair of x and scale (tested)
#   LONG    float32: a product, what it lacks, and a correction, the last two as fused multiply-adds: correctly rounded
#           whatever the reciprocal's last bits. Mosaic allows that contraction; XLA on a CPU may not make it
#   WIDE    of `are_ordinary` tiles: 48 bits of the reciprocal, in two parts. No pair is closer than that to a bound between two
#           values of E4M3 (a test goes through those that are close), and no number is subnormal
# Scales that are powers of two have exact reciprocals, and the product is right. It is also enough where x was computed, and has
# rounding errors of its own. There, a subnormal number is not made zero, which only a tile whose largest is under 6e-33 could show.
SHORT, LONG, WIDE = "short", "long", "wide"


def kind_of(x: Any) -> str:
    return LONG if x.dtype == jnp.float32 else SHORT


def quantize_lines(x: Array, layout: Any, power_of_two: bool, kind: str) -> tuple[Array, Array]:
    """E4M3 values of x[lines, n] in float32, and the scale of each line."""
    scale = tile_scale(largest_of(keys_of(x, layout)), power_of_two)
    return quotient(x, scale, (0,), power_of_two, kind, layout).astype(E4M3), scale


def keys_of(x: Array, layout: Any) -> Array:
    """The largest magnitude of each line of x[lines, n], as an unsigned integer: the bits of its negative, those of NaN below.

    So two elements take one instruction, and then two of the results one more.
    """
    half = x.shape[1] // 2
    return jnp.max(unsigned(larger(x[:, :half], x[:, half:], layout)), axis=1)


def largest_of(key: Array) -> Array:
    """The magnitude that a largest of `keys_of` stands for, 0 if that is of NaN."""
    sign = jnp.uint32(1 << 31)
    return lax.bitcast_convert_type(jnp.maximum(key, sign) ^ sign, jnp.float32)


def quantize_computed(x: Array, layout: Any, power_of_two: bool, factor: Array | None = None) -> tuple[Array, Array]:
    """The same of lines that were computed, or of their products with `factor`, one for each line."""
    return quantize_known(x, layout, largest_of(keys_of(x, layout)), power_of_two, factor)


def quantize_known(x: Array, layout: Any, largest: Array, power_of_two: bool, factor: Array | None = None) -> tuple[Array, Array]:
    """The same where the largest of each line is known."""
    if factor is not None:
        largest = largest * jnp.abs(factor)
        largest = jnp.where(jnp.isnan(largest), 0.0, largest)
    scale = tile_scale(largest, power_of_two)
    return computed_quotient(x, layout, scale, power_of_two, factor), scale


def computed_quotient(x: Array, layout: Any, scale: Array, power_of_two: bool, factor: Array | None = None) -> Array:
    """E4M3 of computed x / scale, or of x * factor / scale."""
    inverse = _if_finite(scale, _inverse_power(scale)) if power_of_two else reciprocal(scale, layout.reduce(1))
    inverse = inverse if factor is None else inverse * factor
    return (x * lax.broadcast_in_dim(inverse, x.shape, (0,))).astype(E4M3)


def quotient(x: Array, scale: Array, axes: tuple[int, ...], power_of_two: bool, kind: str, layout: Any) -> Array:
    """x / scale, where `axes` of x are those of scale. An infinite scale makes zeros, and NaN of infinity.

    A subnormal x is zero. `layout`: of x.
    """
    spread = functools.partial(lax.broadcast_in_dim, shape=x.shape, broadcast_dimensions=axes)
    if power_of_two:
        return product(x, spread(_if_finite(scale, _inverse_power(scale))), layout)
    if kind == SHORT:
        high, rest = _split_reciprocal(scale)
        quotient = product(x, spread(_if_finite(scale, high)), layout)  # exact: 8 by 12 bits
        return quotient + quotient * spread(rest)
    if kind == WIDE:
        high = 1.0 / scale
        high = high + high * (1.0 - scale * high)
        rest = high * (1.0 - scale * high)
        high, rest = (spread(_if_finite(scale, part)) for part in (high, rest))
        return x * high + x * rest
    x = flushed(x, layout)
    inverse = spread(_if_finite(scale, 1.0 / scale))
    quotient = x * inverse
    return quotient + (x - quotient * spread(_if_finite(scale, scale))) * inverse


def are_ordinary(scales: Array) -> Array:
    """Whether the scales of a tile are so far from the ends of float32 (2^-100 to 2^90) that WIDE may divide what they scale."""
    return jnp.max(jnp.abs(_bits(scales) - (122 << 23))) < 95 << 23  # exponents within 95 of that of 2^-5


def to_e5m6(x: Array) -> Array:
    """x, whose largest is at most E5M6's, rounded to six bits in float16, ties to even."""
    last = 23 - E5M6_BITS
    rounded = as_float((_bits(x) + (1 << last - 1) - 1 + (lax.shift_right_logical(_bits(x), last) & 1)) & -(1 << last))
    quantum = 2.0 ** (E5M6_MIN_EXPONENT - E5M6_BITS)
    subnormal = lax.round(x / quantum, lax.RoundingMethod.TO_NEAREST_EVEN) * quantum
    rounded = jnp.where(jnp.abs(x) < 2.0**E5M6_MIN_EXPONENT, subnormal, rounded)
    return jnp.where(jnp.isnan(x), x, rounded).astype(jnp.float16)


def _if_finite(scale: Array, value: Array) -> Array:
    return jnp.where(scale < jnp.inf, value, 0.0)


def _split_reciprocal(scale: Array) -> tuple[Array, Array]:
    """1 / scale = high * (1 + rest), high of 12 bits: Newton's step with an exact remainder, on the mantissa."""
    mantissa = as_float((_bits(scale) & 0x7FFFFF) | 0x3F800000)
    high, top = as_float(_bits(1.0 / mantissa) & -0x1000), as_float(_bits(mantissa) & -0x1000)
    left = (1.0 - top * high) - (mantissa - top) * high
    return high * _inverse_power(scale), left * (1.0 + left * (1.0 + left))


def _inverse_power(scale: Array) -> Array:
    """1 over the power of two in a positive scale."""
    return as_float(0x7F000000 - (_bits(scale) & 0x7F800000))


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def unsigned(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def as_float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def opened(values: Array, scales: Array) -> Array:
    return values.astype(jnp.float32) * lax.broadcast_in_dim(scales, values.shape, (0,))
