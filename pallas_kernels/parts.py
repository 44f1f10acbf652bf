"""Scales of Wgrad as the tensor cores take them: the product of a row's scale and a column's is one of rank one.

Multiplying the sums of a K step by a scale for each row and each column costs a thread two multiplications and an addition
a number, and a load of every column's scale: twice what Fprop does. As a product of 16 along k the tensor cores make
both scales one number a sum, in a quarter of the time of the step itself.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32, UInt32

Operand = Literal["left", "right"]  # of a product

ROWS = 8  # of an operand, whose parts lie together
# float32 = three bfloat16 parts, of which the largest comes first. All of their products but the smallest, 2^-32 of the
# largest; the tensor cores add up part i of the left scale times part i of the right.
_ORDER: dict[Operand, tuple[int, ...]] = {"left": (0, 0, 1, 1, 0, 2, 1, 2), "right": (0, 1, 0, 1, 2, 0, 2, 1)}
EACH = 8  # parts of one scale
PARTS = ROWS * EACH  # of the scales of so many rows


@jax.named_scope("in_parts")
def in_parts(scales: Float32[Array, "steps rows"], operand: Operand) -> BFloat16[Array, "steps rows/8 64"]:
    """Eight parts of each scale, of half of it for the left operand, since the kernel adds up every product of parts twice.

    Made as words of two parts: XLA would interleave eight arrays of 16 bits at half of a copy's speed.
    """
    words = [word[..., None] for word in words_of_parts(scales, operand)]
    # A scale's sign is zero, which XLA does not know. Else it finds that all calls of a layer choose by the same numbers, and makes
    # one kernel of them, for which turned operands of all products wait: 1.5 GiB more of a step of `h200`.
    sign = jax.lax.bitcast_convert_type(scales, jnp.uint32)[..., None] >> 31
    number = jax.lax.broadcasted_iota(jnp.int32, (*scales.shape, len(words)), 2) + sign.astype(jnp.int32)
    chosen = jax.lax.select_n(number, *(jnp.broadcast_to(word, number.shape) for word in words))
    return jax.lax.bitcast_convert_type(chosen, jnp.bfloat16).reshape(scales.shape[0], -1, PARTS)


def words_of_parts(scales: Float32[Array, "*s"], operand: Operand) -> list[UInt32[Array, "*s"]]:
    """Four words of two parts each, the first part in the lower half."""
    rest, bits = scales * 0.5 if operand == "left" else scales, []
    for _ in range(3):
        bits.append(_rounded(rest))
        rest = rest - jax.lax.bitcast_convert_type(bits[-1], jnp.float32)
    order = _ORDER[operand]
    return [bits[low] >> 16 | bits[high] for low, high in zip(order[::2], order[1::2], strict=True)]


def whole(parts: BFloat16[Array, "steps eights 64"] | Float32[Array, "steps rows"], operand: Operand) -> Float32[Array, "steps _"]:
    """The scales again, or those that were not taken apart."""
    if parts.ndim == 2:
        return parts
    each = parts.reshape(parts.shape[0], -1, EACH).astype(jnp.float32)
    large, middle, small = (each[..., _ORDER[operand].index(i)] for i in range(3))
    total = large + (middle + small)
    return total * 2 if operand == "left" else total


def _rounded(x: Array) -> Array:
    """The bits of x, rounded to bfloat16, ties to even; 0 of subnormal numbers. XLA may keep more bits in a conversion and back."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & jnp.uint32(0xFFFF0000)
    rounded = jnp.where(bits >> 23 & 0xFF == 0, jnp.uint32(0), rounded)
    return jnp.where(jnp.isnan(x), jnp.uint32(0x7FC00000), rounded)
