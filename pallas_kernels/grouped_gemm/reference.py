"""What the grouped products compute, in plain JAX: the product of every tile with the weights of its expert."""

import jax
import jax.numpy as jnp

from pallas_kernels.gemm.reference import exact, gemm, scaled_product
from pallas_kernels.parts import whole

TILE = 128


def grouped_gemm(a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array, expert_of_tile: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.grouped_gemm`."""

    def tile(args: tuple[jax.Array, ...]) -> jax.Array:
        values, scales, expert = args
        return jnp.where(expert < b.shape[0], gemm(values, scales, b[expert], b_scales[expert]), 0)

    rows_of = a.reshape(-1, TILE, a.shape[1])
    scales_of = a_scales.reshape(a_scales.shape[0], -1, TILE).swapaxes(0, 1)
    return jax.lax.map(tile, (rows_of, scales_of, expert_of_tile)).reshape(a.shape[0], b.shape[1])


def grouped_wgrad(
    a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array, first_tile: jax.Array, addend: jax.Array | None = None
) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.grouped_wgrad`."""
    tiles, a_scales, b_scales = a_scales.shape[0], whole(a_scales, "left"), whole(b_scales, "right")

    def expert(total: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
        mine = (jnp.arange(tiles) >= first) & (jnp.arange(tiles) < end)
        # A tile of another expert may hold anything: it must not come in, not even times zero.
        left, right = (jnp.where(mine[:, None, None], x, 0).astype(x.dtype) for x in (a, b))
        of_left, of_right = (jnp.where(mine[:, None], x, 1) for x in (a_scales, b_scales))
        return total + scaled_product(left, of_left, right, of_right)

    shape = (first_tile.size - 1, a.shape[1], b.shape[1])
    totals = jnp.zeros(shape, jnp.float32) if addend is None else addend
    return jax.lax.map(lambda args: expert(*args), (totals, first_tile[:-1], first_tile[1:]))


def masked_gemm(a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array, rows: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.masked_gemm`."""
    return _masked(jax.lax.map(lambda args: gemm(*args), (a, a_scales, b, b_scales)), rows)


def _masked(product: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(product.shape[1])[None, :, None] < rows[:, None, None], product, 0)


def grouped_gemm_bf16(a: jax.Array, b: jax.Array, expert_of_tile: jax.Array, contraction_first: bool) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.grouped_gemm_bf16`."""
    weights = b if contraction_first else b.mT

    def tile(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        values, expert = args
        product = jnp.matmul(values.astype(exact()), weights[expert].astype(exact()), preferred_element_type=jnp.float32)
        return jnp.where(expert < b.shape[0], product, 0).astype(a.dtype)

    return jax.lax.map(tile, (a.reshape(-1, TILE, a.shape[1]), expert_of_tile)).reshape(a.shape[0], weights.shape[2])


def masked_gemm_bf16(a: jax.Array, b: jax.Array, rows: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.masked_gemm_bf16`."""
    product = jnp.matmul(a.astype(exact()), b.astype(exact()), preferred_element_type=jnp.float32)
    return _masked(product.astype(a.dtype), rows)


def grouped_wgrad_bf16(x: jax.Array, dy: jax.Array, first_tile: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.grouped_wgrad_bf16`."""
    token = jnp.arange(x.shape[0])[:, None]

    def expert(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        mine = (token >= bounds[0] * TILE) & (token < bounds[1] * TILE)
        left, right = (jnp.where(mine, operand, 0).astype(exact()) for operand in (x, dy))
        return jnp.matmul(left.T, right, preferred_element_type=jnp.float32)

    return jax.lax.map(expert, (first_tile[:-1], first_tile[1:]))
