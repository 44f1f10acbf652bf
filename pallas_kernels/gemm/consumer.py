"""Products of tiles, their promotion and their stores: what the consumers of a product do."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm import wgmma
from pallas_kernels.gemm.kernel import Kernel, Tile, corner, live_tiles, locate, next_slot, output_of, tile_loop
from pallas_kernels.gemm.product import LINE, WAVE
from pallas_kernels.parts import ROWS

_ROW = plgpu.Layout.WGMMA.reduce(1)


def consume(kernel: Kernel, refs: Any, warpgroup: jax.Array) -> None:
    """All tiles, of which a warpgroup makes some rows; with groups of rows, zeros where nobody owns any."""
    live = live_tiles(kernel, refs)

    @tile_loop(kernel, live, jnp.int32(0))
    def _tiles(index: tuple[jax.Array, ...], carry: jax.Array) -> jax.Array:
        tile = locate(kernel, refs, live, index)
        add = _sum_plain if kernel.product.scales == "none" else _sum_scaled
        sums, slot = add(kernel, refs, warpgroup, tile, carry)
        _store(kernel, refs, warpgroup, tile, sums)
        return slot

    if kernel.product.groups == "rows":
        _clear_rest(kernel, refs, warpgroup, live)
    plgpu.wait_smem_to_gmem(0)


def _clear_rest(kernel: Kernel, refs: Any, warpgroup: jax.Array, live: tuple[Any, int]) -> None:
    """Zeros where no expert owns the rows."""
    c = kernel.config
    m_tiles, n_tiles = live
    zeros = _zeros(kernel)

    @plgpu.nd_loop(((kernel.tiles[0] - m_tiles) * n_tiles,), collective_axes="sm")
    def _tiles(info: Any) -> None:
        mi, ni = lax.div(info.index[0], n_tiles) + m_tiles, lax.rem(info.index[0], n_tiles)
        _store(kernel, refs, warpgroup, Tile(*corner(c, mi, ni), None, 0, 0), zeros)


def _rows_of(kernel: Kernel, warpgroup: jax.Array, wave: int) -> jax.Array:
    """First row, within a tile, of a warpgroup's wave."""
    return (warpgroup * kernel.config.waves + wave) * WAVE


def _sum_plain(kernel: Kernel, refs: Any, warpgroup: jax.Array, tile: Tile, slot: jax.Array) -> tuple[Any, jax.Array]:
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
            return next_slot(slot, stages)

        after = lax.fori_loop(0, tile.steps, step, slot)
        total = acc[...]
        pl.when(jnp.asarray(tile.steps) > 0)(lambda: plgpu.barrier_arrive(refs["freed"].at[_previous(after, stages)]))
        return total, after

    total, slot = pl.run_scoped(scope, plgpu.ACC((WAVE, kernel.config.block_n), jnp.float32))
    return (total,), slot


def _previous(slot: jax.Array, stages: int) -> jax.Array:
    return lax.select(slot == 0, jnp.int32(stages - 1), slot - 1)


def _sum_scaled(kernel: Kernel, refs: Any, warpgroup: jax.Array, tile: Tile, slot: jax.Array) -> tuple[Any, jax.Array]:
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


def _zeros(kernel: Kernel) -> Any:
    """Sums of every wave of a tile."""
    zero = jnp.zeros((WAVE, kernel.config.block_n), jnp.float32)
    return tuple(plgpu.layout_cast(zero, plgpu.Layout.WGMMA) for _ in range(kernel.config.waves))


class _Consumer:
    """What a warpgroup takes the K steps of a tile from."""

    def __init__(self, kernel: Kernel, refs: Any, warpgroup: jax.Array, tile: Tile) -> None:
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
        return next_slot(slot, self.kernel.config.stages)

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


def _store(kernel: Kernel, refs: Any, warpgroup: jax.Array, tile: Tile, sums: Any) -> None:
    """Registers to a slot of shared memory to the output, or added to it; TMA clips what lies outside of it."""
    c = kernel.config
    width = kernel.store_columns
    out = output_of(kernel, refs, tile)
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
