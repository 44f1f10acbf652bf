"""The grouped products as calls of the one kernel of `pallas_kernels.gemm`: only the product and the tile differ."""

import jax
import jax.numpy as jnp

from pallas_kernels.gemm import run
from pallas_kernels.gemm.product import GROUP, Product


def grouped_gemm(
    a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array, expert_of_tile: jax.Array, tiles_together: int
) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.grouped_gemm`."""
    return run(Product("block", "rows"), (a, a_scales, b, b_scales, _with_count(expert_of_tile, b)), b.shape[0], tiles_together * GROUP)


def grouped_wgrad(
    a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array, first_tile: jax.Array, addend: jax.Array | None
) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.grouped_wgrad`."""
    return run(Product("row", "contraction", "float32"), (a, a_scales, b, b_scales, first_tile), first_tile.size - 1, addend=addend)


def masked_gemm(a: jax.Array, a_scales: jax.Array, b: jax.Array, b_scales: jax.Array, rows: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.masked_gemm`."""
    return run(Product("block", "masked"), (a, a_scales, b, b_scales, rows), b.shape[0])


def grouped_gemm_bf16(a: jax.Array, b: jax.Array, expert_of_tile: jax.Array, tiles_together: int, contraction_first: bool) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.grouped_gemm_bf16`."""
    product = Product("none", "rows", weights_lie=contraction_first)
    return run(product, (a, None, b, None, _with_count(expert_of_tile, b)), b.shape[0], tiles_together * GROUP)


def masked_gemm_bf16(a: jax.Array, b: jax.Array, rows: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.masked_gemm_bf16`."""
    return run(Product("none", "masked", weights_lie=True), (a, None, b, None, rows), b.shape[0])


def grouped_wgrad_bf16(x: jax.Array, dy: jax.Array, first_tile: jax.Array) -> jax.Array:
    """See `pallas_kernels.grouped_gemm.grouped_wgrad_bf16`."""
    return run(Product("none", "contraction", "float32"), (x, None, dy, None, first_tile), first_tile.size - 1)


def _with_count(expert_of_tile: jax.Array, b: jax.Array) -> jax.Array:
    """The kernel finds at the end how many tiles have an owner; these come first."""
    owned = jnp.sum(expert_of_tile < b.shape[0], dtype=jnp.int32)
    return jnp.append(expert_of_tile, owned)
