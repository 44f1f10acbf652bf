"""One Mosaic GPU kernel for every matrix product of FP8 training on Hopper, and for grouped products in bfloat16.

    out[m, n] = sum over groups g of 128 along k of  a_scale[g, m] * b_scale[g, n] * (A[m, g] . B[n, g])

Both operands are row-major with the contraction last ("K-major"), as 8-bit wgmma demands. Per K step of 128, tensor
cores sum into fresh registers; these are then scaled and added to float32 sums in registers of the CUDA cores
("promotion", V3 sec. 3.3.2, figure 7b). One producer warpgroup keeps TMA copies in flight over `stages` slots of
shared memory, one or more consumer warpgroups multiply, and every SM walks over output tiles (persistent kernel).

What keeps the tensor cores busy while the CUDA cores promote is one of two schemes, with several K steps written out:
  in turn      each warpgroup promotes when its product is done; meanwhile the tensor cores work for another one
  overlapped   it issues step k + 1 before it promotes step k
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import wgmma
from pallas_kernels.gemm.product import GROUP, LINE, SWIZZLE, WAVE, Product, TuningConfig
from pallas_kernels.memory import tiled
from pallas_kernels.parts import PARTS, ROWS

_ALIGNED = 32  # float32 numbers between the places that TMA copies to
_ROW = plgpu.Layout.WGMMA.reduce(1)


# Jitted, so that it is traced once for each shape: kernels that differ in source locations alone would all be compiled.
@functools.partial(jax.jit, static_argnames=("product", "config", "n_groups", "sm_count", "interpret"))
def multiply(
    product: Product,
    config: TuningConfig,
    a: jax.Array,
    a_scales: jax.Array | None,
    b: jax.Array,
    b_scales: jax.Array | None,
    index: jax.Array | None = None,
    addend: jax.Array | None = None,
    *,
    n_groups: int = 1,
    sm_count: int,
    interpret: Any = None,
) -> jax.Array:
    """Runs the kernel. Shapes by `product.groups`, with steps = ceil(k / 128):

    none         a [m, k]     a_scales [steps, m]     b [n, k]     b_scales [n / 128, steps]
    rows         a [m, k]     a_scales [steps, m]     b [e, n, k]  b_scales [e, n / 128, steps]
    masked       a [e, m, k]  a_scales [e, steps, m]  b [e, n, k]  b_scales the same
    contraction  a [m, k]     a_scales [steps, m]     b [n, k]     b_scales [steps, n]
    pieces       the same; every group has as many steps

    Steps of b_scales with blocks come in whole fours. Scales of single rows on both sides, as in the last two and in Wgrad
    without groups, come `in_parts`: [steps, m / 8, 64] and [steps, n / 8, 64].
    `index` of rows: the expert of each 128 rows, then how many of these have one (zeros follow); of masked: the rows in
    use of each expert; of contraction [e + 1]: the first 128 of k of each expert. In bfloat16 there are no scales,
    operands of "contraction" are [k, m] and [k, n], and b of rows may be [e, k, n]. The product is added to `addend`, of
    its shape and type, in place; XLA copies an addend that is used elsewhere.
    """
    kernel = _Kernel(product, config, a.shape, b.shape, n_groups, jnp.dtype(a.dtype).itemsize, addend is not None)
    if addend is not None and (addend.shape, addend.dtype) != (kernel.out_shape, product.out):
        raise ValueError(f"addend: {addend.dtype}{list(addend.shape)}: has to be {product.out}{list(kernel.out_shape)}, as the output")
    operands = {name: x for name, x in zip(_OPERANDS, (a, a_scales, b, b_scales, index), strict=True) if x is not None}
    clusters: dict[str, Any] = dict(cluster=(config.cluster_size,), cluster_names=("cluster",)) if config.cluster else {}
    run = plgpu.kernel(
        functools.partial(_body, kernel, list(operands)),
        out_type=jax.ShapeDtypeStruct(kernel.out_shape, product.out) if addend is None else (),
        scratch_types=kernel.scratch(a.dtype),
        grid=(config.clusters(sm_count),),
        grid_names=("sm",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        # Stores to shared memory are fenced by hand, in `_store`.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name=f"{'bf16' if product.scales == 'none' else 'fp8'}_product_{product.groups}",
        **clusters,
    )
    if addend is None:
        return run(*operands.values())
    out = jax.new_ref(addend)
    run(*operands.values(), out)
    return jax.freeze(out)


_OPERANDS = ("a", "a_scales", "b", "b_scales", "index")


@dataclasses.dataclass(frozen=True)
class _Kernel:
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
        return pl.cdiv(self.a_shape[0 if self.turned["a"] else -1], self.block_k)

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
class _Tile:
    """One output tile: first row and column, group, and its K steps."""

    row: jax.Array
    column: jax.Array
    group: jax.Array | None
    first_step: jax.Array | int
    steps: jax.Array | int


def _locate(kernel: _Kernel, refs: Any, live: tuple[Any, int], index: tuple[jax.Array, ...]) -> _Tile:
    c = kernel.config
    groups = kernel.product.groups
    group: Any = index[0] if len(index) == 2 else None
    mi, ni = plgpu.planar_snake(index[-1], live, *c.raster)
    row, column = _corner(c, mi, ni)
    if groups == "none":
        return _Tile(row, column, None, 0, kernel.k_steps)
    if groups == "rows":
        return _Tile(row, column, refs["index"][lax.div(row, GROUP)], 0, kernel.k_steps)
    if groups == "masked":
        return _Tile(row, column, group, 0, lax.select(row < refs["index"][group], kernel.k_steps, 0))
    if groups == "pieces":
        steps = kernel.k_steps // kernel.n_groups
        return _Tile(row, column, group, group * steps, steps)
    steps_of_128 = GROUP // kernel.block_k
    first, end = (refs["index"][g] * steps_of_128 for g in (group, group + 1))
    return _Tile(row, column, group, first, end - first)


def _corner(config: TuningConfig, mi: jax.Array, ni: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First row and column of a tile; a cluster holds neighbours."""
    if config.cluster == "m":
        mi = mi * config.cluster_size + lax.axis_index("cluster")
    if config.cluster == "n":
        ni = ni * config.cluster_size + lax.axis_index("cluster")
    return mi * config.block_m, ni * config.block_n


