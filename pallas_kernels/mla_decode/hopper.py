"""Absorbed MLA decoding on Hopper GPUs (Mosaic GPU): attention of a few queries a sequence over its pages, each read once.

A block of threads takes 64 rows of queries (tokens x heads) of one sequence and one stretch of its positions. Four
warpgroups share the work, since 64 x 512 sums in float32 fill half of the registers of a multiprocessor:

    producer      one warp: TMA copies of `block` positions at a time, through the page table, into `stages` slots
    scores        S = Q [c_kv ; k_r]^T, online softmax; leaves P (bfloat16) and the factor for older sums in shared memory
    two of sums   O = O * factor + P c_kv, each for half of the columns of c_kv

so the softmax of one block runs under the products of the one before. Keys and values are the same slot. Positions past
the length are masked before the softmax; their values are set to zero, because they may be NaN and 0 x NaN is not 0.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import memory
from pallas_kernels.mla_decode.sizes import TILE, Sizes, TuningConfig

Array = jax.Array

_ROW = plgpu.Layout.WGMMA.reduce(1)
_LINE = plgpu.Layout.TCGEN05_TMEM_NATIVE  # a thread has a line of its own
_SCORES, _PRODUCER = 0, 3  # warpgroups; the others add up values
_LOWEST = -1e30  # stands for the maximum of nothing: finite, so that differences are


# Jitted, so that it is traced once for each shape: kernels that differ in source locations alone would all be compiled.
@functools.partial(jax.jit, static_argnames=("sizes", "config", "interpret"))
def attend(
    sizes: Sizes,
    config: TuningConfig,
    q: Array,
    c_kv: Array,
    k_r: Array,
    table: Array,
    lengths: Array,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """Attention over each stretch of each sequence, and log2 of its sum of exponentials.

    q [rows, tokens * heads, rank + rope], c_kv [pages * page, rank], k_r [pages * page, rope], all bfloat16. Returns
    [splits, rows, m, rank], in bfloat16 if there is one stretch and float32 otherwise, and [splits, rows, m] in float32,
    with m = 64 * tiles; rows past tokens * heads are unspecified.
    """
    if sizes.page % config.block:
        raise NotImplementedError(f"pages of {sizes.page}: a block of {config.block} positions lies in one page; take a narrower one")
    paired = _paired(sizes, config)
    clusters: dict[str, Any] = dict(cluster=(2,), cluster_names=("pair",)) if paired else {}
    rows, out = len(lengths), jnp.bfloat16 if sizes.splits == 1 else jnp.float32
    shape = (sizes.splits, rows, sizes.tiles * TILE)
    return plgpu.kernel(
        functools.partial(_body, sizes, config),
        out_type=(jax.ShapeDtypeStruct((*shape, sizes.rank), out), jax.ShapeDtypeStruct(shape, jnp.float32)),
        scratch_types=_scratch(sizes, config),
        grid=(rows * sizes.splits * sizes.tiles // (2 if paired else 1),),
        grid_names=("unit",),
        num_threads=4,
        thread_name="warpgroup",
        # Stores to shared memory are fenced by hand.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, approx_math=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="mla_decode",
        **clusters,
    )(q, c_kv, k_r, table, lengths)


def _scratch(sizes: Sizes, config: TuningConfig) -> dict[str, Any]:
    slots, waiting = config.stages, config.score_slots
    tiled = functools.partial(memory.tiled, swizzle=_swizzle(config))
    free: dict[str, Any] = dict(num_arrivals=2, num_barriers=slots)
    return dict(
        q_slots=tiled(2, TILE, sizes.half),
        q_rope_slot=tiled(TILE, sizes.rope),
        c_slots=tiled(slots, 2, config.block, sizes.half),
        r_slots=tiled(slots, config.block, sizes.rope),
        p_slots=tiled(waiting, TILE, config.block),
        # A factor for each block of P, then what sums are divided by, and the output: one buffer, since each takes 1 KB.
        lines=plgpu.SMEM((waiting + 2, TILE), jnp.float32),
        asked=plgpu.Barrier(num_arrivals=3),
        filled=plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        freed=plgpu.ClusterBarrier(collective_axes=("pair",), **free) if _paired(sizes, config) else plgpu.Barrier(**free),
        scored=plgpu.Barrier(num_barriers=waiting),
        taken=plgpu.Barrier(num_arrivals=2, num_barriers=waiting),
        finished=plgpu.Barrier(),
    )


def _paired(sizes: Sizes, config: TuningConfig) -> bool:
    return config.pairs and sizes.tiles % 2 == 0


def _swizzle(config: TuningConfig) -> int:
    """Bytes: P and values meet along the positions of a block, which have to be whole rows of a swizzled tile."""
    return config.block * 2


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What a block of threads does: which rows of which sequence, over which of its blocks of positions."""

    row: Array
    split: Array
    first_query: Array  # in the sequence's tokens * heads
    length: Array
    first: Array  # block of positions
    blocks: Array


