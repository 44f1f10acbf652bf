"""One Mosaic GPU kernel for every matrix product of FP8 training on Hopper, and for grouped products in bfloat16.

    out[m, n] = sum over groups g of 128 along k of  a_scale[g, m] * b_scale[g, n] * (A[m, g] . B[n, g])

Both operands are row-major with the contraction last ("K-major"), as 8-bit wgmma demands. Per K step of 128, tensor
cores sum into fresh registers; these are then scaled and added to float32 sums in registers of the CUDA cores
("promotion", V3 sec. 3.3.2, figure 7b). One producer warpgroup keeps TMA copies in flight over `stages` slots of
shared memory, one or more consumer warpgroups multiply, and every SM walks over output tiles (persistent kernel).

What keeps the tensor cores busy while the CUDA cores promote is one of two schemes:
  overlap > 1   each warpgroup issues step k + 1 before it promotes step k, in blocks of `overlap` steps
  overlap == 1  warpgroups take turns by themselves; with 128 rows a warpgroup, as two waves of 64
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm.product import GROUP, LINE, SWIZZLE, WAVE, Product, TuningConfig
from pallas_kernels.memory import tiled

_ALIGNED = 32  # float32 numbers between the places that TMA copies to
_COLUMNS = 32  # whose scales a thread holds at a time in Wgrad
_ROW = plgpu.Layout.WGMMA.reduce(1)
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


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

    none         a [m, k]     a_scales [steps, m]     b [n, k]     b_scales [n / 128, steps] or [steps, n]
    rows         a [m, k]     a_scales [steps, m]     b [e, n, k]  b_scales [e, n / 128, steps]
    masked       a [e, m, k]  a_scales [e, steps, m]  b [e, n, k]  b_scales the same
    contraction  a [m, k]     a_scales [steps, m]     b [n, k]     b_scales [steps, n]
    pieces       the same; every group has as many steps

    Steps of b_scales with blocks come in whole fours, unless they are read ahead.
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

    @property
    def chunk(self) -> int:
        """Columns of a tile that are promoted together: they share a scale of b, or few enough of them fit into registers."""
        return math.gcd(self.config.block_n, {"block": GROUP, "row": _COLUMNS, "none": self.config.block_n}[self.product.scales])

    @property
    def blocks(self) -> int:
        """Most blocks of b that columns of a tile belong to."""
        return (GROUP - self.chunk + self.config.block_n - 1) // GROUP + 1

    @property
    def reads_ahead(self) -> bool:
        return self.product.scales == "block" and self.config.scales_ahead

    @property
    def lines(self) -> int:
        """How many copies bring the scales of b of a step."""
        return {"none": 0, "row": 1, "block": 0 if self.reads_ahead else self.blocks}[self.product.scales]

    def block_of(self, column: jax.Array) -> jax.Array:
        """The block of b that a column belongs to; columns past the end count to the last."""
        return lax.min(lax.div(column, GROUP), pl.cdiv(self.n, GROUP) - 1)

    @property
    def store_columns(self) -> int:
        """Columns stored at once: TMA wants them to divide the output's."""
        return math.gcd(self.config.store_bytes // jnp.dtype(self.product.out).itemsize, self.chunk, self.n)

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
        copies = 1 if self.product.scales == "none" else 2  # of an operand: itself and its scales
        free: dict[str, Any] = dict(num_arrivals=c.warpgroups, num_barriers=c.stages)
        scratch = dict(
            a_slots=tiled(c.stages, *self._slot("a", c.block_m), swizzle=SWIZZLE, dtype=dtype),
            b_slots=tiled(c.stages, *self._slot("b", c.block_n), swizzle=SWIZZLE, dtype=dtype),
            out_slots=tiled(c.warpgroups, c.store_slots, WAVE, self.store_columns, swizzle=swizzle, dtype=out),
            # The first wave also waits for b.
            filled=plgpu.Barrier(num_arrivals=copies + 1 + self.lines, num_barriers=c.stages),
            freed=plgpu.ClusterBarrier(collective_axes=("cluster",), **free) if c.cluster else plgpu.Barrier(**free),
        )
        if c.waves == 2:
            scratch["filled_too"] = plgpu.Barrier(num_arrivals=copies, num_barriers=c.stages)
        if self.product.scales != "none":
            scratch["a_scale_slots"] = plgpu.SMEM((c.stages, c.block_m), jnp.float32)
        if self.lines:
            line = (c.block_n,) if self.product.scales == "row" else (self.blocks, _ALIGNED)
            scratch["b_scale_slots"] = plgpu.SMEM((c.stages, *line), jnp.float32)
        return scratch


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One output tile: first row and column, group, and its K steps."""

    row: jax.Array
    column: jax.Array
    group: jax.Array | None
    first_step: jax.Array | int
    steps: jax.Array | int


def _locate(kernel: _Kernel, refs: Any, index: tuple[jax.Array, ...]) -> _Tile:
    c = kernel.config
    groups = kernel.product.groups
    group: Any = index[0] if len(index) == 2 else None
    mi, ni = plgpu.planar_snake(index[-1], _live_tiles(kernel, refs), *c.raster)
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


def _tile_loop(kernel: _Kernel, refs: Any, carry: Any) -> Any:
    m_tiles, n_tiles = _live_tiles(kernel, refs)
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

    @_tile_loop(kernel, refs, (jnp.int32(0), jnp.int32(0)))
    def loop(info: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tile = _locate(kernel, refs, info.index)

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
    c = kernel.config
    rows_of_wave = c.block_m // c.waves
    axes = "cluster" if c.cluster == "n" else None
    masked = kernel.product.groups == "masked"
    a, scales = (
        (refs[name].at[tile.group] if masked else refs[name] for name in ("a", "a_scales")) if "a_scales" in refs else (refs["a"], None)
    )
    for wave in range(c.waves):
        filled = refs["filled_too" if wave else "filled"].at[slot]
        first = tile.row + wave * rows_of_wave
        here = pl.ds(wave * rows_of_wave, rows_of_wave)
        slots = refs["a_slots"].at[slot] if c.waves == 1 else refs["a_slots"].at[slot, here]
        plgpu.copy_gmem_to_smem(a.at[kernel.window("a", first, rows_of_wave, k)], slots, filled, collective_axes=axes)
        if scales is not None:
            plgpu.copy_gmem_to_smem(scales.at[k, pl.ds(first, rows_of_wave)], refs["a_scale_slots"].at[slot, here], filled)


def _copy_b(kernel: _Kernel, refs: Any, tile: _Tile, k: jax.Array, slot: jax.Array) -> None:
    c = kernel.config
    axes = "cluster" if c.cluster == "m" else None
    b = _of_weights(kernel, refs, "b", tile)
    filled = refs["filled"].at[slot]
    plgpu.copy_gmem_to_smem(b.at[kernel.window("b", tile.column, c.block_n, k)], refs["b_slots"].at[slot], filled, collective_axes=axes)
    if kernel.product.scales == "block":
        scales = _of_weights(kernel, refs, "b_scales", tile)
        for i in range(kernel.lines):
            line = scales.at[kernel.block_of(tile.column + i * GROUP), pl.ds(k & -LINE, LINE)]
            plgpu.copy_gmem_to_smem(line, refs["b_scale_slots"].at[slot, i, pl.ds(0, LINE)], filled)
    if kernel.product.scales == "row":
        plgpu.copy_gmem_to_smem(refs["b_scales"].at[k, pl.ds(tile.column, c.block_n)], refs["b_scale_slots"].at[slot], filled)


def _of_weights(kernel: _Kernel, refs: Any, name: Literal["b", "b_scales"], tile: _Tile) -> Any:
    """What belongs to the tile's expert, if weights have one."""
    return refs[name].at[tile.group] if kernel.product.groups in ("rows", "masked") else refs[name]


# --- consumers ---


def _consume(kernel: _Kernel, refs: Any, warpgroup: jax.Array) -> None:
    @_tile_loop(kernel, refs, jnp.int32(0))
    def _tiles(info: Any, carry: jax.Array) -> jax.Array:
        tile = _locate(kernel, refs, info.index)
        add = _sum_plain if kernel.product.scales == "none" else _sum_scaled
        sums, slot = add(kernel, refs, warpgroup, tile, carry)
        _store(kernel, refs, warpgroup, tile, sums)
        return slot

    if kernel.product.groups == "rows":
        _clear_rest(kernel, refs, warpgroup)
    plgpu.wait_smem_to_gmem(0)


def _clear_rest(kernel: _Kernel, refs: Any, warpgroup: jax.Array) -> None:
    """Zeros where no expert owns the rows."""
    c = kernel.config
    live, n_tiles = _live_tiles(kernel, refs)
    zeros = _zeros(kernel)

    @plgpu.nd_loop(((kernel.tiles[0] - live) * n_tiles,), collective_axes="sm")
    def _tiles(info: Any) -> None:
        mi, ni = lax.div(info.index[0], n_tiles) + live, lax.rem(info.index[0], n_tiles)
        _store(kernel, refs, warpgroup, _Tile(*_corner(c, mi, ni), None, 0, 0), zeros)


def _rows_of(kernel: _Kernel, warpgroup: jax.Array, wave: int) -> jax.Array:
    """First row, within a tile, of a warpgroup's wave: waves come one after the other, so that each has its own copy of A."""
    return wave * kernel.config.warpgroups * WAVE + warpgroup * WAVE


def _multiply(kernel: _Kernel, refs: Any, warpgroup: jax.Array, wave: int, slot: jax.Array, acc: Any) -> None:
    rows = pl.ds(_rows_of(kernel, warpgroup, wave), WAVE)
    a, b = refs["a_slots"], refs["b_slots"].at[slot]
    turned = kernel.turned
    plgpu.wgmma(acc, a.at[slot, :, rows].T if turned["a"] else a.at[slot, rows], b if turned["b"] else b.T)


def _accumulator(kernel: _Kernel) -> Any:
    return plgpu.ACC((WAVE, kernel.config.block_n), jnp.float32)


def _sum_plain(kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile, slot: jax.Array) -> tuple[Any, jax.Array]:
    """Without scales the tensor cores keep the sum; a slot is released one step late, when its product is surely done."""
    stages = kernel.config.stages

    def scope(acc: Any) -> tuple[jax.Array, jax.Array]:
        def step(k: jax.Array, slot: jax.Array) -> jax.Array:
            plgpu.barrier_wait(refs["filled"].at[slot])
            _multiply(kernel, refs, warpgroup, 0, slot, acc)
            plgpu.wgmma_wait(1)
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(refs["freed"].at[_previous(slot, stages)]))
            return _next(slot, stages)

        after = lax.fori_loop(0, tile.steps, step, slot)
        total = acc[...]
        pl.when(jnp.asarray(tile.steps) > 0)(lambda: plgpu.barrier_arrive(refs["freed"].at[_previous(after, stages)]))
        return total, after

    total, slot = pl.run_scoped(scope, _accumulator(kernel))
    return ((total,),), slot


