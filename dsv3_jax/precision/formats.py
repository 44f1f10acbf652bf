"""Number formats of the recipe: 8-bit floats, the 12-bit E5M6, and scales that are powers of two (V3 sec. 3.3).

A format is named EaMb: one sign bit, a exponent bits, b mantissa bits. Rounding is to the nearest, ties to even;
what is too large saturates at the format's largest number. NaN stays NaN, and infinity stays infinity, or NaN in
E4M3, which has none. Float32 subnormals count as zero: some backends flush them, so nothing may depend on them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SMALLEST_NORMAL = 2.0**-126


@dataclasses.dataclass(frozen=True)
class Format:
    """A floating-point format, and the dtype that its values are kept in."""

    name: str
    mantissa_bits: int
    min_exponent: int  # of the smallest normal number
    max: float
    dtype: str

    def round(self, x: Float[Array, "*s"]) -> Array:
        """The nearest value of this format, in its dtype."""
        finite = jnp.clip(flush(x), -self.max, self.max)
        if self.name == "E5M6":
            finite = _round_mantissa(finite, self.mantissa_bits, self.min_exponent)
        # clip would turn an infinity into the largest number and hide it.
        return jnp.where(jnp.isinf(x), x, finite).astype(self.dtype)


E4M3 = Format("E4M3", 3, -6, 448.0, "float8_e4m3fn")
E5M2 = Format("E5M2", 2, -14, 57344.0, "float8_e5m2")
# 12 bits have no dtype of their own. Every E5M6 number is a float16 number; a kernel would pack two in three bytes.
E5M6 = Format("E5M6", 6, -14, 65024.0, "float16")
FORMATS = {format.name: format for format in (E4M3, E5M2, E5M6)}


def flush(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """float32, with subnormals turned to zero; the sign stays."""
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, jnp.copysign(0.0, x), x)


def _round_mantissa(x: Array, bits: int, min_exponent: int) -> Array:
    """Rounds to `bits` mantissa bits, fewer below the smallest normal exponent. Exact: it only scales by powers of two."""
    quantum = jnp.maximum(exponent(x), min_exponent) - bits
    return jnp.round(x * power_of_two(-quantum)) * power_of_two(quantum)


def exponent(x: Float[Array, "*s"]) -> Array:
    """`floor(log2 |x|)` of normal float32 numbers, from their bits; -127 for zero."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return ((bits >> 23) & 0xFF) - 127


def power_of_two(exponents: Array) -> Float[Array, "*s"]:
    """2 to integer powers -126..127, exact (`exp2` is not on every backend)."""
    return jax.lax.bitcast_convert_type((exponents.astype(jnp.int32) + 127) << 23, jnp.float32)


def round_up_to_power_of_two(scale: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The smallest power of two that is not below a positive scale (UE8M0 rounded up); NaN and infinity stay."""
    floor = power_of_two(exponent(scale))
    return jnp.where(jnp.isfinite(scale), jnp.where(floor < scale, floor * 2, floor), scale)
