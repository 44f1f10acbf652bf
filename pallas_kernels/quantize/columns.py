"""A tile of 128x128 by columns: a warp has 32 of them, four lanes share four, in runs of four rows.

`ldmatrix` turns what is 16 bits wide as it loads: a register of it is two rows of a column of float16, or of two columns of E4M3.
`stmatrix` stores four rows of E4M3 of a lane as a part of a turned row.
"""

from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Int32, Shaped

from pallas_kernels.memory import in_tiles
from pallas_kernels.quantize.ptx import SWIZZLE, UNIT, address, asm, masked, of_words, place_in_warpgroup, times, word, words_of
from pallas_kernels.quantize.reference import BLOCK

RUN = 16  # rows that four lanes have of a column side by side
_PAIRS = plgpu.Layout.TILED(Tiling(((BLOCK, RUN), (32, RUN), (16, RUN), (2, 4))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1)
_SINGLE = plgpu.Layout.TILED(Tiling(((BLOCK, RUN), (32, RUN), (8, RUN), (4,))), warp_dims=(-7,), lane_dims=(-3, -2), vector_dim=-1)


def by_columns(dtype: Any) -> Any:
    """The layout of [columns, rows] that were loaded from a tile of this type."""
    return _PAIRS if np.dtype(dtype).itemsize == 1 else _SINGLE


def load_turned(ref: Any, dtype: Any, swizzle: int) -> Shaped[Array, "128 128"]:
    """A tile [rows, columns] as [columns, rows]."""
    size, layout = np.dtype(dtype).itemsize, by_columns(dtype)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(in_tiles(swizzle, dtype)),), return_type=plgpu.ShapeDtypeStruct((BLOCK, BLOCK), dtype, layout=layout)
    )
    def tile_turned(_: Any, ref: Any) -> Any:
        start = arith.addi(address(ref), _own_row(size, swizzle))
        loads = [_load_matrices(start, 2 * UNIT * side, run * RUN * BLOCK * size) for run in range(BLOCK // RUN) for side in range(size)]
        words = [w for load in loads for w in (_of_columns(load) if size == 1 else load)]
        return of_words(words, dtype, layout, (BLOCK, BLOCK))

    return tile_turned(ref)


def store_turned(ref: Any, x: Shaped[Array, "128 rows"], first: int, dtype: Any) -> None:
    """[columns, rows] in E4M3, loaded in `dtype`, as a part of a turned tile: from its `first` run of rows on."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(in_tiles(SWIZZLE, x.dtype)), by_columns(dtype)))
    def turned_stored(_: Any, ref: Any, x: Any) -> None:
        start, words = arith.addi(address(ref), _own_line(np.dtype(dtype).itemsize)), words_of(x)
        for run in range(len(words) // 4):
            at = f"{{ .reg .b32 at; xor.b32 at, $0, {(first + run) * UNIT};"
            asm(f"{at} stmatrix.sync.aligned.m8n8.x4.shared.b16 [at], {{$1, $2, $3, $4}}; }}", 0, [start, *words[4 * run : 4 * run + 4]])

    turned_stored(ref, x)


def again(x: Shaped[Array, "128 rows"], zero: Int32[Array, ""], dtype: Any) -> Shaped[Array, "128 rows"]:
    """x, loaded in `dtype`, and compilers do not know that it is, so that what was computed of it is computed once more and not kept.

    `zero`: in a way that they do not see through (`memory.here`).
    """
    layout = by_columns(dtype)

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.Layout.WG_SPLAT(())), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout))
    def same(_: Any, x: Any, zero: Any) -> Any:
        return of_words([arith.xori(w, zero.registers.item()) for w in words_of(x)], dtype, layout, (BLOCK, x.shape[1]))

    return same(x, zero)


def _own_row(size: int, swizzle: int) -> Any:
    """Where the row is in a tile that a lane names for the first four matrices: two below each other, and two beside those.

    Matrices below each other bring a lane two rows each, four in all. Of E4M3, half of the lanes get the upper two first, so that the
    rows of a matrix lie in different banks.
    """
    lane, warp = place_in_warpgroup()
    matrix, line = arith.shrui(lane, word(3)), masked(lane, 7)
    pair = masked(matrix, 1)
    if size == 1:
        pair = arith.xori(pair, arith.shrui(line, word(2)))
    row = arith.addi(arith.addi(times(arith.shrui(line, word(1)), 4), times(pair, 2)), masked(line, 1))
    at = arith.addi(times(warp, 32 * size), times(arith.shrui(matrix, word(1)), UNIT))  # bytes
    tile = arith.addi(times(arith.shrui(row, word(3)), BLOCK * size // swizzle), arith.divui(at, word(swizzle)))
    plain = arith.addi(arith.addi(times(tile, 8 * swizzle), times(masked(row, 7), swizzle)), masked(at, swizzle - 1))
    return arith.xori(plain, times(masked(arith.shrui(plain, word(7)), swizzle // UNIT - 1), UNIT))


def _own_line(size: int) -> Any:
    """Where the row is in a turned tile that a lane names for the first four matrices, one for each column that a lane has."""
    lane, warp = place_in_warpgroup()
    matrix, line = arith.shrui(lane, word(3)), masked(lane, 7)
    if size == 1:
        column = arith.addi(arith.addi(times(arith.shrui(matrix, word(1)), 16), times(line, 2)), masked(matrix, 1))
    else:
        column = arith.addi(times(matrix, 8), line)
    at = times(arith.addi(times(warp, 32), column), SWIZZLE)
    return arith.addi(at, times(masked(column, 7), UNIT))


def _load_matrices(start: Any, flipped: int, plus: int) -> list[Any]:
    load = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}"
    return asm(f"{{ .reg .b32 at; xor.b32 at, $4, {flipped}; {load}, [at+{plus}]; }}", 4, [start])


def _of_columns(words: list[Any]) -> list[Any]:
    """Runs of four rows of four columns, of pairs of rows of two columns at a time. The upper pair comes first to half of the lanes."""
    lane, _ = place_in_warpgroup()
    upper_first = arith.cmpi(arith.CmpIPredicate.ne, masked(lane, 2), word(0))
    orders = [arith.select(upper_first, word(upper), word(lower)) for lower, upper in ((0x6420, 0x2064), (0x7531, 0x3175))]
    return [asm("prmt.b32 $0, $1, $2, $3;", 1, [*pair, order])[0] for pair in (words[:2], words[2:]) for order in orders]