def _previous(slot: jax.Array, stages: int) -> jax.Array:
    return lax.select(slot == 0, jnp.int32(stages - 1), slot - 1)


def _sum_scaled(kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile, slot: jax.Array) -> tuple[Any, jax.Array]:
    """Float32 sums of each wave and chunk of columns, after all K steps of a tile."""
    c = kernel.config

    def block(i: jax.Array, carry: Any) -> Any:
        return _overlapped_block(kernel, refs, warpgroup, tile, i * c.overlap, *carry)

    def single(k: jax.Array, carry: Any) -> Any:
        return _single_step(kernel, refs, warpgroup, tile, k, *carry)

    carry = (slot, _zeros(kernel))
    static = isinstance(tile.steps, int)
    whole: Any = 0
    if c.overlap > 1:
        whole = tile.steps // c.overlap if static else lax.div(tile.steps, c.overlap)
        carry = lax.fori_loop(0, whole, block, carry)
    if c.overlap == 1 or not static or tile.steps % c.overlap:
        carry = lax.fori_loop(whole * c.overlap, tile.steps, single, carry)
    slot, sums = carry
    return sums, slot


def _zeros(kernel: _Kernel) -> Any:
    """Sums of every wave and chunk of a tile."""
    zero = functools.partial(jnp.zeros, (WAVE, kernel.chunk), jnp.float32)
    chunks = range(0, kernel.config.block_n, kernel.chunk)
    return tuple(tuple(plgpu.layout_cast(zero(), plgpu.Layout.WGMMA) for _ in chunks) for _ in range(kernel.config.waves))


