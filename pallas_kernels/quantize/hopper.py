"""The kernels for Hopper GPUs (Mosaic GPU): each tile is loaded once by TMA, and every output of it is stored by TMA.

A block of threads has one 128x128 tile (`quantize_rows`: some of 64x128, `quantize_and_keep` of 32x128) and ends; several blocks
share a multiprocessor, so that one loads while another computes. A block of `swiglu_backward` or `retile` fills a multiprocessor,
and loops over tiles.
Layouts of registers:

    ROWS    four lanes share a row, each has runs of four elements: the largest of a row needs two shuffles, and E4M3 is
            stored as whole words
    FEW_ROWS  the same for 32 rows, in runs of eight: a thread has elements of one row only, and few addresses
    LINE    a thread has a line of its own: loads through a transposed view of the tile give it a column, so that the
            largest of a column needs no other thread, and the transposed tile is stored 16 bytes at a time; in
            `swiglu_backward` also a piece of a row (`pieces`)

They load and store without bank conflicts, which the lowering checks. TMA fills what lies outside of an array with zeros
and does not store there, so edges need no code. That is true of tiles; lines (scales) are copied whole, so arrays of
lines are padded to whole tiles.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.memory import tiled, whole_rows
from pallas_kernels.quantize.instructions import fence, larger, meet, reciprocal, widened
from pallas_kernels.quantize.pieces import load_of_rows, load_pieces, of_rows, store_columns, store_pieces, turn
from pallas_kernels.quantize.reference import BLOCK, E4M3, E5M6_BITS, E5M6_MAX, E5M6_MIN_EXPONENT, SMALLEST_NORMAL, tile_scale

Array = jax.Array

QUARTERS, QUARTER = 4, BLOCK // 4  # warpgroups of `swiglu_backward`, and the rows that each has of a tile

ROWS = plgpu.Layout.WGMMA_8BIT
LINE = plgpu.Layout.TCGEN05_TMEM_NATIVE
# Neighbouring lanes have rows, not columns, so that runs of one, two and four bytes an element all meet every bank.
FEW_ROWS = plgpu.Layout.TILED(Tiling(((32, 32), (8, 32), (8,))), warp_dims=(-5,), lane_dims=(-2, -3), vector_dim=-1)
# 128 numbers, of which every warp has all: the largest needs no other warp.
EACH_WARP = plgpu.Layout.TILED(Tiling(((BLOCK,), (4,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1)


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How many 64x128 tiles of 16 bits a block of `quantize_rows` takes along a row: all are in flight at once."""

    tiles: int = 4


DEFAULT = TuningConfig()


def _once(f: Callable) -> Callable:
    """Traces f once for each shape, whoever calls: kernels that differ in source locations alone would all be compiled."""
    static = {"power_of_two", "act_power_of_two", "config", "sm_count", "interpret"}
    return jax.jit(f, static_argnames=tuple(name for name in inspect.signature(f).parameters if name in static))


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
]


