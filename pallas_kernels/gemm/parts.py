"""Scales of Wgrad as the tensor cores take them: the product of a row's scale and a column's is one of rank one.

Multiplying the sums of a K step by a scale for each row and each column costs a thread two multiplications and an addition
a number, and a load of every column's scale: twice what Fprop does. As a product of 16 along k the tensor cores make
both scales one number a sum, in a quarter of the time of the step itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32

ROWS = 8  # of an operand, whose parts lie together
# float32 = three bfloat16 parts, of which the largest comes first. All of their products but the smallest, 2^-32 of the
# largest; the tensor cores add up part i of the left scale times part i of the right.
_LEFT, _RIGHT = (0, 0, 1, 1, 0, 2, 1, 2), (0, 1, 0, 1, 2, 0, 2, 1)
PARTS = ROWS * len(_LEFT)  # of the scales of so many rows


@jax.named_scope("in_parts")
def in_parts(scales: Float32[Array, "steps rows"], left: bool) -> BFloat16[Array, "steps rows/8 64"]:
    """Eight parts of each scale, of half of it for the left operand, since the kernel adds up every product of parts twice.

    Made as words of two parts: XLA would interleave eight arrays of 16 bits at half of a copy's speed.
    """
    rest, parts = scales * 0.5 if left else scales, []
    for _ in range(3):
        # XLA may keep more bits in a conversion to bfloat16 and back, but not in this.
        parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    bits = [jax.lax.bitcast_convert_type(part, jnp.uint32)[..., None] for part in parts]
    # A scale's sign is zero, which XLA does not know. Else it finds that all calls of a layer choose by the same numbers, and makes
    # one kernel of them, for which turned operands of all products wait: 1.5 GiB more of a step of `h200`.
    sign = jax.lax.bitcast_convert_type(scales, jnp.uint32)[..., None] >> 31
    word = jax.lax.broadcasted_iota(jnp.int32, (*scales.shape, 4), 2) + sign.astype(jnp.int32)

    def chosen(numbers: tuple[int, ...]) -> Array:
        return jax.lax.select_n(word, *(jnp.broadcast_to(bits[i], word.shape) for i in numbers))

    of_word = _LEFT if left else _RIGHT
    words = chosen(of_word[::2]) >> 16 | chosen(of_word[1::2])  # of the parts, the lower halves are zero
    return jax.lax.bitcast_convert_type(words, jnp.bfloat16).reshape(scales.shape[0], -1, PARTS)