def _single_step(
    kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile, k: jax.Array, slot: jax.Array, sums: Any
) -> tuple[jax.Array, Any]:
    c = kernel.config
    ahead = _ahead(kernel, refs, tile, k)
    new: list[Any] = []
    for wave in range(c.waves):
        # A wait opens a basic block, which keeps ptxas from holding the partial sums of both waves at once.
        plgpu.barrier_wait(refs["filled_too" if wave else "filled"].at[slot])
        scales = _scales(kernel, refs, warpgroup, tile, wave, k, slot, ahead)
        release = wave == c.waves - 1

        def scope(acc: Any, wave: int = wave, release: bool = release) -> jax.Array:
            _multiply(kernel, refs, warpgroup, wave, slot, acc)
            if release and kernel.product.scales == "block":
                _end_reads()
            return acc[...]

        partial = pl.run_scoped(scope, _accumulator(kernel))
        new.append(_promote(kernel, refs, slot, partial, scales, sums[wave], release))
    return _next(slot, c.stages), tuple(new)


def _overlapped_block(
    kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile, first: jax.Array, slot: jax.Array, sums: Any
) -> tuple[jax.Array, Any]:
    """`overlap` K steps; the product of step k + 1 is issued before step k is promoted. Scopes nest: two accumulators live at a time."""
    c = kernel.config

    def retire(acc: Any, in_flight: int, slot: jax.Array, scales: Any, sums: Any) -> Any:
        partial = plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)
        return (_promote(kernel, refs, slot, partial, scales, sums[0], release=True),)

    def issue(u: int, slot: jax.Array, sums: Any, before: Any) -> tuple[jax.Array, Any]:
        ahead = _ahead(kernel, refs, tile, first + u)
        plgpu.barrier_wait(refs["filled"].at[slot])
        scales = _scales(kernel, refs, warpgroup, tile, 0, first + u, slot, ahead)

        def scope(acc: Any) -> tuple[jax.Array, Any]:
            _multiply(kernel, refs, warpgroup, 0, slot, acc)
            if kernel.product.scales == "block":
                _end_reads()
            now = sums if before is None else retire(before[0], 1, before[1], before[2], sums)
            if u + 1 == c.overlap:
                return _next(slot, c.stages), retire(acc, 0, slot, scales, now)
            return issue(u + 1, _next(slot, c.stages), now, (acc, slot, scales))

        return pl.run_scoped(scope, _accumulator(kernel))

    return issue(0, slot, sums, None)


