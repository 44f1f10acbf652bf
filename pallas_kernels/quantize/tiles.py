"""What the quantizers for Hopper share: layouts of registers, tiles in shared memory and their copies, and the launch.

    ROWS    four lanes share a row, each has runs of four elements: the largest of a row needs two shuffles, and E4M3 is
            stored as whole words
    of `load_rows`  the same for 32 rows, in runs of 16 bytes: a thread has elements of one row only, and few addresses
    LINE    a thread has a line of its own: loads through a transposed view of the tile give it a column, so that the
            largest of a column needs no other thread, and the transposed tile is stored 16 bytes at a time; in
            `swiglu_backward` also a piece of a row (`pieces`)

They load and store without bank conflicts, which the lowering checks. TMA fills what lies outside of an array with zeros
and does not store there, so edges need no code. That is true of tiles; lines (scales) are copied whole, so arrays of
lines are padded to whole tiles.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.memory import tiled
from pallas_kernels.parts import EACH, PARTS, Operand, words_of_parts
from pallas_kernels.quantize.arithmetic import largest_of
from pallas_kernels.quantize.instructions import side_by_side, widened
from pallas_kernels.quantize.reference import BLOCK, tile_scale

Array = jax.Array

QUARTERS = 4  # parts of a tile by rows
QUARTER = BLOCK // QUARTERS  # rows of each
ROWS = plgpu.Layout.WGMMA_8BIT
LINE = plgpu.Layout.TCGEN05_TMEM_NATIVE
# 128 numbers, of which every warp has all: the largest needs no other warp.
EACH_WARP = plgpu.Layout.TILED(Tiling(((BLOCK,), (4,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1)


def once(f: Callable) -> Callable:
    """Traces f once for each shape, whoever calls: kernels that differ in source locations alone would all be compiled."""
    static = {"power_of_two", "act_power_of_two", "keep", "operand", "parts", "sm_count", "interpret"}
    return jax.jit(f, static_argnames=tuple(name for name in inspect.signature(f).parameters if name in static))


def in_one_warp(warp_number: Array | int, f: Callable) -> None:
    """Calls f in one warp only: the others spend no instructions on its copies.

    It is another one in each warpgroup, since first warps share a quarter of the multiprocessor, which would issue them all.
    """

    @plgpu.warp_map
    def _(warp):
        pl.when(warp == warp_number)(f)


def load_rows(ref: Any) -> tuple[Array, Any]:
    """float32 of a [32, 128] tile, and its layout: neighbouring lanes have rows, not columns, so that all runs meet every bank."""
    run = 16 // ref.dtype.itemsize
    layout = plgpu.Layout.TILED(Tiling(((32, 4 * run), (8, 4 * run), (run,))), warp_dims=(-5,), lane_dims=(-2, -3), vector_dim=-1)
    lines = plgpu.load(ref, layout=layout)
    return (lines if lines.dtype == jnp.float32 else widened(lines, layout)), layout


def load_lines(ref: Any) -> Array:
    """float32 of a view of 128 lines, each thread with a line of it: loaded one by one, then taken as runs of four."""
    return plgpu.layout_cast(plgpu.load(ref, layout=LINE(1)), LINE(4)).astype(jnp.float32)


def in_runs(line: Array) -> Array:
    """E4M3 of a line, as runs of 16, which are stored at once."""
    return plgpu.layout_cast(line, LINE(16))


def at_block(i: Any) -> Any:
    return pl.ds(i * BLOCK, BLOCK)


def at_quarter(i: Any) -> Any:
    return pl.ds(i * QUARTER, QUARTER)


def tile_of(dtype: Any, *shape: int, width: int = BLOCK) -> Any:
    """Shared memory for tiles of an array with rows of `width`."""
    return tiled(*shape, swizzle=swizzle_of(dtype, shape[-1], width), dtype=dtype)


def swizzle_of(dtype: Any, columns: int, width: int) -> int:
    """Of such tiles. Mosaic cuts rows of the array in pieces of it, so it has to divide them: 128 bytes, or what is left."""
    itemsize = jnp.dtype(dtype).itemsize
    return math.gcd(128, columns * itemsize, width * itemsize)


def load_all(copies: list[tuple[Any, Any]], loaded: Any) -> None:
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, loaded)
    plgpu.barrier_wait(loaded)


def start_all(copies: list[tuple[Any, Any]]) -> None:
    for source, target in copies:
        plgpu.copy_smem_to_gmem(source, target, commit_group=False)


def store_all(copies: list[tuple[Any, Any]]) -> None:
    plgpu.commit_smem()
    start_all(copies)
    plgpu.commit_smem_to_gmem_group()
    wait_for_stores()


def wait_for_stores() -> None:
    """Until the stores that a warp has started have read their shared memory: it has to live, and keep what it holds, so long."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def launch(body: Callable, name: str, *, out: dict, scratch: dict, grid_names: tuple = ("row", "column"), **kwargs: Any) -> Callable:
    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(*shape) for shape in out.values()),
        grid_names=grid_names,
        scratch_types=scratch,
        kernel_name=name,
        **kwargs,
    )


def scale_of_columns(largest: Any, power_of_two: bool) -> Array:
    """The scales of 128x1 tiles, from `keys_of` each quarter's rows of them: [QUARTERS, columns] in shared memory."""
    keys = [plgpu.load(largest.at[q], layout=LINE(4).reduce(1)) for q in range(QUARTERS)]
    return tile_scale(largest_of(functools.reduce(jnp.maximum, keys)), power_of_two)


def of_columns(k: int, row_blocks: int, operand: Operand | None) -> tuple[tuple[int, ...], Any]:
    """Shape and type in which a kernel gives scales of 128x1 tiles."""
    lines = row_blocks, padded(k)
    return (lines, jnp.float32) if operand is None else ((*lines, EACH), jnp.bfloat16)


def as_operand(scale: Array, operand: Operand | None) -> Array:
    """Scales of columns as a kernel stores them."""
    return scale if operand is None else side_by_side(words_of_parts(scale, operand), LINE(EACH))


def whole_columns(scales_t: Array, k: int) -> Array:
    """What a kernel gave, as callers take it."""
    return scales_t[:, :k] if scales_t.ndim == 2 else scales_t.reshape(len(scales_t), -1, PARTS)


def padded(rows: int) -> int:
    return pl.cdiv(rows, BLOCK) * BLOCK


def check_width(name: str, columns: int) -> None:
    if columns % 32:
        raise NotImplementedError(f"{name}: rows of {columns}: tiled copies of E4M3 need multiples of 32; use the reference")


def check_halves(name: str, columns: int) -> None:
    if columns % BLOCK:
        raise NotImplementedError(f"{name}: gate and up of {columns}: tiles of {BLOCK} would hold parts of both; use the reference")
