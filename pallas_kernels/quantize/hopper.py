"""The kernels for Hopper GPUs (Mosaic GPU): each tile is loaded once, and every output of it is stored by TMA.

A block of threads has one 128x128 tile, or two of 32x128 (`quantize_rows`, `quantize_and_keep`), and ends; several blocks share a
multiprocessor, so that one loads while another computes. A block of `swiglu_backward` or `retile` fills a multiprocessor, and loops
over tiles, which a counter hands out.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.memory import whole_rows
from pallas_kernels.parts import Operand
from pallas_kernels.quantize.arithmetic import LONG, SHORT, keys_of, kind_of, largest_of, quantize_lines, quotient, to_e5m6
from pallas_kernels.quantize.hopper_retile import gather_and_retile as gather_and_retile
from pallas_kernels.quantize.hopper_retile import retile as retile
from pallas_kernels.quantize.hopper_swiglu import swiglu_backward as swiglu_backward
from pallas_kernels.quantize.hopper_swiglu import swiglu_quantize as swiglu_quantize
from pallas_kernels.quantize.instructions import fence
from pallas_kernels.quantize.pieces import store_columns
from pallas_kernels.quantize.reference import BLOCK, E4M3, E5M6_MAX, tile_scale
from pallas_kernels.quantize.tiles import (
    LINE,
    QUARTER,
    QUARTERS,
    ROWS,
    as_operand,
    at_block,
    at_quarter,
    check_width,
    in_one_warp,
    in_runs,
    launch,
    load_all,
    load_lines,
    load_rows,
    of_columns,
    once,
    padded,
    scale_of_columns,
    start_all,
    store_all,
    tile_of,
    wait_for_stores,
    whole_columns,
)

Array = jax.Array

SIDE_BY_SIDE = 2  # tiles of 32x128 of a block, both in flight at once
HALVES = 2  # warpgroups that share a tile of `quantize_both`
HALF = BLOCK // HALVES  # rows of each

# Sizes of training: kernel, shape, dtype. Of `swiglu_*` the shape is that of hidden.
PRODUCTION = [
    ("quantize_rows", (32768, 7168), "bfloat16"),
    ("quantize_rows", (4096, 1536), "bfloat16"),
    ("quantize_rows", (4096, 7168), "float32"),
    ("quantize_and_keep", (32768, 4096), "bfloat16"),
    ("quantize_and_keep", (4096, 16384), "bfloat16"),
    ("quantize_both", (32768, 7168), "bfloat16"),
    ("quantize_both", (4096, 2112), "bfloat16"),
    ("quantize_both", (4096, 7168), "float32"),
    ("quantize_blocks", (7168, 24576), "float32"),
    ("quantize_blocks", (32, 7168, 4096), "float32"),
    ("quantize_blocks", (32, 2048, 7168), "bfloat16"),
    ("swiglu_quantize", (32768, 4096), "bfloat16"),
    ("swiglu_backward", (32768, 4096), "bfloat16"),
    ("retile", (32768, 7168), "float8_e4m3fn"),
    ("retile", (4096, 16384), "float16"),
    ("gather_and_retile", (32768, 2048), "float8_e4m3fn"),
]


@once
def quantize_rows(x: Array, power_of_two: bool, interpret: Any = None) -> tuple[Array, Array]:
    """See `pallas_kernels.quantize.quantize_rows`."""
    rows, x = x.shape[0], whole_rows(x)
    m, k = x.shape
    check_width("x", k)
    blocks = pl.cdiv(k, BLOCK)
    tiles = math.gcd(blocks, SIDE_BY_SIDE)
    values, scales = launch(
        functools.partial(_rows_body, power_of_two=power_of_two),
        "quantize_rows",
        grid=(padded(m) // QUARTER, blocks // tiles),
        out=dict(values=((m, k), E4M3), scales=((blocks, padded(m)), jnp.float32)),
        scratch=dict(
            x_s=tile_of(x.dtype, tiles, QUARTER, BLOCK, width=k),
            values_s=tile_of(E4M3, tiles, QUARTER, BLOCK, width=k),
            scales_s=plgpu.SMEM((tiles, QUARTER), jnp.float32),
            loaded=plgpu.Barrier(num_barriers=tiles),
        ),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x)
    return values[:rows], scales


def _rows_body(x, values, scales, *, x_s, values_s, scales_s, loaded, power_of_two):
    copies = []
    for j, rows, column in _side_by_side(x, x_s, loaded):
        values_s[j], scales_s[j] = quantize_lines(*load_rows(x_s.at[j]), power_of_two, kind_of(x))
        copies += [(values_s.at[j], values.at[rows, at_block(column)]), (scales_s.at[j], scales.at[column, rows])]
    store_all(copies)


def _side_by_side(x, x_s, loaded):
    """Loads all tiles of a block. As each is there: its number, its rows, and which it is along them."""
    tiles = x_s.shape[0]
    rows, first = at_quarter(lax.axis_index("row")), lax.axis_index("column") * tiles
    for j in range(tiles):
        plgpu.copy_gmem_to_smem(x.at[rows, at_block(first + j)], x_s.at[j], loaded.at[j])
    for j in range(tiles):
        plgpu.barrier_wait(loaded.at[j])
        yield j, rows, first + j


@once
def quantize_and_keep(x: Array, interpret: Any = None) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.quantize_and_keep`."""
    rows, x = x.shape[0], whole_rows(x)
    m, k = x.shape
    check_width("x", k)
    blocks = pl.cdiv(k, BLOCK)
    tiles = math.gcd(blocks, SIDE_BY_SIDE)
    of_lines = ((blocks, padded(m)), jnp.float32)
    values, scales, kept, kept_scales = launch(
        _keep_body,
        "quantize_and_keep",
        grid=(padded(m) // QUARTER, blocks // tiles),
        out=dict(values=((m, k), E4M3), scales=of_lines, kept=((m, k), jnp.float16), kept_scales=of_lines),
        scratch=dict(
            x_s=tile_of(x.dtype, tiles, QUARTER, BLOCK, width=k),
            values_s=tile_of(E4M3, tiles, QUARTER, BLOCK, width=k),
            kept_s=tile_of(jnp.float16, tiles, QUARTER, BLOCK, width=k),
            scales_s=plgpu.SMEM((2, tiles, QUARTER), jnp.float32),
            loaded=plgpu.Barrier(num_barriers=tiles),
        ),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x)
    return values[:rows], scales, kept[:rows], kept_scales


def _keep_body(x, values, scales, kept, kept_scales, *, x_s, values_s, kept_s, scales_s, loaded):
    copies = []
    for j, rows, column in _side_by_side(x, x_s, loaded):
        lines, layout = load_rows(x_s.at[j])
        largest = largest_of(keys_of(lines, layout))
        scale, kept_scale = tile_scale(largest, False), tile_scale(largest, True, E5M6_MAX)
        values_s[j] = quotient(lines, scale, (0,), False, SHORT, layout).astype(E4M3)
        kept_s[j] = to_e5m6(quotient(lines, kept_scale, (0,), True, SHORT, layout))
        scales_s[0, j], scales_s[1, j] = scale, kept_scale
        here = rows, at_block(column)
        copies += [(values_s.at[j], values.at[here]), (kept_s.at[j], kept.at[here])]
        copies += [(scales_s.at[side, j], out.at[column, rows]) for side, out in enumerate((scales, kept_scales))]
    store_all(copies)


@once
def quantize_both(x: Array, power_of_two: bool, operand: Operand | None = None, interpret: Any = None) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.quantize_both`."""
    rows, x = x.shape[0], whole_rows(x)
    m, k = x.shape
    check_width("x", k)
    blocks, mp = pl.cdiv(k, BLOCK), padded(m)
    values, scales, values_t, scales_t = launch(
        functools.partial(_both_body, power_of_two=power_of_two, operand=operand),
        "quantize_both",
        grid=(mp // BLOCK, blocks),
        out=dict(
            values=((m, k), E4M3),
            scales=((blocks, mp), jnp.float32),
            values_t=((mp // BLOCK, k, BLOCK), E4M3),
            scales_t=of_columns(k, mp // BLOCK, operand),
        ),
        scratch=dict(
            x_s=tile_of(x.dtype, BLOCK, BLOCK, width=k),
            values_s=tile_of(E4M3, BLOCK, BLOCK, width=k),
            scales_s=plgpu.SMEM((BLOCK,), jnp.float32),
            values_t_s=tile_of(E4M3, BLOCK, BLOCK),
            largest_s=plgpu.SMEM((QUARTERS, BLOCK), jnp.uint32),
            loaded=plgpu.Barrier(num_barriers=HALVES),
            largest_known=plgpu.Barrier(num_arrivals=HALVES),
            made=plgpu.Barrier(num_arrivals=HALVES),
        ),
        interpret=interpret,
        num_threads=HALVES,
        thread_name="half",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(x)
    return values[:rows], scales, values_t, whole_columns(scales_t, k)


def _both_body(x, values, scales, values_t, scales_t, *, loaded, power_of_two, operand, **s):
    """Two warpgroups with 64 rows of a tile each, 32 at a time, which share the largest of its columns and its turned tile.

    Rows are loaded once more after the other half has said what is largest in its own: fewer registers, so more tiles at once.
    """
    i, j, half = lax.axis_index("row"), lax.axis_index("column"), lax.axis_index("half")
    own, there = pl.ds(half * HALF, HALF), (pl.ds(i * BLOCK + half * HALF, HALF), at_block(j))
    quarters = [HALF // QUARTER * half + n for n in range(HALF // QUARTER)]
    in_one_warp(half, lambda: plgpu.copy_gmem_to_smem(x.at[there], s["x_s"].at[own], loaded.at[half]))
    plgpu.barrier_wait(loaded.at[half])
    for q in quarters:
        s["largest_s"][q] = keys_of(load_lines(s["x_s"].at[at_quarter(q)].T), LINE(4))
    plgpu.barrier_arrive(s["largest_known"])
    for q in quarters:
        lines = load_rows(s["x_s"].at[at_quarter(q)])
        s["values_s"][at_quarter(q)], s["scales_s"][at_quarter(q)] = quantize_lines(*lines, power_of_two, kind_of(x))
    plgpu.barrier_wait(s["largest_known"])
    scale = scale_of_columns(s["largest_s"], power_of_two)
    for q in quarters:
        columns = quotient(load_lines(s["x_s"].at[at_quarter(q)].T), scale, (0,), power_of_two, kind_of(x), LINE(4))
        store_columns(s["values_t_s"], columns.astype(E4M3), q)

    @pl.when(half == 0)
    def _():
        scales_t[i, at_block(j)] = as_operand(scale, operand)

    fence()
    plgpu.barrier_arrive(s["made"])

    def store():
        plgpu.barrier_wait(s["made"])
        start_all([(s["values_s"].at[own], values.at[there]), (s["scales_s"].at[own], scales.at[j, there[0]])])
        pl.when(half == 0)(lambda: start_all([(s["values_t_s"], values_t.at[i, at_block(j)])]))
        plgpu.commit_smem_to_gmem_group()
        wait_for_stores()

    in_one_warp(half, store)


@once
def quantize_blocks(w: Array, interpret: Any = None) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.quantize_blocks`."""
    if w.ndim == 2:
        return jax.tree.map(lambda out: out[0], quantize_blocks(w[None], interpret))
    experts, k, n = w.shape
    check_width("w", n)
    check_width("w, transposed", k)
    kb, nb = pl.cdiv(k, BLOCK), pl.cdiv(n, BLOCK)
    return launch(
        _blocks_body,
        "quantize_blocks",
        grid=(experts * kb, nb),
        out=dict(
            values=((experts, k, n), E4M3),
            values_t=((experts, n, k), E4M3),
            scales=((experts, kb, nb), jnp.float32),
            scales_t=((experts, nb, kb), jnp.float32),
        ),
        scratch=dict(
            w_s=tile_of(w.dtype, BLOCK, BLOCK, width=n),
            values_s=tile_of(E4M3, BLOCK, BLOCK, width=n),
            values_t_s=tile_of(E4M3, BLOCK, BLOCK, width=k),
            loaded=plgpu.Barrier(),
        ),
        interpret=interpret,
    )(w)


def _blocks_body(w, values, values_t, scales, scales_t, *, w_s, values_s, values_t_s, loaded):
    kb = scales.shape[1]
    expert, i, j = lax.div(lax.axis_index("row"), kb), lax.rem(lax.axis_index("row"), kb), lax.axis_index("column")
    load_all([(w.at[expert, at_block(i), at_block(j)], w_s)], loaded)
    rows = plgpu.load(w_s, layout=ROWS).astype(jnp.float32)
    scale = tile_scale(jnp.max(largest_of(keys_of(rows, ROWS))), False)  # Mosaic takes one axis at a time
    scales[expert, i, j] = scale
    scales_t[expert, j, i] = scale
    values_s[...] = quotient(rows, scale, (), False, LONG, ROWS).astype(E4M3)
    columns = load_lines(w_s.T)
    values_t_s[...] = in_runs(quotient(columns, scale, (), False, LONG, LINE(4)).astype(E4M3))
    store_all([(values_s, values.at[expert, at_block(i), at_block(j)]), (values_t_s, values_t.at[expert, at_block(j), at_block(i)])])
