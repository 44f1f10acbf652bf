"""Copies of operands to shared memory: what the producer of a product does."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm.kernel import Kernel, Tile, live_tiles, locate, next_slot, output_of, tile_loop
from pallas_kernels.gemm.product import LINE
from pallas_kernels.parts import ROWS


def produce(kernel: Kernel, refs: Any, side: Literal["a", "b"]) -> None:
    """One warp: all copies of one operand, as slots become free."""
    stages = kernel.config.stages
    copy = _copy_a if side == "a" else _copy_b

    live = live_tiles(kernel, refs)

    @tile_loop(kernel, live, (jnp.int32(0), jnp.int32(0)))
    def loop(index: tuple[jax.Array, ...], carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile = locate(kernel, refs, live, index)

        def step(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            slot, filled = carry
            pl.when(filled >= stages)(lambda: plgpu.barrier_wait(refs["freed"].at[slot]))
            copy(kernel, refs, tile, tile.first_step + k, slot)
            if kernel.adds and side == "b":
                pl.when(k == lax.div(jnp.int32(tile.steps), 2))(lambda: _fetch_addend(kernel, refs, tile))
            return next_slot(slot, stages), filled + 1

        return lax.fori_loop(0, tile.steps, step, carry)

    # Every release is waited for: a peer in the cluster may still signal, and no barrier may die unobserved.
    slot, filled = loop
    oldest = lax.select(filled >= stages, slot, jnp.int32(0))

    def drain(_: jax.Array, slot: jax.Array) -> jax.Array:
        plgpu.barrier_wait(refs["freed"].at[slot])
        return next_slot(slot, stages)

    lax.fori_loop(0, lax.min(filled, jnp.int32(stages)), drain, oldest)


def _fetch_addend(kernel: Kernel, refs: Any, tile: Tile) -> None:
    """What a tile will be added to, into L2: copies of operands queue behind an addition that waits for memory."""
    rows, columns = pl.ds(tile.row, kernel.config.block_m), pl.ds(tile.column, kernel.config.block_n)
    plgpu.async_prefetch(output_of(kernel, refs, tile).at[rows, columns])


def _copy_a(kernel: Kernel, refs: Any, tile: Tile, k: jax.Array, slot: jax.Array) -> None:
    rows = kernel.config.block_m
    axes = "cluster" if kernel.config.cluster == "n" else None
    masked = kernel.product.groups == "masked"
    filled = refs["filled"].at[slot]
    a = refs["a"].at[tile.group] if masked else refs["a"]
    plgpu.copy_gmem_to_smem(a.at[kernel.window("a", tile.row, rows, k)], refs["a_slots"].at[slot], filled, collective_axes=axes)
    if kernel.product.scales == "block":
        scales = refs["a_scales"].at[tile.group] if masked else refs["a_scales"]
        plgpu.copy_gmem_to_smem(scales.at[k, pl.ds(tile.row, rows)], refs["a_scale_slots"].at[slot], filled)
    if kernel.product.scales == "row":
        _copy_parts(refs, "a", tile.row, rows, k, slot)


def _copy_b(kernel: Kernel, refs: Any, tile: Tile, k: jax.Array, slot: jax.Array) -> None:
    columns = kernel.config.block_n
    axes = "cluster" if kernel.config.cluster == "m" else None
    filled = refs["filled"].at[slot]
    b = _of_weights(kernel, refs, "b", tile)
    plgpu.copy_gmem_to_smem(b.at[kernel.window("b", tile.column, columns, k)], refs["b_slots"].at[slot], filled, collective_axes=axes)
    if kernel.product.scales == "block":
        line = _of_weights(kernel, refs, "b_scales", tile).at[kernel.block_of(tile.column), pl.ds(k & -LINE, LINE)]
        plgpu.copy_gmem_to_smem(line, refs["b_scale_slots"].at[slot, pl.ds(0, LINE)], filled)
    if kernel.product.scales == "row":
        _copy_parts(refs, "b", tile.column, columns, k, slot)


def _copy_parts(refs: Any, side: Literal["a", "b"], first: jax.Array, rows: int, k: jax.Array, slot: jax.Array) -> None:
    """Parts of the scales of some rows."""
    parts = refs[f"{side}_scales"].at[k, pl.ds(lax.div(first, ROWS), rows // ROWS)]
    plgpu.copy_gmem_to_smem(parts, refs[f"{side}_scale_slots"].at[slot], refs["filled"].at[slot])


def _of_weights(kernel: Kernel, refs: Any, name: Literal["b", "b_scales"], tile: Tile) -> Any:
    """What belongs to the tile's expert, if weights have one."""
    return refs[name].at[tile.group] if kernel.product.groups in ("rows", "masked") else refs[name]