def _ahead(kernel: _Kernel, refs: Any, tile: _Tile, k: jax.Array) -> list[jax.Array]:
    """The scale of b for each chunk of the tile's columns, where it is read from global memory ahead of the wait for a slot."""
    if not kernel.reads_ahead:
        return []
    scales, columns = _of_weights(kernel, refs, "b_scales", tile), range(0, kernel.config.block_n, kernel.chunk)
    return [scales[kernel.block_of(tile.column + column), tile.first_step + k] for column in columns]


def _scales(
    kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile, wave: int, k: jax.Array, slot: jax.Array, ahead: list[jax.Array]
) -> list[jax.Array]:
    """For each chunk of columns what rows of a wave's partial sums are multiplied by; scales of single columns come later."""
    rows = pl.ds(_rows_of(kernel, warpgroup, wave), WAVE)
    a_scale = plgpu.load(refs["a_scale_slots"].at[slot, rows], layout=_ROW)
    columns = range(0, kernel.config.block_n, kernel.chunk)
    if kernel.product.scales == "row":
        return [a_scale for _ in columns]
    if ahead:
        return [a_scale * b_scale for b_scale in ahead]
    first = kernel.block_of(tile.column)
    blocks = [kernel.block_of(tile.column + column) - first if kernel.blocks > 1 else 0 for column in columns]
    return [a_scale * refs["b_scale_slots"][slot, block, (tile.first_step + k) & (LINE - 1)] for block in blocks]


def _end_reads() -> None:
    """Orders reads of scales before the TMA copy that will overwrite them: it writes through another proxy.

    It waits for every access to memory that a thread has under way, so it runs while the tensor cores are busy.
    """
    plgpu.commit_smem()


def _promote(kernel: _Kernel, refs: Any, slot: jax.Array, partial: jax.Array, scales: list[jax.Array], sums: Any, release: bool) -> Any:
    """Adds the scaled partial sums; gives the slot back as soon as nothing is needed of it."""
    width = kernel.chunk
    columns_too = kernel.product.scales == "row"
    if release and not columns_too:
        plgpu.barrier_arrive(refs["freed"].at[slot])
    new = []
    for i, (total, scale) in enumerate(zip(sums, scales, strict=True)):
        part = partial[:, i * width : (i + 1) * width] if len(sums) > 1 else partial
        if columns_too:
            of_columns = plgpu.load(refs["b_scale_slots"].at[slot, pl.ds(i * width, width)], layout=_COLUMN)
            part = part * lax.broadcast_in_dim(of_columns, part.shape, (1,))
        new.append(total + part * lax.broadcast_in_dim(scale, part.shape, (0,)))
    if release and columns_too:
        _end_reads()
        plgpu.barrier_arrive(refs["freed"].at[slot])
    return tuple(new)


def _store(kernel: _Kernel, refs: Any, warpgroup: jax.Array, tile: _Tile, sums: Any) -> None:
    """Registers to a slot of shared memory to the output, or added to it; TMA clips what lies outside of it."""
    c = kernel.config
    width = kernel.store_columns
    out = refs["out"].at[tile.group] if len(kernel.out_shape) == 3 else refs["out"]
    offsets = range(0, kernel.chunk, width)
    pieces = [
        (wave, i * kernel.chunk + at, total[:, at : at + width])
        for wave, chunks in enumerate(sums)
        for i, total in enumerate(chunks)
        for at in offsets
    ]
    for number, (wave, column, piece) in enumerate(pieces):
        slot = refs["out_slots"].at[warpgroup, number % c.store_slots]
        plgpu.wait_smem_to_gmem(c.store_slots - 1, wait_read_only=True)
        slot[...] = piece.astype(kernel.product.out)
        plgpu.commit_smem()
        rows = pl.ds(tile.row + _rows_of(kernel, warpgroup, wave), WAVE)
        window = out.at[rows, pl.ds(tile.column + column, width)]
        plgpu.copy_smem_to_gmem(slot, window, reduction_op="add" if kernel.adds else None)
