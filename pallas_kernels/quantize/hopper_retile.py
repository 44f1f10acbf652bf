"""Tiles of rows turned into tiles of columns on Hopper GPUs (Mosaic GPU), for Wgrad."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.memory import whole_rows
from pallas_kernels.parts import Operand
from pallas_kernels.quantize.arithmetic import LONG, WIDE, are_ordinary, keys_of, quotient
from pallas_kernels.quantize.instructions import fence
from pallas_kernels.quantize.pieces import number_in, store_columns
from pallas_kernels.quantize.reference import BLOCK, E4M3, GATHERED
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
    scale_of_columns,
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
    k, rows = values.shape[1], scales.shape[1]
    gathers = source is not None
    wide = GATHERED if gathers else BLOCK
    stages = 4 * BLOCK // (values.dtype.itemsize * wide)  # 128 KiB in shared memory
    slots = TEAMS, stages, BLOCK, wide
    inputs = dict(values=values, scales=scales) | (dict(source=source) if gathers else {})
    out: dict = dict(values_t=((k, rows), E4M3), scales_t=of_columns(k, rows // BLOCK, operand))
    out |= dict(kept=((rows, k), values.dtype)) if keep else {}
    values_t, scales_t, *kept = launch(
        functools.partial(_body, names=(*inputs, *out), power_of_two=power_of_two, operand=operand),
        "gather_and_retile" if gathers else "retile",
        grid=(min(sm_count, pl.cdiv(rows // BLOCK * pl.cdiv(k, wide), TEAMS)),),
        grid_names=("sm",),
        out=out,
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
    )(*inputs.values())
    return [values_t, whole_columns(scales_t, k), *kept]


def _body(*refs, names, power_of_two, operand, loaded, **scratch):
    """Teams of four warpgroups with tiles of their own; each warpgroup has 32 rows of the team's. The next tiles come in meanwhile.

    A team meets once a tile, for the largest of its columns: then all of the tile is in registers, and the next may take its place.
    """
    number, quarter = lax.div(lax.axis_index("warpgroup"), QUARTERS), lax.rem(lax.axis_index("warpgroup"), QUARTERS)
    own = {name: ref.at[number] for name, ref in scratch.items()}
    team = _Team(number, quarter, dict(zip(names, refs, strict=True)), own, loaded)
    team.start()
    lax.fori_loop(0, team.tiles, lambda t, _: _turn(team, t, power_of_two, operand), None)
    team.end()


def _turn(team, t, power_of_two, operand):
    """Tile t of a team. Values are loaded as columns byte by byte: memory leaves time for that, and none for a turn in float32."""
    s = team.s
    n, side = lax.div(t, team.sides), lax.rem(t, team.sides)
    slot, largest, turned = lax.rem(n, team.stages), s["largest_s"].at[lax.rem(t, 2)], s["values_t_s"].at[lax.rem(t, 2)]
    i, j = team.place(n)
    pl.when(side == 0)(lambda: plgpu.barrier_wait(team.loaded(slot)))
    x = load_lines(s["values_s"].at[slot, team.own_rows, at_block(side)].T)
    of_rows = s["scales_s"].at[slot, side]
    x = x * lax.broadcast_in_dim(plgpu.load(of_rows.at[team.own_rows], layout=LINE(4).reduce(0)), x.shape, (1,))
    ordinary = are_ordinary(plgpu.load(of_rows, layout=EACH_WARP))
    largest[team.quarter] = keys_of(x, LINE(4))
    team.by_one_warp(0, lambda: team.store_before(t))
    fence()
    plgpu.barrier_arrive(s["largest_known"])
    plgpu.barrier_wait(s["largest_known"])
    pl.when(side == team.sides - 1)(lambda: team.load(n + team.stages))
    scale = scale_of_columns(largest, power_of_two)

    @pl.when(team.quarter == 0)
    def _known() -> None:
        team.refs["scales_t"][i, at_block(j * team.sides + side)] = as_operand(scale, operand)

    def divided(kind):
        return quotient(x, scale, (0,), power_of_two, kind, LINE(4)).astype(E4M3)

    store_columns(turned, lax.cond(ordinary, lambda: divided(WIDE), lambda: divided(LONG)), team.quarter)
    fence()
    plgpu.barrier_arrive(s["made"])


class _Team:
    """What a team loads and stores. Load n brings `sides` tiles, side by side, which are turned one after the other."""

    def __init__(self, number: Array, quarter: Array, refs: dict[str, Any], s: dict[str, Any], loaded: Any) -> None:
        self.number, self.quarter, self.refs, self.s, self.all_loaded = number, quarter, refs, s, loaded
        self.stages, self.sides, _ = s["scales_s"].shape
        self.row_blocks = refs["scales_t"].shape[0]
        self.own_rows = pl.ds(quarter * QUARTER, QUARTER)
        self.first, self.step = TEAMS * lax.axis_index("sm") + number, TEAMS * lax.axis_size("sm")
        self.loads = self.row_blocks * pl.cdiv(refs["values"].shape[1], self.sides * BLOCK)

    @property
    def tiles(self) -> Array:
        return lax.div(self.loads - self.first + self.step - 1, self.step) * self.sides

    def place(self, n: Any) -> tuple[Array, Array]:
        """Blocks of rows and of columns. All rows come before the next columns: rows that are gathered twice are then still in L2."""
        at = self.first + n * self.step
        return lax.rem(at, self.row_blocks), lax.div(at, self.row_blocks)

    def is_there(self, n: Any) -> Array:
        return self.first + n * self.step < self.loads

    def columns(self, j: Array) -> Any:
        """Those of a load."""
        return pl.ds(j * self.sides * BLOCK, self.sides * BLOCK)

    def loaded(self, slot: Array) -> Any:
        """What says that a slot is full."""
        return self.all_loaded.at[self.number * self.stages + slot]

    def by_one_warp(self, number: int, f: Callable[[], None]) -> None:
        """Calls f in one warp of the team, another one for each kind of copies."""
        pl.when(self.quarter == number)(lambda: in_one_warp(number, f))

    def start(self) -> None:
        if "source" in self.refs:
            self.by_one_warp(2, lambda: self.ask(0))
        for n in range(self.stages):
            self.load(n)

    def load(self, n: Any) -> None:
        slot = lax.rem(n, self.stages)
        full, target = self.loaded(slot), self.s["values_s"].at[slot]

        @pl.when(self.is_there(n))
        def _():
            i, j = self.place(n)
            columns = self.columns(j)
            if "source" in self.refs:
                self.gather(n, columns, target, full)

            def copies():
                if "source" not in self.refs:
                    plgpu.copy_gmem_to_smem(self.refs["values"].at[at_block(i), columns], target, full)
                of_tiles = self.refs["scales"].at[pl.ds(j * self.sides, self.sides), at_block(i)]
                plgpu.copy_gmem_to_smem(of_tiles, self.s["scales_s"].at[slot], full)

            self.by_one_warp(1, copies)

    def gather(self, n: Any, columns: Any, target: Any, full: Any) -> None:
        """A copy for each row, by all warps. Those of a token that is none lie outside of the array, and TMA makes them zeros."""
        plgpu.barrier_wait(self.s["source_known"])

        @plgpu.warp_map
        def _(warp):
            own = [self.quarter * QUARTER + warp * (QUARTER // 4) + r for r in range(QUARTER // 4)]
            tokens = [number_in(self.s["source_s"].at[lax.rem(n, self.stages + 1)], r) for r in own]
            for token, r in zip(tokens, own, strict=True):
                plgpu.copy_gmem_to_smem(self.refs["values"].at[token, columns], target.at[r], full)

        self.by_one_warp(2, lambda: self.ask(n + 1))

    def ask(self, n: Any) -> None:
        """Which tokens the rows of a load are, one load ahead."""

        @pl.when(self.is_there(n))
        def _():
            target = self.s["source_s"].at[lax.rem(n, self.stages + 1)]
            plgpu.copy_gmem_to_smem(self.refs["source"].at[at_block(self.place(n)[0])], target, self.s["source_known"])

    def store_before(self, t: Any) -> None:
        """Stores what was made of the tile before t, which was not waited for at once, and rows that are kept, once they are loaded."""
        pl.when(t > 0)(lambda: self.store(t - 1))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the turned tile before that, and on the second side the kept rows
        if "kept" in self.refs:
            n, side = lax.div(t, self.sides), lax.rem(t, self.sides)
            i, j = self.place(n)
            target = self.refs["kept"].at[at_block(i), self.columns(j)]
            pl.when(side == 0)(lambda: plgpu.copy_smem_to_gmem(self.s["values_s"].at[lax.rem(n, self.stages)], target))

    def store(self, t: Any) -> None:
        plgpu.barrier_wait(self.s["made"])
        i, j = self.place(lax.div(t, self.sides))
        target = self.refs["values_t"].at[at_block(j * self.sides + lax.rem(t, self.sides)), at_block(i)]
        plgpu.copy_smem_to_gmem(self.s["values_t_s"].at[lax.rem(t, 2)], target)

    def end(self) -> None:
        def last() -> None:
            pl.when(self.tiles > 0)(lambda: self.store(self.tiles - 1))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        self.by_one_warp(0, last)
