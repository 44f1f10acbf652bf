"""Tiles of rows turned into tiles of columns on Hopper GPUs (Mosaic GPU), for Wgrad."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.memory import whole_rows
from pallas_kernels.parts import Operand
from pallas_kernels.quantize import GATHERED
from pallas_kernels.quantize.arithmetic import LONG, WIDE, are_ordinary, keys_of, largest_of, quotient
from pallas_kernels.quantize.instructions import fence, number_in
from pallas_kernels.quantize.pieces import store_columns
from pallas_kernels.quantize.reference import BLOCK, E4M3, tile_scale
from pallas_kernels.quantize.tiles import (
    EACH_WARP,
    LINE,
    QUARTER,
    QUARTERS,
    as_operand,
    at_block,
    check_width,
    in_one_warp,
    launch,
    load_lines,
    of_columns,
    once,
    padded,
    tile_of,
    whole_columns,
)

Array = jax.Array

TEAMS = 2  # of a multiprocessor, of QUARTERS warpgroups, each with tiles of its own


@once
def retile(
    values: Array, scales: Array, power_of_two: bool, operand: Operand | None, sm_count: int, interpret: Any = None
) -> tuple[Array, Array]:
    """See `pallas_kernels.quantize.retile`."""
    values = whole_rows(values)
    check_width("values", values.shape[1])
    values_t, scales_t = _turned(values, scales, None, power_of_two, False, operand, sm_count, interpret)
    return values_t, scales_t


@once
def gather_and_retile(
    values: Array,
    scales: Array,
    source: Array,
    power_of_two: bool,
    keep: bool,
    operand: Operand | None,
    sm_count: int,
    interpret: Any = None,
) -> tuple[Array | None, Array, Array]:
    """See `pallas_kernels.quantize.gather_and_retile`."""
    if values.shape[1] % GATHERED:
        raise NotImplementedError(f"values: rows of {values.shape[1]}: gathered {GATHERED} columns at once; gather first, then retile")
    values_t, scales_t, *kept = _turned(values, scales, source, power_of_two, keep, operand, sm_count, interpret)
    return kept[0] if keep else None, values_t, scales_t


def _turned(
    values: Array,
    scales: Array,
    source: Array | None,
    power_of_two: bool,
    keep: bool,
    operand: Operand | None,
    sm_count: int,
    interpret: Any,
) -> list[Array]:
    """Values of columns, their scales, and gathered rows if they are kept."""
    k, rows = values.shape[1], padded(scales.shape[1])
    gathers = source is not None
    wide = GATHERED if gathers else BLOCK
    stages = 4 * BLOCK // (values.dtype.itemsize * wide)  # 128 KiB in shared memory
    slots = TEAMS, stages, BLOCK, wide
    values_t, scales_t, *kept = launch(
        functools.partial(_body, power_of_two=power_of_two, keep=keep, operand=operand, stages=stages, wide=wide),
        "gather_and_retile" if gathers else "retile",
        grid=(min(sm_count, pl.cdiv(rows // BLOCK * pl.cdiv(k, wide), TEAMS)),),
        grid_names=("sm",),
        out=dict(values_t=((k, rows), E4M3), scales_t=of_columns(k, rows // BLOCK, operand))
        | (dict(kept=((rows, k), values.dtype)) if keep else {}),
        scratch=dict(
            values_s=plgpu.SMEM(slots, values.dtype) if gathers else tile_of(values.dtype, *slots, width=k),
            scales_s=plgpu.SMEM((TEAMS, stages, wide // BLOCK, BLOCK), jnp.float32),
            source_s=plgpu.SMEM((TEAMS, stages + 1, BLOCK), jnp.int32),
            values_t_s=tile_of(E4M3, TEAMS, 2, BLOCK, BLOCK),
            largest_s=plgpu.SMEM((TEAMS, 2, QUARTERS, BLOCK), jnp.uint32),
            loaded=plgpu.Barrier(num_arrivals=1 + (BLOCK if gathers else 1), num_barriers=TEAMS * stages),
            source_known=plgpu.Barrier(num_barriers=TEAMS),
            largest_known=plgpu.Barrier(num_arrivals=QUARTERS, num_barriers=TEAMS),
            made=plgpu.Barrier(num_arrivals=QUARTERS, num_barriers=TEAMS),
        ),
        interpret=interpret,
        num_threads=TEAMS * QUARTERS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(values, scales, *([source] if gathers else []))
    return [values_t, whole_columns(scales_t, k), *kept]


def _body(values, scales, *refs, loaded, power_of_two, keep, operand, stages, wide, **s):
    """Teams of four warpgroups with tiles of their own; each warpgroup has 32 rows of the team's. The next tiles come in meanwhile.

    A team meets once a tile, for the largest of its columns: then all of the tile is in registers, and the next may take its place.
    Values are loaded as columns byte by byte: memory leaves time for that, and none for a turn in float32. Of gathered rows a copy
    takes two tiles side by side, turned one after the other.
    """
    kept = refs[-1] if keep else None
    source, values_t, scales_t = refs[:3] if wide == GATHERED else (None, *refs[:2])
    sides, row_blocks = wide // BLOCK, scales_t.shape[0]
    team, quarter = lax.div(lax.axis_index("warpgroup"), QUARTERS), lax.rem(lax.axis_index("warpgroup"), QUARTERS)
    first, step, loads = TEAMS * lax.axis_index("sm") + team, TEAMS * lax.axis_size("sm"), row_blocks * pl.cdiv(values.shape[1], wide)
    s = {name: ref.at[team] for name, ref in s.items()}
    own_rows = pl.ds(quarter * QUARTER, QUARTER)

    def by_one_warp(number, f):
        """Of the team; it is another one for each kind of copies."""
        pl.when(quarter == number)(lambda: in_one_warp(number, f))

    def place(n):
        """Blocks of rows and of columns. All rows come before the next columns: rows that are gathered twice are then still in L2."""
        at = first + n * step
        return lax.rem(at, row_blocks), lax.div(at, row_blocks)

    def is_there(n):
        return first + n * step < loads

    def load(n):
        slot = lax.rem(n, stages)
        full, target = loaded.at[team * stages + slot], s["values_s"].at[slot]

        @pl.when(is_there(n))
        def _():
            i, j = place(n)
            columns = pl.ds(j * wide, wide)
            if source is not None:
                gather(n, columns, target, full)

            def copies():
                if source is None:
                    plgpu.copy_gmem_to_smem(values.at[at_block(i), columns], target, full)
                plgpu.copy_gmem_to_smem(scales.at[pl.ds(j * sides, sides), at_block(i)], s["scales_s"].at[slot], full)

            by_one_warp(1, copies)

    def gather(n, columns, target, full):
        """A copy for each row, by all warps; which rows come next is asked for ahead."""
        plgpu.barrier_wait(s["source_known"])

        @plgpu.warp_map
        def _(warp):
            own = [quarter * QUARTER + warp * (QUARTER // 4) + r for r in range(QUARTER // 4)]
            tokens = [number_in(s["source_s"].at[lax.rem(n, stages + 1)], r) for r in own]
            for token, r in zip(tokens, own, strict=True):
                plgpu.copy_gmem_to_smem(values.at[token, columns], target.at[r], full)

        by_one_warp(2, lambda: ask(n + 1))

    def ask(n):
        @pl.when(is_there(n))
        def _():
            plgpu.copy_gmem_to_smem(source.at[at_block(place(n)[0])], s["source_s"].at[lax.rem(n, stages + 1)], s["source_known"])

    def store(t):
        """What is made of a tile, and was not waited for at once."""
        plgpu.barrier_wait(s["made"])
        i, j = place(lax.div(t, sides))
        plgpu.copy_smem_to_gmem(s["values_t_s"].at[lax.rem(t, 2)], values_t.at[at_block(j * sides + lax.rem(t, sides)), at_block(i)])

    def run(t, _):
        n, side = lax.div(t, sides), lax.rem(t, sides)
        slot, largest = lax.rem(n, stages), s["largest_s"].at[lax.rem(t, 2)]
        i, j = place(n)
        pl.when(side == 0)(lambda: plgpu.barrier_wait(loaded.at[team * stages + slot]))
        x = load_lines(s["values_s"].at[slot, own_rows, at_block(side)].T)
        of_rows = s["scales_s"].at[slot, side]
        x = x * lax.broadcast_in_dim(plgpu.load(of_rows.at[own_rows], layout=LINE(4).reduce(0)), x.shape, (1,))
        ordinary = are_ordinary(plgpu.load(of_rows, layout=EACH_WARP))
        largest[quarter] = keys_of(x, LINE(4))

        def copies():
            pl.when(t > 0)(lambda: store(t - 1))
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the turned tile before that, and on the second side rows that are kept
            if kept is not None:
                target = kept.at[at_block(i), pl.ds(j * wide, wide)]
                pl.when(side == 0)(lambda: plgpu.copy_smem_to_gmem(s["values_s"].at[slot], target))

        by_one_warp(0, copies)
        fence()
        plgpu.barrier_arrive(s["largest_known"])
        plgpu.barrier_wait(s["largest_known"])
        pl.when(side == sides - 1)(lambda: load(n + stages))
        keys = [plgpu.load(largest.at[q], layout=LINE(4).reduce(1)) for q in range(QUARTERS)]
        scale = tile_scale(largest_of(functools.reduce(jnp.maximum, keys)), power_of_two)

        @pl.when(quarter == 0)
        def _known() -> None:
            scales_t[i, at_block(j * sides + side)] = as_operand(scale, operand)

        def divided(kind):
            return quotient(x, scale, (0,), power_of_two, kind).astype(E4M3)

        store_columns(s["values_t_s"].at[lax.rem(t, 2)], lax.cond(ordinary, lambda: divided(WIDE), lambda: divided(LONG)), quarter)
        fence()
        plgpu.barrier_arrive(s["made"])

    if source is not None:
        by_one_warp(2, lambda: ask(0))
    for n in range(stages):
        load(n)
    tiles = lax.div(loads - first + step - 1, step) * sides
    lax.fori_loop(0, tiles, run, None)

    def last():
        pl.when(tiles > 0)(lambda: store(tiles - 1))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    by_one_warp(0, last)
