"""Products of rows that are sorted by expert, each expert with its own weights: the routed experts of a MoE layer.

Rows of an expert start at a multiple of 128 (`TILE`); the rows that pad its run to there are zero. Which expert a tile
of 128 rows belongs to is known only on the device: `expert_of_tile`, sorted, and the number of experts for tiles that
none owns, whose output is zero. Experts may own nothing. FP8 operands are as in `pallas_kernels.gemm`; the bfloat16
products serve the BF16 policy, since `lax.ragged_dot` unrolls to dense products on a GPU. `impl` is as there.
"""

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels.backend import use_pallas
from pallas_kernels.gemm import check_operands, check_turned
from pallas_kernels.grouped_gemm import hopper, reference

TILE = reference.TILE


def grouped_gemm(
    a: Float[Array, "m k"],
    a_scales: Float32[Array, "kb m"],
    b: Float[Array, "e n k"],
    b_scales: Float32[Array, "e nb kb"],
    expert_of_tile: Int32[Array, " tiles"],
    tiles_together: int = 1,
    impl: str = "auto",
) -> BFloat16[Array, "m n"]:
    """Fprop and Dgrad: each row times its expert's b, transposed. `tiles_together`: runs are multiples of so many tiles."""
    check_operands(a, b)
    _check_tiles(a, expert_of_tile)
    if not use_pallas(impl):
        return reference.grouped_gemm(a, a_scales, b, b_scales, expert_of_tile)
    return hopper.grouped_gemm(a, a_scales, b, b_scales, expert_of_tile, tiles_together)


def grouped_wgrad(
    a: Float[Array, "tb m 128"],
    a_scales: Float32[Array, "tb m"] | BFloat16[Array, "tb _ 64"],
    b: Float[Array, "tb n 128"],
    b_scales: Float32[Array, "tb n"] | BFloat16[Array, "tb _ 64"],
    first_tile: Int32[Array, " e_plus_1"],
    addend: Float32[Array, "e m n"] | None = None,
    impl: str = "auto",
) -> Float32[Array, "e m n"]:
    """Wgrad: for each expert the sum over its tiles (of tokens) from `first_tile[e]` to `first_tile[e + 1]`, plus `addend`.

    Scales may come as parts, which quantizers make for an `operand`.
    """
    check_turned(a, b)
    if not use_pallas(impl):
        return reference.grouped_wgrad(a, a_scales, b, b_scales, first_tile, addend)
    return hopper.grouped_wgrad(a, a_scales, b, b_scales, first_tile, addend)


def masked_gemm(
    a: Float[Array, "e m k"],
    a_scales: Float32[Array, "e kb mp"],
    b: Float[Array, "e n k"],
    b_scales: Float32[Array, "e nb kb"],
    rows: Int32[Array, " e"],
    impl: str = "auto",
) -> BFloat16[Array, "e m n"]:
    """Decoding: every expert has room for m rows and uses the first `rows[e]`; what lies beyond them is unspecified."""
    check_operands(a, b)
    if not use_pallas(impl):
        return reference.masked_gemm(a, a_scales, b, b_scales, rows)
    return hopper.masked_gemm(a, a_scales, b, b_scales, rows)


def grouped_gemm_bf16(
    a: BFloat16[Array, "m k"],
    b: BFloat16[Array, "e n_or_k k_or_n"],
    expert_of_tile: Int32[Array, " tiles"],
    tiles_together: int = 1,
    impl: str = "auto",
    contraction_first: bool = False,
) -> BFloat16[Array, "m n"]:
    """`grouped_gemm` of bfloat16 numbers, summed in float32. `contraction_first`: b is [e, k, n], as weights are stored."""
    _check_tiles(a, expert_of_tile)
    if not use_pallas(impl):
        return reference.grouped_gemm_bf16(a, b, expert_of_tile, contraction_first)
    if contraction_first:
        _check_lying(b)
    return hopper.grouped_gemm_bf16(a, b, expert_of_tile, tiles_together, contraction_first)


def masked_gemm_bf16(
    a: BFloat16[Array, "e m k"], b: BFloat16[Array, "e k n"], rows: Int32[Array, " e"], impl: str = "auto"
) -> BFloat16[Array, "e m n"]:
    """`masked_gemm` of bfloat16 numbers, by weights as they are stored."""
    if not use_pallas(impl):
        return reference.masked_gemm_bf16(a, b, rows)
    _check_lying(b)
    return hopper.masked_gemm_bf16(a, b, rows)


def grouped_wgrad_bf16(
    x: BFloat16[Array, "t m"], dy: BFloat16[Array, "t n"], first_tile: Int32[Array, " e_plus_1"], impl: str = "auto"
) -> Float32[Array, "e m n"]:
    """`grouped_wgrad` of bfloat16 numbers, as they lie: `x.T @ dy` of each expert's tokens, in float32."""
    if not use_pallas(impl):
        return reference.grouped_wgrad_bf16(x, dy, first_tile)
    if x.shape[1] % 64 or dy.shape[1] % 64:
        raise NotImplementedError(
            f"x and dy: {x.shape[1]} and {dy.shape[1]} columns: the Hopper kernel takes multiples of 64; use impl='reference'"
        )
    return hopper.grouped_wgrad_bf16(x, dy, first_tile)


def first_tiles(expert_of_tile: Int32[Array, " tiles"], n_experts: int) -> Int32[Array, " e_plus_1"]:
    """Where each expert's tiles start, and where the last one's end."""
    return jnp.searchsorted(expert_of_tile, jnp.arange(n_experts + 1), method="compare_all").astype(jnp.int32)


def _check_lying(b: Array) -> None:
    if b.shape[2] % 64:
        raise NotImplementedError(f"b: {b.shape[2]} columns: the Hopper kernel takes multiples of 64; use impl='reference'")


def _check_tiles(a: Array, expert_of_tile: Array) -> None:
    if a.shape[0] != expert_of_tile.size * TILE:
        raise ValueError(f"expert_of_tile: {expert_of_tile.size} tiles for {a.shape[0]} rows; there has to be one for every {TILE} rows")
