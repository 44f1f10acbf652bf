"""Tiles of rows turned into tiles of columns on Hopper GPUs (Mosaic GPU), for Wgrad."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.memory import whole_rows
from pallas_kernels.quantize.arithmetic import LONG, WIDE, are_ordinary, keys_of, largest_of, quotient
from pallas_kernels.quantize.instructions import fence
from pallas_kernels.quantize.pieces import store_columns
from pallas_kernels.quantize.reference import BLOCK, E4M3, tile_scale
from pallas_kernels.quantize.tiles import (
    EACH_WARP,
    LINE,
    at_block,
    check_width,
    in_one_warp,
    launch,
    load_lines,
    once,
    padded,
    start_all,
    tile_of,
)

Array = jax.Array


@once
def retile(values: Array, scales: Array, power_of_two: bool, sm_count: int, interpret: Any = None) -> tuple[Array, Array]:
    """See `pallas_kernels.quantize.retile`."""
    values = whole_rows(values)
    m, k = values.shape
    check_width("values", k)
    row_blocks, blocks = padded(m) // BLOCK, pl.cdiv(k, BLOCK)
    stages = 4 // values.dtype.itemsize  # tiles of a pair of warpgroups in shared memory: 128 KiB of them
    values_t, scales_t = launch(
        functools.partial(_retile_body, power_of_two=power_of_two, stages=stages),
        "retile",
        grid=(min(sm_count, pl.cdiv(row_blocks * blocks, 2)),),
        grid_names=("sm",),
        out=dict(values_t=((k, padded(m)), E4M3), scales_t=((row_blocks, padded(k)), jnp.float32)),
        scratch=dict(
            values_s=tile_of(values.dtype, 4, stages, 64, BLOCK, width=k),
            scales_s=plgpu.SMEM((4, stages, BLOCK), jnp.float32),
            values_t_s=tile_of(E4M3, 2, BLOCK, BLOCK),
            loaded=plgpu.Barrier(num_arrivals=2, num_barriers=4 * stages),
            largest_s=plgpu.SMEM((2, 2, 2, BLOCK), jnp.uint32),
            largest_known=plgpu.Barrier(num_arrivals=2, num_barriers=2),
            made=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        ),
        interpret=interpret,
        num_threads=4,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(values, scales)
    return values_t, scales_t[:, :k]


def _retile_body(values, scales, values_t, scales_t, *, values_t_s, largest_s, largest_known, made, loaded, power_of_two, stages, **s):
    """Two pairs of warpgroups with tiles of their own; each warpgroup has 64 rows. As in `hopper_swiglu._backward_body` otherwise.

    Values are loaded as columns byte by byte: memory leaves time for that, and none for a turn in float32.
    """
    warpgroup, blocks = lax.axis_index("warpgroup"), pl.cdiv(values.shape[1], BLOCK)
    pair, half = lax.div(warpgroup, 2), lax.rem(warpgroup, 2)
    first, step, tiles = 2 * lax.axis_index("sm") + pair, 2 * lax.axis_size("sm"), scales_t.shape[0] * blocks
    own = {name: ref.at[warpgroup] for name, ref in s.items()}
    values_t_s, largest_s, largest_known, made = (ref.at[pair] for ref in (values_t_s, largest_s, largest_known, made))
    by_one_warp = functools.partial(in_one_warp, warpgroup)

    def place(tile):
        i, j = lax.div(tile, blocks), lax.rem(tile, blocks)
        return i, j, pl.ds(i * BLOCK + half * 64, 64)

    def load(n):
        tile, slot = first + n * step, lax.rem(n, stages)

        @pl.when(tile < tiles)
        def _():
            i, j, rows = place(tile)
            full = loaded.at[warpgroup * stages + slot]
            plgpu.copy_gmem_to_smem(values.at[rows, at_block(j)], own["values_s"].at[slot], full)
            plgpu.copy_gmem_to_smem(scales.at[j, at_block(i)], own["scales_s"].at[slot], full)

    def store(i, j):
        start_all([(values_t_s, values_t.at[at_block(j), at_block(i)])])
        plgpu.commit_smem_to_gmem_group()

    def run(n, _):
        tile, largest, slot = first + n * step, largest_s.at[lax.rem(n, 2)], lax.rem(n, stages)
        plgpu.barrier_wait(loaded.at[warpgroup * stages + slot])
        x = load_lines(own["values_s"].at[slot].T)
        by_row = plgpu.load(own["scales_s"].at[slot, pl.ds(half * 64, 64)], layout=LINE(4).reduce(0))
        x = x * lax.broadcast_in_dim(by_row, x.shape, (1,))
        ordinary = are_ordinary(plgpu.load(own["scales_s"].at[slot], layout=EACH_WARP))
        largest[half] = keys_of(x, LINE(4))
        by_one_warp(stored)
        plgpu.barrier_arrive(largest_known)
        plgpu.barrier_wait(largest_known)
        keys = [plgpu.load(largest.at[h], layout=LINE(4).reduce(1)) for h in (0, 1)]
        scale = tile_scale(largest_of(jnp.maximum(*keys)), power_of_two)
        i, j, _ = place(tile)

        @pl.when(half == 0)
        def _known() -> None:
            scales_t[i, at_block(j)] = scale

        def divided(kind):
            return quotient(x, scale, (0,), power_of_two, kind).astype(E4M3)

        store_columns(values_t_s, lax.cond(ordinary, lambda: divided(WIDE), lambda: divided(LONG)), half)
        fence()
        plgpu.barrier_arrive(made)

        def copies():
            plgpu.barrier_wait(made)
            pl.when(half == 0)(lambda: store(i, j))
            load(n + stages)

        by_one_warp(copies)

    stored = functools.partial(plgpu.wait_smem_to_gmem, 0, wait_read_only=True)
    for n in range(stages):
        by_one_warp(functools.partial(load, n))
    lax.fori_loop(0, lax.div(tiles - first + step - 1, step), run, None)
    by_one_warp(stored)