def _live_tiles(kernel: _Kernel, refs: Any) -> tuple[Any, int]:
    """Tiles along m and n that are multiplied: with groups of rows, the index ends with how many 128 rows have an owner."""
    m_tiles: Any
    m_tiles, n_tiles = kernel.tiles
    if kernel.product.groups == "rows":
        rows = refs["index"][kernel.m // GROUP] * GROUP
        m_tiles = lax.div(rows, kernel.config.rows)
    return m_tiles, n_tiles


def _tile_loop(kernel: _Kernel, live: tuple[Any, int], carry: Any) -> Any:
    m_tiles, n_tiles = live
    grid = (kernel.n_groups, m_tiles * n_tiles) if kernel.product.per_group else (m_tiles * n_tiles,)
    return plgpu.nd_loop(grid, collective_axes="sm", init_carry=carry)


def _body(kernel: _Kernel, names: list[str], *operands: Any, **scratch: Any) -> None:
    refs = dict(zip([*names, "out"], operands, strict=True), **scratch)
    warpgroup = lax.axis_index("warpgroup")
    consumers = kernel.config.warpgroups

    @pl.when(warpgroup == consumers)
    def _producer() -> None:
        plgpu.set_max_registers(32 if consumers == 3 else 24, action="decrease")

        @plgpu.warp_map
        def _warps(warp: jax.Array) -> None:
            pl.when(warp == 0)(lambda: _produce(kernel, refs, "a"))
            pl.when(warp == 1)(lambda: _produce(kernel, refs, "b"))

    @pl.when(warpgroup < consumers)
    def _consumer() -> None:
        plgpu.set_max_registers({1: 240, 2: 240, 3: 160}[consumers], action="increase")
        _consume(kernel, refs, warpgroup)


def _next(slot: jax.Array, stages: int) -> jax.Array:
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


# --- producer ---


def _produce(kernel: _Kernel, refs: Any, side: Literal["a", "b"]) -> None:
    """One warp: all copies of one operand, as slots become free."""
    stages = kernel.config.stages
    copy = _copy_a if side == "a" else _copy_b

    live = _live_tiles(kernel, refs)

    @_tile_loop(kernel, live, (jnp.int32(0), jnp.int32(0)))
    def loop(info: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile = _locate(kernel, refs, live, info.index)

        def step(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            slot, filled = carry
            pl.when(filled >= stages)(lambda: plgpu.barrier_wait(refs["freed"].at[slot]))
            copy(kernel, refs, tile, tile.first_step + k, slot)
            return _next(slot, stages), filled + 1

        return lax.fori_loop(0, tile.steps, step, carry)

    # Every release is waited for: a peer in the cluster may still signal, and no barrier may die unobserved.
    slot, filled = loop
    oldest = lax.select(filled >= stages, slot, jnp.int32(0))

    def drain(_: jax.Array, slot: jax.Array) -> jax.Array:
        plgpu.barrier_wait(refs["freed"].at[slot])
        return _next(slot, stages)

    lax.fori_loop(0, lax.min(filled, jnp.int32(stages)), drain, oldest)


def _copy_a(kernel: _Kernel, refs: Any, tile: _Tile, k: jax.Array, slot: jax.Array) -> None:
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


def _copy_b(kernel: _Kernel, refs: Any, tile: _Tile, k: jax.Array, slot: jax.Array) -> None:
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


def _of_weights(kernel: _Kernel, refs: Any, name: Literal["b", "b_scales"], tile: _Tile) -> Any:
    """What belongs to the tile's expert, if weights have one."""
    return refs[name].at[tile.group] if kernel.product.groups in ("rows", "masked") else refs[name]


# --- consumers ---


def _consume(kernel: _Kernel, refs: Any, warpgroup: jax.Array) -> None:
    live = _live_tiles(kernel, refs)

    @_tile_loop(kernel, live, jnp.int32(0))
    def _tiles(info: Any, carry: jax.Array) -> jax.Array:
        tile = _locate(kernel, refs, live, info.index)
        add = _sum_plain if kernel.product.scales == "none" else _sum_scaled
        sums, slot = add(kernel, refs, warpgroup, tile, carry)
        _store(kernel, refs, warpgroup, tile, sums)
        return slot

    if kernel.product.groups == "rows":
        _clear_rest(kernel, refs, warpgroup, live)
    plgpu.wait_smem_to_gmem(0)


def _clear_rest(kernel: _Kernel, refs: Any, warpgroup: jax.Array, live: tuple[Any, int]) -> None:
    """Zeros where no expert owns the rows."""
    c = kernel.config
    m_tiles, n_tiles = live
    zeros = _zeros(kernel)

    @plgpu.nd_loop(((kernel.tiles[0] - m_tiles) * n_tiles,), collective_axes="sm")
    def _tiles(info: Any) -> None:
        mi, ni = lax.div(info.index[0], n_tiles) + m_tiles, lax.rem(info.index[0], n_tiles)
        _store(kernel, refs, warpgroup, _Tile(*_corner(c, mi, ni), None, 0, 0), zeros)


def _rows_of(kernel: _Kernel, warpgroup: jax.Array, wave: int) -> jax.Array:
    """First row, within a tile, of a warpgroup's wave."""
    return (warpgroup * kernel.config.waves + wave) * WAVE


def _sum_plain(kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile, slot: jax.Array) -> tuple[Any, jax.Array]:
    """Without scales the tensor cores keep the sum; a slot is released one step late, when its product is surely done."""
    stages = kernel.config.stages
    rows = pl.ds(_rows_of(kernel, warpgroup, 0), WAVE)
    a, b, turned = refs["a_slots"], refs["b_slots"], kernel.turned

    def scope(acc: Any) -> tuple[jax.Array, jax.Array]:
        def step(k: jax.Array, slot: jax.Array) -> jax.Array:
            plgpu.barrier_wait(refs["filled"].at[slot])
            left, right = a.at[slot, :, rows].T if turned["a"] else a.at[slot, rows], b.at[slot]
            plgpu.wgmma(acc, left, right if turned["b"] else right.T)
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(refs["freed"].at[_previous(slot, stages)]))
            return _next(slot, stages)

        after = lax.fori_loop(0, tile.steps, step, slot)
        total = acc[...]
        pl.when(jnp.asarray(tile.steps) > 0)(lambda: plgpu.barrier_arrive(refs["freed"].at[_previous(after, stages)]))
        return total, after

    total, slot = pl.run_scoped(scope, plgpu.ACC((WAVE, kernel.config.block_n), jnp.float32))
    return (total,), slot


def _previous(slot: jax.Array, stages: int) -> jax.Array:
    return lax.select(slot == 0, jnp.int32(stages - 1), slot - 1)


def _sum_scaled(kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile, slot: jax.Array) -> tuple[Any, jax.Array]:
    """Float32 sums of each wave, after all K steps of a tile, which are taken a few at a time."""
    c = kernel.config
    scheme: Callable[..., Any] = _scaled_by_tensor_cores if kernel.product.scales == "row" else _overlapped if c.overlap else _in_turn
    consumer = _Consumer(kernel, refs, warpgroup, tile)
    block = functools.partial(scheme, consumer)
    spent = wgmma.registers(c.block_n)
    carry = (slot, _zeros(kernel), spent if scheme is _in_turn else (spent, spent))
    static = isinstance(tile.steps, int)
    whole: Any = tile.steps // c.steps if static else lax.div(tile.steps, c.steps)
    if not static or whole:
        carry = lax.fori_loop(0, whole, lambda i, carry: block(i * c.steps, c.steps, carry), carry)
    if not static:
        carry = lax.fori_loop(whole * c.steps, tile.steps, lambda k, carry: block(k, 1, carry), carry)
    elif tile.steps % c.steps:
        carry = block(whole * c.steps, tile.steps % c.steps, carry)
    slot, sums, _ = carry
    return sums, slot


def _zeros(kernel: _Kernel) -> Any:
    """Sums of every wave of a tile."""
    zero = jnp.zeros((WAVE, kernel.config.block_n), jnp.float32)
    return tuple(plgpu.layout_cast(zero, plgpu.Layout.WGMMA) for _ in range(kernel.config.waves))


class _Consumer:
    """What a warpgroup takes the K steps of a tile from."""

    def __init__(self, kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile) -> None:
        self.kernel, self.refs, self.tile = kernel, refs, tile
        self.rows = [_rows_of(kernel, warpgroup, wave) for wave in range(kernel.config.waves)]
        self.a = [self._operand("a_slots", first, WAVE) for first in self.rows]
        self.b = self._operand("b_slots", 0, kernel.config.block_n)
        if kernel.product.scales == "row":
            self.a_parts = self._operand("a_scale_slots", lax.div(self.rows[0], ROWS), WAVE // ROWS)
            self.b_parts = self._operand("b_scale_slots", 0, kernel.config.block_n // ROWS)

    def _operand(self, name: str, first: Any, size: int) -> Callable[[jax.Array], wgmma.Operand]:
        """Rows of each slot, by its number. The address of the first slot is known once and for all."""
        slots, rows = self.refs[name], pl.ds(first, size)
        address = wgmma.address(slots.at[0, rows], tiled=name in ("a_slots", "b_slots"))
        stride = math.prod(slots.shape[1:]) * jnp.dtype(slots.dtype).itemsize // wgmma.UNIT
        return lambda slot: wgmma.Operand(slots.at[slot, rows], address + slot * stride)

    def next(self, slot: jax.Array) -> jax.Array:
        return _next(slot, self.kernel.config.stages)

    def wait(self, slot: jax.Array) -> None:
        plgpu.barrier_wait(self.refs["filled"].at[slot])

    def release(self, slot: jax.Array) -> None:
        plgpu.barrier_arrive(self.refs["freed"].at[slot])

    def scales(self, wave: int, k: jax.Array | int, slot: jax.Array) -> jax.Array:
        """What rows of a wave's partial sums are multiplied by, where b's scale is one for all columns."""
        of_rows = plgpu.load(self.refs["a_scale_slots"].at[slot, pl.ds(self.rows[wave], WAVE)], layout=_ROW)
        return of_rows * self.refs["b_scale_slots"][slot, (self.tile.first_step + k) & (LINE - 1)]


def _in_turn(consumer: _Consumer, first: jax.Array | int, steps: int, carry: Any) -> Any:
    """A product, its promotion, the next product.

    A fence orders reads of scales before the TMA copy that will overwrite them: it writes through another proxy. The fence waits
    for every access to memory that a thread has under way, so it runs while the tensor cores are busy.
    """
    slot, sums, spent = carry
    for u in range(steps):
        new = []
        a, b = [a(slot) for a in consumer.a], consumer.b(slot)
        consumer.wait(slot)
        for wave, total in enumerate(sums):
            last = wave == len(sums) - 1
            scales = consumer.scales(wave, first + u, slot)
            spent = wgmma.multiply(a[wave], b, spent, ends_reads=last)
            if last:
                consumer.release(slot)
            new.append(_promote(total, spent, scales))
        slot, sums = consumer.next(slot), tuple(new)
    return slot, sums, spent


def _overlapped(consumer: _Consumer, first: jax.Array | int, steps: int, carry: Any) -> Any:
    """The product of step k + 1 is issued before step k is promoted. After a tile's last step of a block nothing is under way."""
    slot, (total,), (spent, spare) = carry

    def issue(u: int, slot: jax.Array, spent: jax.Array) -> tuple[jax.Array, jax.Array]:
        a, b = consumer.a[0](slot), consumer.b(slot)
        consumer.wait(slot)
        scales = consumer.scales(0, first + u, slot)
        running = wgmma.start(a, b, spent)
        plgpu.commit_smem()  # see `_in_turn`
        return running, scales

    running, scales = issue(0, slot, spent)
    for u in range(1, steps):
        after = consumer.next(slot)
        following = issue(u, after, spare)
        spare = wgmma.finish(running, in_flight=1)
        consumer.release(slot)
        total = _promote(total, spare, scales)
        (running, scales), slot = following, after
    spent = wgmma.finish(running)
    consumer.release(slot)
    return consumer.next(slot), (_promote(total, spent, scales),), (spent, spare)


def _scaled_by_tensor_cores(consumer: _Consumer, first: jax.Array | int, steps: int, carry: Any) -> Any:
    """As `_in_turn`, for scales of single rows on both sides, whose products the tensor cores make."""
    del first
    slot, (total,), spent = carry
    for _ in range(steps):
        a, b, a_parts, b_parts = (at(slot) for at in (consumer.a[0], consumer.b, consumer.a_parts, consumer.b_parts))
        consumer.wait(slot)
        spent = wgmma.multiply_scaled(a, b, a_parts, b_parts, spent)
        consumer.release(slot)
        total = total + spent[0] * spent[1]
        slot = consumer.next(slot)
    return slot, (total,), spent


def _promote(total: jax.Array, partial: jax.Array, scales: jax.Array) -> jax.Array:
    return total + partial * lax.broadcast_in_dim(scales, partial.shape, (0,))


def _store(kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile, sums: Any) -> None:
    """Registers to a slot of shared memory to the output, or added to it; TMA clips what lies outside of it."""
    c = kernel.config
    width = kernel.store_columns
    out = refs["out"].at[tile.group] if len(kernel.out_shape) == 3 else refs["out"]
    pieces = [(wave, at, total[:, at : at + width]) for wave, total in enumerate(sums) for at in range(0, c.block_n, width)]
    for first in range(0, len(pieces), c.store_slots):
        together = list(enumerate(pieces[first : first + c.store_slots]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for slot, (_, _, piece) in together:
            refs["out_slots"][warpgroup, slot] = piece.astype(kernel.product.out)
        plgpu.commit_smem()
        for slot, (wave, column, _) in together:
            rows = pl.ds(tile.row + _rows_of(kernel, warpgroup, wave), WAVE)
            window = out.at[rows, pl.ds(tile.column + column, width)]
            plgpu.copy_smem_to_gmem(refs["out_slots"].at[warpgroup, slot], window, reduction_op="add" if kernel.adds else None)
