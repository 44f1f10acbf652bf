"""Sizes, tiles and the order of tiles that both sides of a product's pipeline agree on."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm.product import GROUP, SWIZZLE, WAVE, Product, TuningConfig
from pallas_kernels.memory import tiled
from pallas_kernels.parts import PARTS, ROWS

_ALIGNED = 32  # float32 numbers between the places that TMA copies to


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Sizes that both sides of the pipeline agree on."""

    product: Product
    config: TuningConfig
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    n_groups: int
    itemsize: int
    adds: bool  # to what the output holds

    def __post_init__(self) -> None:
        c = self.config
        if self.product.scales == "block" and GROUP % c.block_n:
            raise ValueError(f"config: block_n {c.block_n}: has to divide {GROUP}, so that a tile's columns have one scale a step")
        if c.waves > 1 and (c.overlap or self.product.scales != "block"):
            raise ValueError(f"config: block_m {c.block_m}: two waves a warpgroup are for scales of blocks, and are not overlapped")

    @property
    def turned(self) -> dict[str, bool]:
        """Operands whose contraction comes first: 16-bit wgmma reads those of Wgrad as they lie, [tokens, columns], and weights too."""
        both = self.product.scales == "none" and self.product.groups == "contraction"
        return {"a": both, "b": both or self.product.weights_lie}

    @property
    def by_steps(self) -> bool:
        """Whether what a step multiplies lies together, [steps, rows, 128]: tokens of Wgrad in FP8."""
        return self.product.scales == "row"

    @property
    def m(self) -> int:
        return self.a_shape[-1 if self.turned["a"] else -2]

    @property
    def n(self) -> int:
        return self.b_shape[-1 if self.turned["b"] else -2]

    @property
    def block_k(self) -> int:
        return SWIZZLE // self.itemsize

    @property
    def k_steps(self) -> int:
        return self.a_shape[0] if self.by_steps else pl.cdiv(self.a_shape[0 if self.turned["a"] else -1], self.block_k)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.n_groups, self.m, self.n) if self.product.per_group else (self.m, self.n)

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles along m and n; with a cluster, as many together as it has blocks."""
        return pl.cdiv(self.m, self.config.rows), pl.cdiv(self.n, self.config.columns)

    def block_of(self, column: jax.Array) -> jax.Array:
        """The block of b that a column belongs to; columns past the end count to the last."""
        return lax.min(lax.div(column, GROUP), pl.cdiv(self.n, GROUP) - 1)

    @property
    def store_columns(self) -> int:
        """Columns stored at once: TMA wants them to divide the output's."""
        return math.gcd(self.config.store_bytes // jnp.dtype(self.product.out).itemsize, self.config.block_n, self.n)

    def _slot(self, operand: str, size: int) -> tuple[int, int]:
        return (self.block_k, size) if self.turned[operand] else (size, self.block_k)

    def window(self, operand: str, start: jax.Array, size: int, k: jax.Array) -> tuple[Any, Any]:
        """One K step of `size` rows (columns, if those come last) of an operand."""
        if self.by_steps:
            return k, pl.ds(start, size)
        at = pl.ds(start, size), pl.ds(k * self.block_k, self.block_k)
        return at[::-1] if self.turned[operand] else at

    def scratch(self, dtype: jnp.dtype) -> dict[str, Any]:
        c = self.config
        out = jnp.dtype(self.product.out)
        swizzle = plgpu.find_swizzle(self.store_columns * out.itemsize * 8)
        free: dict[str, Any] = dict(num_arrivals=c.warpgroups, num_barriers=c.stages)
        scratch = dict(
            a_slots=tiled(c.stages, *self._slot("a", c.block_m), swizzle=SWIZZLE, dtype=dtype),
            b_slots=tiled(c.stages, *self._slot("b", c.block_n), swizzle=SWIZZLE, dtype=dtype),
            out_slots=tiled(c.warpgroups, c.store_slots, WAVE, self.store_columns, swizzle=swizzle, dtype=out),
            filled=plgpu.Barrier(num_arrivals=2 if self.product.scales == "none" else 4, num_barriers=c.stages),
            freed=plgpu.ClusterBarrier(collective_axes=("cluster",), **free) if c.cluster else plgpu.Barrier(**free),
        )
        if self.product.scales == "block":
            scratch["a_scale_slots"] = plgpu.SMEM((c.stages, c.block_m), jnp.float32)
            scratch["b_scale_slots"] = plgpu.SMEM((c.stages, _ALIGNED), jnp.float32)
        if self.product.scales == "row":
            for name, rows in (("a_scale_slots", c.block_m), ("b_scale_slots", c.block_n)):
                scratch[name] = plgpu.SMEM((c.stages, rows // ROWS, PARTS), jnp.bfloat16)
        return scratch


@dataclasses.dataclass(frozen=True)
class Tile:
    """One output tile: first row and column, group, and its K steps."""

    row: jax.Array
    column: jax.Array
    group: jax.Array | None
    first_step: jax.Array | int
    steps: jax.Array | int


def locate(kernel: Kernel, refs: Any, live: tuple[Any, int], index: tuple[jax.Array, ...]) -> Tile:
    """The tile that an index of `tile_loop` stands for."""
    c = kernel.config
    groups = kernel.product.groups
    group: Any = index[0] if len(index) == 2 else None
    mi, ni = _in_bands(index[-1], live, c.raster[1]) if groups == "rows" else plgpu.planar_snake(index[-1], live, *c.raster)
    row, column = corner(c, mi, ni)
    if groups == "none":
        return Tile(row, column, None, 0, kernel.k_steps)
    if groups == "rows":
        return Tile(row, column, refs["index"][lax.div(row, GROUP)], 0, kernel.k_steps)
    if groups == "masked":
        return Tile(row, column, group, 0, lax.select(row < refs["index"][group], kernel.k_steps, 0))
    if groups == "pieces":
        steps = kernel.k_steps // kernel.n_groups
        return Tile(row, column, group, group * steps, steps)
    steps_of_128 = GROUP // kernel.block_k
    first, end = (refs["index"][g] * steps_of_128 for g in (group, group + 1))
    return Tile(row, column, group, first, end - first)


def _in_bands(index: jax.Array, live: tuple[Any, int], width: int) -> tuple[jax.Array, jax.Array]:
    """The tile of an index, in bands of so many tiles along m, every second one from the other end of n.

    As by `plgpu.planar_snake`, but a last band that is narrower goes row by row: nothing is divided by a number that only the
    device knows, which would take 130 to 200 ns between a tile's last product and its store.
    """
    m_tiles, n_tiles = live
    band, within = lax.div(index, width * n_tiles), lax.rem(index, width * n_tiles)
    whole = (band + 1) * width <= m_tiles
    mi = lax.select(whole, lax.rem(within, width), lax.div(within, n_tiles))
    ni = lax.select(whole, lax.div(within, width), lax.rem(within, n_tiles))
    return band * width + mi, lax.select(lax.rem(band, 2) == 0, ni, n_tiles - 1 - ni)


def output_of(kernel: Kernel, refs: Any, tile: Tile) -> Any:
    """The matrix that a tile is a part of: its group's, if every group has one."""
    return refs["out"].at[tile.group] if kernel.product.per_group else refs["out"]


def corner(config: TuningConfig, mi: jax.Array, ni: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First row and column of a tile; a cluster holds neighbours."""
    if config.cluster == "m":
        mi = mi * config.cluster_size + lax.axis_index("cluster")
    if config.cluster == "n":
        ni = ni * config.cluster_size + lax.axis_index("cluster")
    return mi * config.block_m, ni * config.block_n


def live_tiles(kernel: Kernel, refs: Any) -> tuple[Any, int]:
    """Tiles along m and n that are multiplied: with groups of rows, the index ends with how many 128 rows have an owner."""
    m_tiles: Any
    m_tiles, n_tiles = kernel.tiles
    if kernel.product.groups == "rows":
        rows = refs["index"][kernel.m // GROUP] * GROUP
        m_tiles = lax.div(rows, kernel.config.rows)
    return m_tiles, n_tiles


def tile_loop(kernel: Kernel, live: tuple[Any, int], carry: Any) -> Callable[..., Any]:
    """Over the tiles of a multiprocessor, or cluster, in the same order on both sides: calls a body with an index and what is carried."""
    m_tiles, n_tiles = live
    if kernel.product.groups == "rows":  # where `nd_loop` would divide each index by a number that only the device knows, as in `_in_bands`
        first, together = lax.axis_index("sm"), lax.axis_size("sm")
        rounds = lax.div(m_tiles * n_tiles + together - 1 - first, together)
        return lambda body: lax.fori_loop(0, rounds, lambda i, carry: body((first + i * together,), carry), carry)
    grid = (kernel.n_groups, m_tiles * n_tiles) if kernel.product.per_group else (m_tiles * n_tiles,)
    loop = plgpu.nd_loop(grid, collective_axes="sm", init_carry=carry)
    return lambda body: loop(lambda info, carry: body(info.index, carry))


def next_slot(slot: jax.Array, stages: int) -> jax.Array:
    """Slots are filled, and taken, in turn."""
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)
