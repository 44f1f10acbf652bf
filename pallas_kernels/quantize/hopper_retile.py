"""Tiles of rows turned into tiles of columns on Hopper GPUs (Mosaic GPU), for Wgrad."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.memory import here, whole_rows
from pallas_kernels.parts import Operand
from pallas_kernels.quantize.arithmetic import LONG, WIDE, are_ordinary, largest_of, quotient, unsigned
from pallas_kernels.quantize.columns import RUN, again, by_columns, load_turned, store_turned
from pallas_kernels.quantize.gathered import OF_ROWS, gather, wait_for_rows
from pallas_kernels.quantize.instructions import fence, larger, meet
from pallas_kernels.quantize.reference import BLOCK, E4M3, tile_scale
from pallas_kernels.quantize.tickets import counter, publish, take
from pallas_kernels.quantize.tiles import (
    EACH_WARP,
    LINE,
    as_operand,
    at_block,
    check_width,
    in_one_warp,
    launch,
    of_columns,
    once,
    swizzle_of,
    tile_of,
    wait_for_stores,
    whole_columns,
)

Array = jax.Array

WARPGROUPS = 4


@once
def retile(
    values: Array, scales: Array, power_of_two: bool, operand: Operand | None, sm_count: int, interpret: Any = None
) -> tuple[Array, Array]:
    """See `pallas_kernels.quantize.retile`."""
    values = whole_rows(values)
    check_width("values", values.shape[1])
    values_t, scales_t = _turned(dict(values=values, scales=scales), power_of_two, False, operand, sm_count, interpret)
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
    if values.shape[1] % BLOCK:
        raise NotImplementedError(f"values: rows of {values.shape[1]}: gathered {BLOCK} columns at once; gather first, then retile")
    inputs = dict(values=values, scales=scales, source=source)
    values_t, scales_t, *kept = _turned(inputs, power_of_two, keep, operand, sm_count, interpret)
    return kept[0] if keep else None, values_t, scales_t


def _turned(
    inputs: dict[str, Array], power_of_two: bool, keep: bool, operand: Operand | None, sm_count: int, interpret: Any
) -> list[Array]:
    """Values of columns, their scales, and gathered rows if they are kept."""
    values, gathers = inputs["values"], "source" in inputs
    k, rows = values.shape[1], inputs["scales"].shape[1]
    of_each = WARPGROUPS, BLOCK
    inputs = inputs | dict(tickets=counter())
    out: dict = dict(values_t=((rows // BLOCK, k, BLOCK), E4M3), scales_t=of_columns(k, rows // BLOCK, operand))
    out |= dict(kept=((rows, k), values.dtype)) if keep else {}
    values_t, scales_t, *kept = launch(
        functools.partial(_body, names=(*inputs, *out), power_of_two=power_of_two, operand=operand),
        "gather_and_retile" if gathers else "retile",
        grid=(min(sm_count, pl.cdiv(rows // BLOCK * pl.cdiv(k, BLOCK), WARPGROUPS)),),
        grid_names=("sm",),
        out=out,
        scratch=dict(
            values_s=tile_of(values.dtype, *of_each, BLOCK, width=k),
            scales_s=plgpu.SMEM((WARPGROUPS, 2, BLOCK), jnp.float32),
            largest_s=plgpu.SMEM(of_each, jnp.uint32),
            scales_t_s=plgpu.SMEM(of_each, jnp.float32),
            values_t_s=tile_of(E4M3, *of_each, BLOCK),
            next_s=plgpu.SMEM((WARPGROUPS, 2, 1), jnp.int32),
            loaded=plgpu.Barrier(num_arrivals=1 if gathers else 2, num_barriers=WARPGROUPS),
            made=plgpu.Barrier(num_barriers=WARPGROUPS),
        ),
        interpret=interpret,
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(*inputs.values())
    return [values_t, whole_columns(scales_t, k), *kept]


def _body(*refs, names, power_of_two, operand, **scratch):
    """Warpgroups take tiles, as the counter gives them, and turn one while the next comes."""
    tiles = _Tiles(dict(zip(names, refs, strict=True)), scratch)
    tiles.load(tiles.first, tiles.tokens(tiles.first), 0)
    carry = jnp.int32(0), tiles.first, tiles.first + tiles.step
    lax.while_loop(lambda carry: carry[1] < tiles.number, lambda carry: _turn(tiles, *carry, power_of_two, operand), carry)
    in_one_warp(2, wait_for_stores)


def _turn(tiles, t, n, following, power_of_two, operand):
    """Tile n; `following` comes once it is in registers.

    There it stays as it came. What its scales make of it is computed twice: for the largest of each column, and to be divided.
    """
    s, slot, layout = tiles.s, lax.rem(t, 2), by_columns(tiles.dtype)
    next_s, of_rows = s["next_s"].at[slot], s["scales_s"].at[slot]
    ticket = take(tiles.refs["tickets"])
    tokens = tiles.tokens(following)
    tiles.wait(n)
    tile = load_turned(s["values_s"], tiles.dtype, tiles.swizzle)
    ordinary = are_ordinary(plgpu.load(of_rows, layout=EACH_WARP))

    def run(r, zero=None):
        """Some rows, times their scales."""
        part = tile[:, r * RUN : (r + 1) * RUN]
        part = part if zero is None else again(part, zero, tiles.dtype)
        scale = plgpu.load(of_rows.at[pl.ds(r * RUN, RUN)], layout=layout.reduce(0))
        return part.astype(jnp.float32) * lax.broadcast_in_dim(scale, part.shape, (1,))

    keys = [unsigned(larger(run(r), run(r + 1), layout)) for r in range(0, BLOCK // RUN, 2)]
    s["largest_s"][...] = jnp.max(functools.reduce(jnp.maximum, keys), axis=1)
    in_one_warp(2, wait_for_stores)
    publish(next_s, ticket)
    fence()
    meet()
    tiles.load(following, tokens, 1 - slot)
    scale = tile_scale(largest_of(plgpu.load(s["largest_s"], layout=LINE(4).reduce(1))), power_of_two)
    s["scales_t_s"][...] = scale
    meet()
    tiles.store_scales(n, as_operand(scale, operand))
    of_columns = plgpu.load(s["scales_t_s"], layout=layout.reduce(1))

    def divide(kind):
        for r in range(0, BLOCK // RUN, 2):
            part = jnp.concatenate([run(r + upper, here(t)) for upper in (0, 1)], axis=1)
            store_turned(s["values_t_s"], quotient(part, of_columns, (0,), power_of_two, kind, layout).astype(E4M3), r, tiles.dtype)

    lax.cond(ordinary, lambda: divide(WIDE), lambda: divide(LONG))
    fence()
    plgpu.barrier_arrive(s["made"])
    in_one_warp(2, lambda: tiles.store(n))
    return t + 1, following, 2 * tiles.step + next_s[0]


class _Tiles:
    """What a warpgroup loads and stores."""

    def __init__(self, refs: dict[str, Any], scratch: dict[str, Any]) -> None:
        warpgroup = lax.axis_index("warpgroup")
        self.refs, self.s = refs, {name: ref.at[warpgroup] for name, ref in scratch.items()}
        self.dtype = refs["values"].dtype
        self.swizzle = swizzle_of(self.dtype, BLOCK, refs["values"].shape[1])
        self.row_blocks, self.column_blocks = refs["scales_t"].shape[0], refs["scales"].shape[0]
        self.number = self.row_blocks * self.column_blocks
        self.first, self.step = WARPGROUPS * lax.axis_index("sm") + warpgroup, WARPGROUPS * lax.axis_size("sm")

    def place(self, n: Array) -> tuple[Array, Array]:
        """Blocks of rows, and of columns. Of gathered rows all come before the next columns: those that come twice are then still in L2."""
        if "source" in self.refs:
            return lax.rem(n, self.row_blocks), lax.div(n, self.row_blocks)
        return lax.div(n, self.column_blocks), lax.rem(n, self.column_blocks)

    def tokens(self, n: Array) -> Array | None:
        """Which tokens the rows of a tile are, if they are gathered."""
        if "source" not in self.refs:
            return None
        i, _ = self.place(jnp.minimum(n, self.number - 1))
        return plgpu.load(self.refs["source"].at[at_block(i)], layout=OF_ROWS, optimized=False)

    def load(self, n: Array, tokens: Array | None, slot: Any) -> None:
        @pl.when(n < self.number)
        def _() -> None:
            i, j = self.place(n)
            if tokens is not None:
                gather(self.s["values_s"], self.refs["values"], tokens, j)

            def copies() -> None:
                if tokens is None:
                    tile = self.refs["values"].at[at_block(i), at_block(j)]
                    plgpu.copy_gmem_to_smem(tile, self.s["values_s"], self.s["loaded"])
                plgpu.copy_gmem_to_smem(self.refs["scales"].at[j, at_block(i)], self.s["scales_s"].at[slot], self.s["loaded"])

            in_one_warp(1, copies)

    def wait(self, n: Array) -> None:
        """For tile n; rows that are kept are stored as they came."""
        plgpu.barrier_wait(self.s["loaded"])
        if "source" not in self.refs:
            return
        wait_for_rows()
        fence()
        meet()
        if "kept" in self.refs:
            i, j = self.place(n)
            in_one_warp(2, lambda: plgpu.copy_smem_to_gmem(self.s["values_s"], self.refs["kept"].at[at_block(i), at_block(j)]))

    def store_scales(self, n: Array, scales: Array) -> None:
        i, j = self.place(n)
        self.refs["scales_t"][i, at_block(j)] = scales

    def store(self, n: Array) -> None:
        i, j = self.place(n)
        plgpu.barrier_wait(self.s["made"])
        plgpu.copy_smem_to_gmem(self.s["values_t_s"], self.refs["values_t"].at[i, at_block(j)])