def _locate(sizes: Sizes, config: TuningConfig, lengths: Any) -> _Unit:
    """Tiles of one stretch are neighbours, so that all but the first find its positions in L2."""
    unit = lax.axis_index("unit")
    if _paired(sizes, config):
        unit = unit * 2 + lax.axis_index("pair")
    stretch, tile = lax.div(unit, sizes.tiles), lax.rem(unit, sizes.tiles)
    row, split = lax.div(stretch, sizes.splits), lax.rem(stretch, sizes.splits)
    length = lengths[row]
    blocks = lax.div(length + config.block - 1, config.block)
    each = lax.div(blocks + sizes.splits - 1, sizes.splits)
    first = split * each
    return _Unit(row, split, tile * TILE, length, first, lax.clamp(jnp.int32(0), blocks - first, each))


def _body(
    sizes: Sizes, config: TuningConfig, q: Any, c_kv: Any, k_r: Any, table: Any, lengths: Any, out: Any, sums: Any, **scratch: Any
) -> None:
    refs = dict(q=q, c_kv=c_kv, k_r=k_r, table=table, out=out, sums=sums, **scratch)
    unit = _locate(sizes, config, lengths)
    warpgroup = lax.axis_index("warpgroup")
    of_scores, of_sums, of_producer = config.registers

    @pl.when(warpgroup == _SCORES)
    def _scores() -> None:
        plgpu.set_max_registers(of_scores, action="increase")
        _score(sizes, config, refs, unit)

    @pl.when((warpgroup != _SCORES) & (warpgroup != _PRODUCER))
    def _sums() -> None:
        plgpu.set_max_registers(of_sums, action="increase")
        _sum(sizes, config, refs, unit, warpgroup - 1)

    @pl.when(warpgroup == _PRODUCER)
    def _producer() -> None:
        plgpu.set_max_registers(of_producer, action="decrease")

        @plgpu.warp_map
        def _warps(warp: Array) -> None:
            pl.when(warp == 0)(lambda: _produce(sizes, config, refs, unit))


def _produce(sizes: Sizes, config: TuningConfig, refs: Any, unit: _Unit) -> None:
    """All copies: the queries, then blocks of positions as slots become free."""
    queries, half = pl.ds(unit.first_query, TILE), sizes.half
    axes = "pair" if _paired(sizes, config) else None
    for i in range(2):
        plgpu.copy_gmem_to_smem(refs["q"].at[unit.row, queries, pl.ds(i * half, half)], refs["q_slots"].at[i], refs["asked"])
    plgpu.copy_gmem_to_smem(refs["q"].at[unit.row, queries, pl.ds(sizes.rank, sizes.rope)], refs["q_rope_slot"], refs["asked"])

    last = lax.max(unit.first + unit.blocks - 1, jnp.int32(0))

    def page_of(i: Array) -> Array:
        block = lax.min(unit.first + i, last)
        return refs["table"][unit.row, lax.div(block * config.block, sizes.page)]

    def step(i: Array, page: Array) -> Array:
        # Read one block ahead, so that its latency is hidden.
        position, following = (unit.first + i) * config.block, page_of(i + 1)
        slot = lax.rem(i, config.stages)
        here = pl.ds(page * sizes.page + lax.rem(position, sizes.page), config.block)
        pl.when(i >= config.stages)(lambda: plgpu.barrier_wait(refs["freed"].at[slot]))
        load = functools.partial(plgpu.copy_gmem_to_smem, barrier=refs["filled"].at[slot], collective_axes=axes)
        for half_index in range(2):
            columns = pl.ds(half_index * half, half)
            load(refs["c_kv"].at[here, columns], refs["c_slots"].at[slot, half_index])
        load(refs["k_r"].at[here], refs["r_slots"].at[slot])
        return following

    lax.fori_loop(0, unit.blocks, step, page_of(jnp.int32(0)))
    _drain(refs["freed"], unit.blocks, config.stages)


