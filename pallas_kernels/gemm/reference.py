"""What the products compute, in plain JAX (V3 sec. 3.3.2, figure 7b): exact products, float32 sums within 128, then scales."""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import platform
from pallas_kernels.parts import whole

GROUP = 128


def gemm(a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array) -> jax.Array:
    """See `pallas_kernels.gemm.gemm`."""
    n = b.shape[0]
    of_columns = jnp.repeat(b_scales, GROUP, axis=0)[:n].T  # [k / 128, n]
    return scaled_product(a, a_scales, b, of_columns).astype(jnp.bfloat16)


def wgrad(a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array, addend: jax.Array | None = None) -> jax.Array:
    """See `pallas_kernels.gemm.wgrad`."""
    product = scaled_product(side_by_side(a), whole(a_scales, "left"), side_by_side(b), whole(b_scales, "right"))
    return product if addend is None else addend + product


def side_by_side(x: jax.Array) -> jax.Array:
    """Tiles of 128 tokens [k / 128, m, 128], with all tokens of a column in a row [m, k]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def scaled_product(a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array) -> jax.Array:
    """Float32 `a @ b.T` of a [m, k] and b [n, k], whose scales [k / 128, rows] belong to each row and 128 elements."""
    m, k = a.shape
    n = b.shape[0]
    total = jnp.zeros((m, n), jnp.float32)
    for step, start in enumerate(range(0, k, GROUP)):
        left, right = (x[:, start : start + GROUP].astype(exact()) for x in (a, b))
        partial = jnp.matmul(left, right.T, preferred_element_type=jnp.float32)
        total = total + partial * a_scales[step, :m, None] * b_scales[step, :n]
    return total


def exact() -> jnp.dtype:
    """What FP8 numbers are multiplied as: they are bfloat16 numbers too, and a CPU multiplies float32 faster."""
    return jnp.dtype(jnp.bfloat16 if platform() == "gpu" else jnp.float32)
