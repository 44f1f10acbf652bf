"""Products of quantized tensors, group by group: what a kernel must compute (V3 sec. 3.3.2, figure 7).

Within a group of 128 along the contraction the values are multiplied and summed as they are; the sum of the group is
then multiplied by both scales and added in float32. `simulated_dot` shows what tensor cores with a short running sum
make of the inner part, and why the sum must leave them every N_C elements.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.precision.formats import exponent, power_of_two
from dsv3_jax.precision.quantize import BLOCK, Quantized, scales_along
from pallas_kernels.backend import platform

_MMA_K = 32  # elements along k that one FP8 instruction of Hopper adds at once


def quantized_matmul(a: Quantized, b: Quantized) -> Float[Array, "*b m n"]:
    """`a @ b` in float32, for a [..., m, k] and b [..., k, n].

    Along k a tile of either must hold whole groups of 128, or all of k. Raises ValueError otherwise.
    """
    k = a.values.shape[-1]
    for name, along in (("a", a.tile[1]), ("b", b.tile[0])):
        if along and along % BLOCK and along < k:
            raise ValueError(f"tiles of {name} are {along} wide along the contraction of {k}; they must be a multiple of {BLOCK}")
    total = jnp.zeros((), jnp.float32)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        left = jax.lax.slice_in_dim(a.values, start, stop, axis=a.values.ndim - 1)
        right = jax.lax.slice_in_dim(b.values, start, stop, axis=b.values.ndim - 2)
        total = total + _dot(left, right) * scales_along(a, start, -1) * scales_along(b, start, -2)
    shape = (*a.values.shape[:-1], b.values.shape[-1])
    return jnp.broadcast_to(total, shape)  # k may be 0


def _dot(a: Array, b: Array) -> Array:
    """Sum in float32 of exact products: FP8 numbers are bfloat16 numbers, which GPUs multiply fast."""
    kind = jnp.float32 if platform() == "cpu" else jnp.bfloat16
    return jnp.matmul(a.astype(kind), b.astype(kind), preferred_element_type=jnp.float32)


def simulated_dot(a: Float[Array, "m k"], b: Float[Array, "k n"], bits: int = 14, promote_every: int | None = BLOCK) -> Float[Array, "m n"]:
    """`a @ b` with a running sum of `bits` bits, added to a float32 sum every `promote_every` elements (None: only at the end).

    Models one instruction as: 32 products and the running sum are shifted to the largest exponent among them, bits
    below `bits` are cut off, and what is left is added (V3 sec. 3.3.2 and 3.5.2: about 14 bits on Hopper).
    """
    m, k = a.shape
    step = min(promote_every or k, k)
    if step % _MMA_K and step < k:
        raise ValueError(f"promote_every = {promote_every}: must be a multiple of {_MMA_K}, what one instruction adds")
    padding = -k % _MMA_K
    chunks = (
        jnp.pad(a.T, ((0, padding), (0, 0))).reshape(-1, _MMA_K, m),
        jnp.pad(b, ((0, padding), (0, 0))).reshape(-1, _MMA_K, b.shape[1]),
    )

    def instruction(carry: tuple[Array, Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        promoted, running, done = carry
        products = chunk[0][:, :, None].astype(jnp.float32) * chunk[1][:, None, :].astype(jnp.float32)
        terms = jnp.concatenate([products, running[None]])
        quantum = power_of_two(jnp.maximum(exponent(jnp.abs(terms).max(0)) - (bits - 1), -126))
        running = (jnp.trunc(terms / quantum) * quantum).sum(0)
        done = done + _MMA_K
        promote = done % step == 0
        return (jnp.where(promote, promoted + running, promoted), jnp.where(promote, 0.0, running), done), None

    zero = jnp.zeros((m, b.shape[1]), jnp.float32)
    (promoted, running, _), _ = jax.lax.scan(instruction, (zero, zero, jnp.int32(0)), chunks)
    return promoted + running