def _drain(barriers: Any, uses: Array, number: int) -> None:
    """Waits for the last use of each of a ring of barriers: none may die unobserved."""

    def wait(i: Array, _: None) -> None:
        plgpu.barrier_wait(barriers.at[lax.rem(i, number)])

    lax.fori_loop(lax.max(uses - number, jnp.int32(0)), uses, wait, None)


def _score(sizes: Sizes, config: TuningConfig, refs: Any, unit: _Unit) -> None:
    """The warpgroup of scores: P and factors of every block, at the end what the sums are divided by."""
    plgpu.barrier_wait(refs["asked"])
    softmax = functools.partial(_softmax, sizes, config, refs)

    def single(i: Array, carry: _Running) -> _Running:
        def alone(acc: Any) -> _Running:
            scores, known = acc[...], unit.length - (unit.first + i) * config.block
            scores = jnp.where(_visible(sizes, config, unit, i), scores, -jnp.inf)
            pl.when(known < config.block)(lambda: _clear(refs["c_slots"].at[lax.rem(i, config.stages)], known))
            return softmax(i, scores, carry)

        return _with_products(config, refs, i, alone)

    def pair(half: Array, carry: _Running) -> _Running:
        i = half * 2

        def both(first: Any, second: Any) -> _Running:
            now = softmax(i, plgpu.wgmma_accumulator_load(first, wait_n=_GROUPS), carry)
            return softmax(i + 1, plgpu.wgmma_accumulator_load(second, wait_n=0), now)

        return _with_products(config, refs, i, lambda first: _with_products(config, refs, i + 1, lambda second: both(first, second)))

    def constant(x: float) -> Array:
        return plgpu.layout_cast(jnp.full((TILE,), x, jnp.float32), _ROW)

    # Blocks that not all queries see, or not all of, are done alone: they are masked.
    seen_by_all = lax.max(unit.length - sizes.tokens + 1, jnp.int32(0))
    whole = lax.clamp(jnp.int32(0), lax.div(seen_by_all, config.block) - unit.first, unit.blocks)
    pairs = lax.div(whole, 2)
    carry = lax.fori_loop(0, pairs, pair, (constant(_LOWEST), constant(0.0)))
    _finish(config, refs, unit, *lax.fori_loop(pairs * 2, unit.blocks, single, carry))


_Running = tuple[Array, Array]  # the largest score so far, scaled, and the sum of exponentials below it
_GROUPS = 3  # wgmma groups of the products of a block


def _with_products(config: TuningConfig, refs: Any, i: Array, use: Callable[[Any], _Running]) -> _Running:
    """Issues the products of a block; `use` gets their accumulator, to wait for."""
    slot = lax.rem(i, config.stages)
    plgpu.barrier_wait(refs["filled"].at[slot])

    def scope(acc: Any) -> _Running:
        for half in range(2):
            plgpu.wgmma(acc, refs["q_slots"].at[half], refs["c_slots"].at[slot, half].T)
        plgpu.wgmma(acc, refs["q_rope_slot"], refs["r_slots"].at[slot].T)
        return use(acc)

    return pl.run_scoped(scope, plgpu.ACC((TILE, config.block), jnp.float32))


def _softmax(sizes: Sizes, config: TuningConfig, refs: Any, i: Array, scores: Array, carry: _Running) -> _Running:
    """Hands over P and the factor of a block."""
    largest, total = carry
    scale = sizes.scale * math.log2(math.e)  # powers of two are the instruction that there is
    new = jnp.maximum(largest, scores.max(axis=1) * scale)
    p, factor = jnp.exp2(scores * scale - lax.broadcast_in_dim(new, scores.shape, (0,))), jnp.exp2(largest - new)
    _hand_over(config, refs, i, p, factor)
    return new, total * factor + p.sum(axis=1)


