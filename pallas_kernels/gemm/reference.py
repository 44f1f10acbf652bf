"""What the products compute, in plain JAX (V3 sec. 3.3.2, figure 7b): exact products, float32 sums within 128, then scales."""

import jax
import jax.numpy as jnp

from pallas_kernels.backend import platform
from pallas_kernels.parts import whole

GROUP = 128
Steps = jax.Array | list[jax.Array]


def gemm(a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array) -> jax.Array:
    """See `pallas_kernels.gemm.gemm`."""
    n = b.shape[0]
    of_columns = jnp.repeat(b_scales, GROUP, axis=0)[:n].T  # [k / 128, n]
    return scaled_product(_steps(a), a_scales, _steps(b), of_columns).astype(jnp.bfloat16)


def wgrad(a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array, addend: jax.Array | None = None) -> jax.Array:
    """See `pallas_kernels.gemm.wgrad`."""
    product = scaled_product(a, whole(a_scales, "left"), b, whole(b_scales, "right"))
    return product if addend is None else addend + product


def scaled_product(a: Steps, a_scales: jax.Array, b: Steps, b_scales: jax.Array) -> jax.Array:
    """The float32 sum of `a[i] @ b[i].T`, steps [m, 128] and [n, 128] along k, with scales [steps, rows] for each row of each step."""
    m, n = len(a[0]), len(b[0])
    total = jnp.zeros((m, n), jnp.float32)
    for step, pair in enumerate(zip(a, b, strict=True)):
        left, right = (x.astype(exact()) for x in pair)
        partial = jnp.matmul(left, right.T, preferred_element_type=jnp.float32)
        total = total + partial * a_scales[step, :m, None] * b_scales[step, :n]
    return total


def _steps(x: jax.Array) -> list[jax.Array]:
    return [x[:, start : start + GROUP] for start in range(0, x.shape[1], GROUP)]


def exact() -> jnp.dtype:
    """What FP8 numbers are multiplied as: they are bfloat16 numbers too, and a CPU multiplies float32 faster."""
    return jnp.dtype(jnp.bfloat16 if platform() == "gpu" else jnp.float32)