@_once
def quantize_rows(x: Array, power_of_two: bool, config: TuningConfig = DEFAULT, interpret: Any = None) -> tuple[Array, Array]:
    """See `pallas_kernels.quantize.quantize_rows`."""
    rows, x = x.shape[0], whole_rows(x)
    m, k = x.shape
    _check_width("x", k)
    blocks = pl.cdiv(k, BLOCK)
    # As many as divide the row, and no more bytes in flight where elements are wider.
    tiles = math.gcd(blocks, max(config.tiles * 2 // x.dtype.itemsize, 1))
    values, scales = _kernel(
        functools.partial(_rows_body, tiles=tiles, power_of_two=power_of_two),
        "quantize_rows",
        grid=(_padded(m) // 64, blocks // tiles),
        out=dict(values=((m, k), E4M3), scales=((blocks, _padded(m)), jnp.float32)),
        scratch=dict(
            x_s=_tile(x.dtype, tiles, 64, BLOCK, width=k),
            values_s=_tile(E4M3, tiles, 64, BLOCK, width=k),
            scales_s=plgpu.SMEM((tiles, 64), jnp.float32),
            loaded=plgpu.Barrier(num_barriers=tiles),
        ),
        interpret=interpret,
    )(x)
    return values[:rows], scales


def _rows_body(x, values, scales, *, x_s, values_s, scales_s, loaded, tiles, power_of_two):
    rows, first = pl.ds(lax.axis_index("row") * 64, 64), lax.axis_index("column") * tiles
    for j in range(tiles):
        plgpu.copy_gmem_to_smem(x.at[rows, _block(first + j)], x_s.at[j], loaded.at[j])
    for j in range(tiles):
        plgpu.barrier_wait(loaded.at[j])
        values_s[j], scales_s[j] = _quantize_lines(plgpu.load(x_s.at[j], layout=ROWS).astype(jnp.float32), ROWS, power_of_two, _kind(x))
    _store(
        [(values_s.at[j], values.at[rows, _block(first + j)]) for j in range(tiles)]
        + [(scales_s.at[j], scales.at[first + j, rows]) for j in range(tiles)]
    )


@_once
def quantize_and_keep(x: Array, interpret: Any = None) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.quantize_and_keep`."""
    rows, x = x.shape[0], whole_rows(x)
    m, k = x.shape
    _check_width("x", k)
    blocks = pl.cdiv(k, BLOCK)
    tiles = math.gcd(blocks, 2)
    of_lines = ((blocks, _padded(m)), jnp.float32)
    values, scales, kept, kept_scales = _kernel(
        functools.partial(_keep_body, tiles=tiles),
        "quantize_and_keep",
        grid=(_padded(m) // QUARTER, blocks // tiles),
        out=dict(values=((m, k), E4M3), scales=of_lines, kept=((m, k), jnp.float16), kept_scales=of_lines),
        scratch=dict(
            x_s=_tile(x.dtype, tiles, QUARTER, BLOCK, width=k),
            values_s=_tile(E4M3, tiles, QUARTER, BLOCK, width=k),
            kept_s=_tile(jnp.float16, tiles, QUARTER, BLOCK, width=k),
            scales_s=plgpu.SMEM((2, tiles, QUARTER), jnp.float32),
            loaded=plgpu.Barrier(num_barriers=tiles),
        ),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(x)
    return values[:rows], scales, kept[:rows], kept_scales


def _keep_body(x, values, scales, kept, kept_scales, *, x_s, values_s, kept_s, scales_s, loaded, tiles):
    rows, first = pl.ds(lax.axis_index("row") * QUARTER, QUARTER), lax.axis_index("column") * tiles
    for j in range(tiles):
        plgpu.copy_gmem_to_smem(x.at[rows, _block(first + j)], x_s.at[j], loaded.at[j])
    copies = []
    for j in range(tiles):
        plgpu.barrier_wait(loaded.at[j])
        lines = widened(plgpu.load(x_s.at[j], layout=FEW_ROWS), FEW_ROWS)
        largest = _largest(_keys(lines, FEW_ROWS))
        scale, kept_scale = tile_scale(largest, False), tile_scale(largest, True, E5M6_MAX)
        values_s[j] = _quotient(lines, scale, (0,), False, SHORT).astype(E4M3)
        kept_s[j] = _to_e5m6(_quotient(lines, kept_scale, (0,), True, SHORT))
        scales_s[0, j], scales_s[1, j] = scale, kept_scale
        here = rows, _block(first + j)
        copies += [(values_s.at[j], values.at[here]), (kept_s.at[j], kept.at[here])]
        copies += [(scales_s.at[side, j], out.at[first + j, rows]) for side, out in enumerate((scales, kept_scales))]
    _store(copies)


@_once
def quantize_both(x: Array, power_of_two: bool, interpret: Any = None) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.quantize_both`."""
    rows, x = x.shape[0], whole_rows(x)
    m, k = x.shape
    _check_width("x", k)
    blocks, mp = pl.cdiv(k, BLOCK), _padded(m)
    values, scales, values_t, scales_t = _kernel(
        functools.partial(_both_body, power_of_two=power_of_two),
        "quantize_both",
        grid=(mp // BLOCK, blocks),
        out=dict(
            values=((m, k), E4M3),
            scales=((blocks, mp), jnp.float32),
            values_t=((k, mp), E4M3),
            scales_t=((mp // BLOCK, _padded(k)), jnp.float32),
        ),
        scratch=dict(
            x_s=_tile(x.dtype, BLOCK, BLOCK, width=k),
            values_s=_tile(E4M3, BLOCK, BLOCK, width=k),
            scales_s=plgpu.SMEM((BLOCK,), jnp.float32),
            values_t_s=_tile(E4M3, BLOCK, BLOCK),
            scales_t_s=plgpu.SMEM((BLOCK,), jnp.float32),
            loaded=plgpu.Barrier(),
        ),
        interpret=interpret,
    )(x)
    return values[:rows], scales, values_t, scales_t[:, :k]


def _both_body(x, values, scales, values_t, scales_t, *, x_s, values_s, scales_s, values_t_s, scales_t_s, loaded, power_of_two):
    i, j = lax.axis_index("row"), lax.axis_index("column")
    _load([(x.at[_block(i), _block(j)], x_s)], loaded)
    for half in (pl.ds(0, 64), pl.ds(64, 64)):
        lines = plgpu.load(x_s.at[half], layout=ROWS).astype(jnp.float32)
        values_s[half], scales_s[half] = _quantize_lines(lines, ROWS, power_of_two, _kind(x))
    columns, scales_t_s[...] = _quantize_lines(_line(x_s.T), LINE(4), power_of_two, _kind(x))
    values_t_s[...] = _whole(columns)
    _store(
        [
            (values_s, values.at[_block(i), _block(j)]),
            (scales_s, scales.at[j, _block(i)]),
            (values_t_s, values_t.at[_block(j), _block(i)]),
            (scales_t_s, scales_t.at[i, _block(j)]),
        ]
    )


@_once
def quantize_blocks(w: Array, interpret: Any = None) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.quantize_blocks`."""
    if w.ndim == 2:
        return jax.tree.map(lambda out: out[0], quantize_blocks(w[None], interpret))
    experts, k, n = w.shape
    _check_width("w", n)
    _check_width("w, transposed", k)
    kb, nb = pl.cdiv(k, BLOCK), pl.cdiv(n, BLOCK)
    return _kernel(
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
            w_s=_tile(w.dtype, BLOCK, BLOCK, width=n),
            values_s=_tile(E4M3, BLOCK, BLOCK, width=n),
            values_t_s=_tile(E4M3, BLOCK, BLOCK, width=k),
            loaded=plgpu.Barrier(),
        ),
        interpret=interpret,
    )(w)


def _blocks_body(w, values, values_t, scales, scales_t, *, w_s, values_s, values_t_s, loaded):
    kb = scales.shape[1]
    expert, i, j = lax.div(lax.axis_index("row"), kb), lax.rem(lax.axis_index("row"), kb), lax.axis_index("column")
    _load([(w.at[expert, _block(i), _block(j)], w_s)], loaded)
    rows = plgpu.load(w_s, layout=ROWS).astype(jnp.float32)
    scale = tile_scale(jnp.max(_largest(_keys(rows, ROWS))), False)  # Mosaic takes one axis at a time
    scales[expert, i, j] = scale
    scales_t[expert, j, i] = scale
    values_s[...] = _quotient(rows, scale, (), False, LONG).astype(E4M3)
    columns = _line(w_s.T)
    values_t_s[...] = _whole(_quotient(columns, scale, (), False, LONG).astype(E4M3))
    _store([(values_s, values.at[expert, _block(i), _block(j)]), (values_t_s, values_t.at[expert, _block(j), _block(i)])])


@_once
def retile(values: Array, scales: Array, power_of_two: bool, sm_count: int, interpret: Any = None) -> tuple[Array, Array]:
    """See `pallas_kernels.quantize.retile`."""
    values = whole_rows(values)
    m, k = values.shape
    _check_width("values", k)
    row_blocks, blocks = _padded(m) // BLOCK, pl.cdiv(k, BLOCK)
    stages = 4 // values.dtype.itemsize  # tiles of a pair of warpgroups in shared memory: 128 KiB of them
    values_t, scales_t = _kernel(
        functools.partial(_retile_body, power_of_two=power_of_two, stages=stages),
        "retile",
        grid=(min(sm_count, pl.cdiv(row_blocks * blocks, 2)),),
        grid_names=("sm",),
        out=dict(values_t=((k, _padded(m)), E4M3), scales_t=((row_blocks, _padded(k)), jnp.float32)),
        scratch=dict(
            values_s=_tile(values.dtype, 4, stages, 64, BLOCK, width=k),
            scales_s=plgpu.SMEM((4, stages, BLOCK), jnp.float32),
            values_t_s=_tile(E4M3, 2, BLOCK, BLOCK),
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
    """Two pairs of warpgroups with tiles of their own; each warpgroup has 64 rows. As in `_backward_body` otherwise.

    Values are loaded as columns byte by byte: memory leaves time for that, and none for a turn in float32.
    """
    warpgroup, blocks = lax.axis_index("warpgroup"), pl.cdiv(values.shape[1], BLOCK)
    pair, half = lax.div(warpgroup, 2), lax.rem(warpgroup, 2)
    first, step, tiles = 2 * lax.axis_index("sm") + pair, 2 * lax.axis_size("sm"), scales_t.shape[0] * blocks
    own = {name: ref.at[warpgroup] for name, ref in s.items()}
    values_t_s, largest_s, largest_known, made = (ref.at[pair] for ref in (values_t_s, largest_s, largest_known, made))
    by_one_warp = functools.partial(_by_one_warp, warpgroup)

    def place(tile):
        i, j = lax.div(tile, blocks), lax.rem(tile, blocks)
        return i, j, pl.ds(i * BLOCK + half * 64, 64)

    def load(n):
        tile, slot = first + n * step, lax.rem(n, stages)

        @pl.when(tile < tiles)
        def _():
            i, j, rows = place(tile)
            full = loaded.at[warpgroup * stages + slot]
            plgpu.copy_gmem_to_smem(values.at[rows, _block(j)], own["values_s"].at[slot], full)
            plgpu.copy_gmem_to_smem(scales.at[j, _block(i)], own["scales_s"].at[slot], full)

    def store(i, j):
        _start([(values_t_s, values_t.at[_block(j), _block(i)])])
        plgpu.commit_smem_to_gmem_group()

    def run(n, _):
        tile, largest, slot = first + n * step, largest_s.at[lax.rem(n, 2)], lax.rem(n, stages)
        plgpu.barrier_wait(loaded.at[warpgroup * stages + slot])
        x = _line(own["values_s"].at[slot].T)
        by_row = plgpu.load(own["scales_s"].at[slot, pl.ds(half * 64, 64)], layout=LINE(4).reduce(0))
        x = x * lax.broadcast_in_dim(by_row, x.shape, (1,))
        ordinary = _ordinary(plgpu.load(own["scales_s"].at[slot], layout=EACH_WARP))
        largest[half] = _keys(x, LINE(4))
        by_one_warp(stored)
        plgpu.barrier_arrive(largest_known)
        plgpu.barrier_wait(largest_known)
        keys = [plgpu.load(largest.at[h], layout=LINE(4).reduce(1)) for h in (0, 1)]
        scale = tile_scale(_largest(jnp.maximum(*keys)), power_of_two)
        i, j, _ = place(tile)

        @pl.when(half == 0)
        def _known() -> None:
            scales_t[i, _block(j)] = scale

        def divided(kind):
            return _quotient(x, scale, (0,), power_of_two, kind).astype(E4M3)

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


@_once
def swiglu_quantize(hidden: Array, gates: Array | None, power_of_two: bool, interpret: Any = None) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.swiglu_quantize`."""
    rows, hidden = hidden.shape[0], whole_rows(hidden)
    m, f = hidden.shape[0], hidden.shape[1] // 2
    _check_halves("hidden", f)
    blocks, mp = f // BLOCK, _padded(m)
    inputs = (hidden,) if gates is None else (hidden, jnp.pad(gates, (0, mp - rows)))
    values, scales, hidden_values, hidden_scales = _kernel(
        functools.partial(_swiglu_body, power_of_two=power_of_two),
        "swiglu_quantize",
        grid=(mp // QUARTER, blocks),
        out=dict(
            values=((m, f), E4M3),
            scales=((blocks, mp), jnp.float32),
            hidden_values=((m, 2 * f), E4M3),
            hidden_scales=((2 * blocks, mp), jnp.float32),
        ),
        scratch=dict(
            hidden_s=_tile(hidden.dtype, 2, QUARTER, BLOCK),
            gates_s=plgpu.SMEM((QUARTER,), jnp.float32),
            values_s=_tile(E4M3, 3, QUARTER, BLOCK),
            scales_s=plgpu.SMEM((3, QUARTER), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=1 + len(inputs)),
        ),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*inputs)
    return values[:rows], scales, hidden_values[:rows], hidden_scales


def _swiglu_body(hidden, *refs, hidden_s, gates_s, values_s, scales_s, loaded, power_of_two):
    *gates, values, scales, hidden_values, hidden_scales = refs
    i, j, blocks = lax.axis_index("row"), lax.axis_index("column"), scales.shape[0]
    rows = pl.ds(i * QUARTER, QUARTER)
    _load(
        [(hidden.at[rows, _block(j)], hidden_s.at[0]), (hidden.at[rows, _block(blocks + j)], hidden_s.at[1])]
        + [(g.at[rows], gates_s) for g in gates],
        loaded,
    )
    gate, up = (widened(plgpu.load(hidden_s.at[half], layout=FEW_ROWS), FEW_ROWS) for half in (0, 1))
    act = gate * _sigmoid(gate * (1 / _UNIT), FEW_ROWS) * up
    factor = plgpu.load(gates_s, layout=FEW_ROWS.reduce(1)) if gates else None
    values_s[0], scales_s[0] = _quantize_computed(act, FEW_ROWS, power_of_two, factor)
    for side, lines in enumerate((gate, up)):
        values_s[1 + side], scales_s[1 + side] = _quantize_lines(lines, FEW_ROWS, False, SHORT)
    _store(
        [(values_s.at[0], values.at[rows, _block(j)]), (scales_s.at[0], scales.at[j, rows])]
        + [(values_s.at[1 + half], hidden_values.at[rows, _block(half * blocks + j)]) for half in (0, 1)]
        + [(scales_s.at[1 + half], hidden_scales.at[half * blocks + j, rows]) for half in (0, 1)]
    )


@_once
def swiglu_backward(
    hidden: Array,
    scales: Array,
    gates: Array | None,
    d_act: Array,
    power_of_two: bool,
    act_power_of_two: bool,
    sm_count: int,
    interpret: Any = None,
) -> tuple[Array, Array, Array, Array, Array, Array, Array | None]:
    """See `pallas_kernels.quantize.swiglu_backward`."""
    rows, hidden, d_act = d_act.shape[0], whole_rows(hidden), whole_rows(d_act)
    m, f = d_act.shape
    _check_halves("hidden", f)
    blocks, mp = f // BLOCK, _padded(m)
    inputs = (hidden, scales, d_act) if gates is None else (hidden, scales, d_act, jnp.pad(gates, (0, mp - rows)))
    values, *others, d_gates = _kernel(
        functools.partial(_backward_body, powers=(power_of_two, power_of_two, act_power_of_two)),
        "swiglu_backward",
        grid=(min(sm_count, mp // BLOCK * blocks),),
        grid_names=("sm",),
        out=dict(
            values=((m, 2 * f), E4M3),
            scales=((2 * blocks, mp), jnp.float32),
            values_t=((2 * f, mp), E4M3),
            scales_t=((mp // BLOCK, 2 * f), jnp.float32),
            act_values_t=((f, mp), E4M3),
            act_scales_t=((mp // BLOCK, f), jnp.float32),
            d_gates=((blocks, mp), jnp.float32),
        ),
        scratch=dict(
            hidden_s=_tile(E4M3, QUARTERS, 2, QUARTER, BLOCK),
            hidden_scales_s=plgpu.SMEM((QUARTERS, 2, QUARTER), jnp.float32),
            d_act_s=_tile(d_act.dtype, QUARTERS, QUARTER, BLOCK),
            gates_s=plgpu.SMEM((QUARTERS, QUARTER), jnp.float32),
            of_pieces_s=plgpu.SMEM((QUARTERS, 4, BLOCK), jnp.uint32),
            turn_s=_tile(jnp.float32, QUARTERS, QUARTER, BLOCK),
            largest_s=plgpu.SMEM((3, QUARTERS, BLOCK), jnp.uint32),
            values_s=_tile(E4M3, QUARTERS, 2, QUARTER, BLOCK),
            scales_s=plgpu.SMEM((QUARTERS, 2, QUARTER), jnp.float32),
            d_gates_s=plgpu.SMEM((QUARTERS, QUARTER), jnp.float32),
            values_t_s=_tile(E4M3, 3, BLOCK, BLOCK),
            loaded=plgpu.Barrier(num_arrivals=2 + len(inputs), num_barriers=QUARTERS),
            largest_known=plgpu.Barrier(num_arrivals=QUARTERS, num_barriers=3),
            made=plgpu.Barrier(num_arrivals=QUARTERS),
        ),
        interpret=interpret,
        num_threads=QUARTERS,
        thread_name="quarter",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(*inputs)
    return values[:rows], *others, None if gates is None else d_gates.sum(0)[:rows]


def _backward_body(hidden, hidden_scales, d_act, *refs, powers, **s):
    """Four warpgroups with 32 rows of a tile QUARTERS, which share the largest of their columns and its turned tiles; then the next tile.

    The next rows come in while the last are worked on. A warpgroup meets once a tile, for the largest of its rows; what else warps
    wait for has been said some work before, by barriers that let those who say it go on.
    """
    *gates, values, scales, values_t, scales_t, act_values_t, act_scales_t, d_gates = refs
    blocks, quarter, first, step = d_gates.shape[0], lax.axis_index("quarter"), lax.axis_index("sm"), lax.axis_size("sm")
    tiles = values_t.shape[1] // BLOCK * blocks
    by_loader, by_storer = (functools.partial(_by_one_warp, w) for w in (quarter, lax.rem(quarter + 2, QUARTERS)))

    def own(here):
        return {name: ref if name in _SHARED else ref.at[quarter + here] for name, ref in s.items()}

    def place(tile):
        i, j = lax.div(tile, blocks), lax.rem(tile, blocks)
        return i, (j, blocks + j), pl.ds(i * BLOCK + quarter * QUARTER, QUARTER)

    def turned(tile):
        """Values and scales of columns: where they go."""
        i, (gate, up), _ = place(tile)
        targets = (values_t, scales_t, gate), (values_t, scales_t, up), (act_values_t, act_scales_t, gate)
        return [(of_values.at[_block(j), _block(i)], of_scales.at[i, _block(j)]) for of_values, of_scales, j in targets]

    def load(tile, s):
        _, sides, rows = place(tile)
        copies = [(d_act.at[rows, _block(sides[0])], s["d_act_s"])] + [(g.at[rows], s["gates_s"]) for g in gates]
        for side, j in enumerate(sides):
            copies += [(hidden.at[rows, _block(j)], s["hidden_s"].at[side]), (hidden_scales.at[j, rows], s["hidden_scales_s"].at[side])]
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, s["loaded"])

    def store(tile, s):
        _, sides, rows = place(tile)
        copies = [(s["d_gates_s"], d_gates.at[sides[0], rows])]
        for side, j in enumerate(sides):
            copies += [(s["values_s"].at[side], values.at[rows, _block(j)]), (s["scales_s"].at[side], scales.at[j, rows])]
        plgpu.barrier_wait(s["made"])
        _start(copies)
        for slot, (target, _) in enumerate(turned(tile)):
            pl.when(quarter == slot)(functools.partial(_start, [(s["values_t_s"].at[slot], target)]))
        plgpu.commit_smem_to_gmem_group()

    def run(n, _):
        tile, s = first + n * step, own(_here(n))
        plgpu.barrier_wait(s["loaded"])
        inputs = _backward_inputs(bool(gates), s)
        fence()
        tensors, factor, d_gates_part = _gradients(*inputs)
        for kind, keys in enumerate([*(_keys(x, LINE(4)) for x in tensors), _unsigned(d_gates_part)]):
            s["of_pieces_s"][kind] = keys
        by_storer(stored)
        meet()
        by_loader(lambda: pl.when(tile + step < tiles)(lambda: load(tile + step, s)))
        kept = _quantize_rows_of(tensors, factor, powers, s)
        _quantize_turned((lambda: tensors[0], lambda: tensors[1], lambda: _opened(*kept)), powers, quarter, turned(tile), s)
        fence()
        plgpu.barrier_arrive(s["made"])
        by_storer(lambda: store(tile, s))

    stored = functools.partial(plgpu.wait_smem_to_gmem, 0, wait_read_only=True)
    by_loader(lambda: load(first, own(0)))
    lax.fori_loop(0, lax.div(tiles - first + step - 1, step), run, None)
    by_storer(stored)


_SHARED = ("largest_s", "largest_known", "values_t_s", "made")  # of all warpgroups; each has its part of the rest


def _here(n: Array) -> Array:
    """0, in a way that LLVM does not see: else it computes all addresses before the loop, and keeps them in registers that are needed."""
    return lax.shift_right_logical(n, 20)


def _by_one_warp(warp_number: Array, f: Callable) -> None:
    """Calls f in one warp only: the others spend no instructions on its copies.

    It is another one in each warpgroup, since first warps share a quarter of the multiprocessor, which would issue them all.
    """

    @plgpu.warp_map
    def _(warp):
        pl.when(warp == warp_number)(f)


def _backward_inputs(gated: bool, s: dict) -> tuple[list[Array], list[Array], Array, Array | None]:
    """Values of gate and up, their scales, the gradient of the activation, and `gates`."""
    hidden = [load_pieces(s["hidden_s"].at[side], E4M3) for side in (0, 1)]
    scales = [load_of_rows(s["hidden_scales_s"].at[side]) for side in (0, 1)]
    return hidden, scales, load_pieces(s["d_act_s"], jnp.bfloat16), load_of_rows(s["gates_s"]) if gated else None


# In units of it, gate and up (and in units of its square the activation) are what `exp2` takes: no product turns gate into that.
_UNIT = -math.log(2)


def _gradients(hidden: list[Array], scales: list[Array], d_act: Array, gates: Array | None) -> tuple[tuple[Array, ...], Array, Array]:
    """Gradients of gate and up and the activation, what rows of that are multiplied by, and sums over columns for that of `gates`."""
    factor = jnp.full_like(scales[0], _UNIT) if gates is None else gates * _UNIT
    parts: list = []
    d_gates: Any = 0.0
    for first in range(0, 32, 8):  # some columns after the others, or all steps of all columns are in registers at once
        part = slice(first, first + 8)
        gate, up = (_opened(x[:, part], scale * (1 / _UNIT)) for x, scale in zip(hidden, scales, strict=True))
        *wide, d_gates_part = _gradients_of(gate, up, widened(d_act[:, part], LINE(4)), factor)
        parts.append(wide)
        d_gates += d_gates_part
    return tuple(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)), factor * _UNIT, jnp.sum(d_gates, axis=1) * _UNIT**2


def _gradients_of(gate: Array, up: Array, d_act: Array, factor: Array) -> tuple[Array, Array, Array, Array]:
    """Gradients of gate and up, the activation without `gates`, and terms of the gradient of those; `factor` is _UNIT times them."""
    sigmoid = _sigmoid(gate, LINE(4))
    silu = gate * sigmoid
    act = silu * up
    gated = d_act * lax.broadcast_in_dim(factor, act.shape, (0,))
    return gated * up * (sigmoid + silu * (_UNIT - _UNIT * sigmoid)), gated * silu, act, d_act * act


def _quantize_rows_of(tensors: tuple, factor: Array, powers: tuple, s: dict) -> tuple[Array, Array]:
    """1x128 tiles of both gradients, stored, and those of the activation. All pieces of a row have said what is largest in them."""
    *keys, d_gates = ([load_of_rows(s["of_pieces_s"].at[kind, pl.ds(32 * w, 32)]) for w in range(4)] for kind in range(4))
    s["d_gates_s"][...] = of_rows(functools.reduce(jnp.add, map(_float, d_gates)))
    largest = [_largest(functools.reduce(jnp.maximum, of_pieces)) for of_pieces in keys]
    for side in (0, 1):
        values, scale = _quantize_known(tensors[side], LINE(4), largest[side], powers[side])
        store_pieces(s["values_s"].at[side], values)
        s["scales_s"][side] = of_rows(scale)
    return _quantize_known(tensors[2], LINE(4), largest[2], powers[2], factor)


def _quantize_turned(tensors: tuple, powers: tuple, quarter: Array, targets: list, s: dict) -> None:
    """128x1 tiles, turned by way of shared memory, one after the other: a thread then has 32 rows of a column.

    A warp turns columns of its own. The largest of a column's other rows are in `largest_s`.
    """
    turned = []
    for slot, tensor in enumerate(tensors):
        turned.append(turn(s["turn_s"], tensor()))
        s["largest_s"][slot, quarter] = _keys(turned[slot], LINE(4))
        plgpu.barrier_arrive(s["largest_known"].at[slot])
    for slot, (x, power_of_two, (_, of_scales)) in enumerate(zip(turned, powers, targets, strict=True)):
        plgpu.barrier_wait(s["largest_known"].at[slot])
        keys = [plgpu.load(s["largest_s"].at[slot, q], layout=LINE(4).reduce(1)) for q in range(QUARTERS)]
        scale = tile_scale(_largest(functools.reduce(jnp.maximum, keys)), power_of_two)
        store_columns(s["values_t_s"].at[slot], _computed_quotient(x, LINE(4), scale, power_of_two), quarter)

        @pl.when(quarter == slot + 1)
        def _(scale=scale, of_scales=of_scales):
            of_scales[...] = scale


# --- arithmetic, in registers ---

# Quotients are those of IEEE division, rounded to E4M3, without dividing: that would take more instructions than the
# time of a memory-bound kernel has room for, and XLA lets LLVM divide with an error. A product with the reciprocal is off
# by an ulp or two and so moves ties. What is enough depends on x:
#   SHORT   bfloat16: high * (1 + rest) with 35 bits of the reciprocal. Right for every pair of x and scale (tested)
#   LONG    float32: a product, what it lacks, and a correction, the last two as fused multiply-adds: correctly rounded
#           whatever the reciprocal's last bits. Mosaic allows that contraction; XLA on a CPU may not make it
#   WIDE    of `_ordinary` tiles: 48 bits of the reciprocal, in two parts. No pair is closer than that to a bound between two
#           values of E4M3 (a test goes through those that are close), and no number is subnormal
# Scales that are powers of two have exact reciprocals, and the product is right. It is also enough where x was computed, and has
# rounding errors of its own. There, a subnormal number is not made zero, which only a tile whose largest is under 6e-33 could show.
SHORT, LONG, WIDE = "short", "long", "wide"


def _kind(x: Any) -> str:
    return LONG if x.dtype == jnp.float32 else SHORT


def _quantize_lines(x: Array, layout: Any, power_of_two: bool, kind: str) -> tuple[Array, Array]:
    """E4M3 values of x[lines, n] in float32, and the scale of each line."""
    scale = tile_scale(_largest(_keys(x, layout)), power_of_two)
    return _quotient(x, scale, (0,), power_of_two, kind).astype(E4M3), scale


def _keys(x: Array, layout: Any) -> Array:
    """The largest magnitude of each line of x[lines, n], as an unsigned integer: the bits of its negative, those of NaN below.

    So two elements take one instruction, and then two of the results one more.
    """
    half = x.shape[1] // 2
    return jnp.max(_unsigned(larger(x[:, :half], x[:, half:], layout)), axis=1)


def _largest(key: Array) -> Array:
    """The magnitude that a largest of `_keys` stands for, 0 if that is of NaN."""
    sign = jnp.uint32(1 << 31)
    return lax.bitcast_convert_type(jnp.maximum(key, sign) ^ sign, jnp.float32)


def _quantize_computed(x: Array, layout: Any, power_of_two: bool, factor: Array | None = None) -> tuple[Array, Array]:
    """The same of lines that were computed, or of their products with `factor`, one for each line."""
    return _quantize_known(x, layout, _largest(_keys(x, layout)), power_of_two, factor)


def _quantize_known(x: Array, layout: Any, largest: Array, power_of_two: bool, factor: Array | None = None) -> tuple[Array, Array]:
    """The same where the largest of each line is known."""
    if factor is not None:
        largest = largest * jnp.abs(factor)
        largest = jnp.where(jnp.isnan(largest), 0.0, largest)
    scale = tile_scale(largest, power_of_two)
    return _computed_quotient(x, layout, scale, power_of_two, factor), scale


def _computed_quotient(x: Array, layout: Any, scale: Array, power_of_two: bool, factor: Array | None = None) -> Array:
    """E4M3 of computed x / scale, or of x * factor / scale."""
    inverse = _if_finite(scale, _inverse_power(scale)) if power_of_two else reciprocal(scale, layout.reduce(1))
    inverse = inverse if factor is None else inverse * factor
    return (x * lax.broadcast_in_dim(inverse, x.shape, (0,))).astype(E4M3)


def _quotient(x: Array, scale: Array, axes: tuple[int, ...], power_of_two: bool, kind: str) -> Array:
    """x / scale, where `axes` of x are those of scale. An infinite scale makes zeros, and NaN of infinity."""
    spread = functools.partial(lax.broadcast_in_dim, shape=x.shape, broadcast_dimensions=axes)
    if kind in (SHORT, LONG):
        x = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, 0.0, x)
    if power_of_two:
        return x * spread(_if_finite(scale, _inverse_power(scale)))
    if kind == SHORT:
        high, rest = _split_reciprocal(scale)
        quotient = x * spread(_if_finite(scale, high))  # exact: 8 by 12 bits
        return quotient + quotient * spread(rest)
    if kind == WIDE:
        high = 1.0 / scale
        high = high + high * (1.0 - scale * high)
        rest = high * (1.0 - scale * high)
        high, rest = (spread(_if_finite(scale, part)) for part in (high, rest))
        return x * high + x * rest
    inverse = spread(_if_finite(scale, 1.0 / scale))
    quotient = x * inverse
    return quotient + (x - quotient * spread(_if_finite(scale, scale))) * inverse


def _ordinary(scales: Array) -> Array:
    """Whether the scales of a tile are so far from the ends of float32 (2^-100 to 2^90) that WIDE may divide what they scale."""
    return jnp.max(jnp.abs(_bits(scales) - (122 << 23))) < 95 << 23  # exponents within 95 of that of 2^-5


def _to_e5m6(x: Array) -> Array:
    """x, whose largest is at most E5M6's, rounded to six bits in float16, ties to even."""
    last = 23 - E5M6_BITS
    rounded = _float((_bits(x) + (1 << last - 1) - 1 + (lax.shift_right_logical(_bits(x), last) & 1)) & -(1 << last))
    quantum = 2.0 ** (E5M6_MIN_EXPONENT - E5M6_BITS)
    subnormal = lax.round(x / quantum, lax.RoundingMethod.TO_NEAREST_EVEN) * quantum
    rounded = jnp.where(jnp.abs(x) < 2.0**E5M6_MIN_EXPONENT, subnormal, rounded)
    return jnp.where(jnp.isnan(x), x, rounded).astype(jnp.float16)


def _if_finite(scale: Array, value: Array) -> Array:
    return jnp.where(scale < jnp.inf, value, 0.0)


def _split_reciprocal(scale: Array) -> tuple[Array, Array]:
    """1 / scale = high * (1 + rest), high of 12 bits: Newton's step with an exact remainder, on the mantissa."""
    mantissa = _float((_bits(scale) & 0x7FFFFF) | 0x3F800000)
    high, top = _float(_bits(1.0 / mantissa) & -0x1000), _float(_bits(mantissa) & -0x1000)
    left = (1.0 - top * high) - (mantissa - top) * high
    return high * _inverse_power(scale), left * (1.0 + left * (1.0 + left))


def _inverse_power(scale: Array) -> Array:
    """1 over the power of two in a positive scale."""
    return _float(0x7F000000 - (_bits(scale) & 0x7F800000))


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _unsigned(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _sigmoid(x: Array, layout: Any) -> Array:
    """1 / (1 + exp2(x)), for x in units of `_UNIT`, without a quotient's care for extremes: within 2e-6 of it where exp2(x) is exp(20)."""
    return reciprocal(1.0 + jnp.exp2(x), layout)


def _opened(values: Array, scales: Array) -> Array:
    return values.astype(jnp.float32) * lax.broadcast_in_dim(scales, values.shape, (0,))


# --- memory ---


def _line(ref: Any) -> Array:
    """float32 of a [128, 128] view, each thread with a line of it: loaded one by one, then taken as runs of four."""
    return plgpu.layout_cast(plgpu.load(ref, layout=LINE(1)), LINE(4)).astype(jnp.float32)


def _whole(line: Array) -> Array:
    """E4M3 of a line, as runs of 16, which are stored at once."""
    return plgpu.layout_cast(line, LINE(16))


def _block(i: Any) -> Any:
    return pl.ds(i * BLOCK, BLOCK)


def _tile(dtype: Any, *shape: int, width: int = BLOCK) -> Any:
    """Shared memory for tiles of an array with rows of `width`.

    Mosaic cuts rows of the array in pieces of the swizzle, so that has to divide them: 128 bytes, or what is left.
    """
    itemsize = jnp.dtype(dtype).itemsize
    return tiled(*shape, swizzle=math.gcd(128, shape[-1] * itemsize, width * itemsize), dtype=dtype)


def _load(copies: list[tuple[Any, Any]], loaded: Any) -> None:
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, loaded)
    plgpu.barrier_wait(loaded)


def _start(copies: list[tuple[Any, Any]]) -> None:
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target, commit_group=False)


def _store(copies: list[tuple[Any, Any]]) -> None:
    plgpu.commit_smem()
    _start(copies)
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # shared memory has to live until it is read


def _kernel(body: Callable, name: str, *, out: dict, scratch: dict, grid_names: tuple = ("row", "column"), **kwargs: Any) -> Callable:
    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(*shape) for shape in out.values()),
        grid_names=grid_names,
        scratch_types=scratch,
        kernel_name=name,
        **kwargs,
    )


def _padded(rows: int) -> int:
    return pl.cdiv(rows, BLOCK) * BLOCK


def _check_width(name: str, columns: int) -> None:
    if columns % 32:
        raise NotImplementedError(f"{name}: rows of {columns}: tiled copies of E4M3 need multiples of 32; use the reference")


def _check_halves(name: str, columns: int) -> None:
    if columns % BLOCK:
        raise NotImplementedError(f"{name}: gate and up of {columns}: tiles of {BLOCK} would hold parts of both; use the reference")