def _finish(config: TuningConfig, refs: Any, unit: _Unit, largest: Array, total: Array) -> None:
    """What the sums are divided by, for the warpgroups of sums and for the merge."""
    _drain(refs["taken"], unit.blocks, config.score_slots)
    refs["lines"][config.score_slots] = 1.0 / jnp.maximum(total, jnp.float32(2.0**-126))
    refs["lines"][config.score_slots + 1] = largest + jnp.log(total) * math.log2(math.e)
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs["finished"])
    plgpu.copy_smem_to_gmem(refs["lines"].at[config.score_slots + 1], refs["sums"].at[unit.split, unit.row, pl.ds(unit.first_query, TILE)])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _visible(sizes: Sizes, config: TuningConfig, unit: _Unit, i: Array) -> Array:
    """Which positions of a block the query of each row may see: the last token sees all, the one before it one less."""
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, (TILE, config.block), layout=plgpu.Layout.WGMMA)
    row, position = iota(0) + unit.first_query, iota(1) + (unit.first + i) * config.block
    limit = jnp.zeros_like(row) + (unit.length - sizes.tokens + 1)
    for token in range(1, sizes.tokens):
        limit += jnp.where(row >= token * sizes.heads, 1, 0)
    return position < limit


def _hand_over(config: TuningConfig, refs: Any, i: Array, p: Array, factor: Array) -> None:
    slot = lax.rem(i, config.score_slots)
    pl.when(i >= config.score_slots)(lambda: plgpu.barrier_wait(refs["taken"].at[slot]))
    refs["p_slots"][slot] = p.astype(jnp.bfloat16)
    refs["lines"][slot] = factor
    plgpu.commit_smem()
    plgpu.barrier_arrive(refs["scored"].at[slot])


def _sum(sizes: Sizes, config: TuningConfig, refs: Any, unit: _Unit, half: Array) -> None:
    """A warpgroup of sums: half of the columns of the output."""

    quarter = sizes.half // 2

    def scope(*accs: Any) -> None:
        def step(i: Array, _: None) -> None:
            waiting, slot = lax.rem(i, config.score_slots), lax.rem(i, config.stages)
            plgpu.barrier_wait(refs["scored"].at[waiting])
            factor = plgpu.load(refs["lines"].at[waiting], layout=_ROW)
            for j, acc in enumerate(accs):  # the second is multiplied under the product of the first
                acc[...] = plgpu.wgmma_accumulator_load(acc, wait_n=j) * lax.broadcast_in_dim(factor, acc.shape, (0,))
                plgpu.wgmma(acc, refs["p_slots"].at[waiting], refs["c_slots"].at[slot, half, :, pl.ds(j * quarter, quarter)])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs["taken"].at[waiting])
            plgpu.barrier_arrive(refs["freed"].at[slot])

        lax.fori_loop(0, unit.blocks, step, None)
        plgpu.barrier_wait(refs["finished"])
        inverse = plgpu.load(refs["lines"].at[config.score_slots], layout=_ROW)
        for j, acc in enumerate(accs):
            columns = pl.ds(half * sizes.half + j * quarter, quarter)
            out = refs["out"].at[unit.split, unit.row, pl.ds(unit.first_query, TILE), columns]
            out[...] = (acc[...] * lax.broadcast_in_dim(inverse, acc.shape, (0,))).astype(out.dtype)

    pl.run_scoped(scope, *[plgpu.ACC((TILE, quarter), jnp.float32)] * 2)


def _clear(values: Any, known: Array) -> None:
    """Zeros in the rows that hold no position of the sequence; the fence comes with the scores."""
    halves, rows, columns = values.shape
    for half, first, row in itertools.product(range(halves), range(0, columns, 128), range(0, rows, 32)):
        part = values.at[half, pl.ds(row, 32), pl.ds(first, 128)].T
        number = plgpu.broadcasted_iota(jnp.int32, part.shape, 1, layout=_LINE(1)) + row
        part[...] = jnp.where(number < known, plgpu.load(part, layout=_LINE(1)), jnp.bfloat16(0))
