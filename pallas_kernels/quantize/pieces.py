"""Tiles of 32 rows of 128 in pieces: a thread of a warpgroup has 32 numbers of one row, a warp the same columns of all rows.

So a warp turns its columns by itself, and what a row needs from all of it is one number for each of four pieces. In registers
pieces are [128, 32] in the layout LINE of `tiles`: line 32 w + r is columns 32 w to 32 w + 32 of row r. Turned, line c is column c.

Pallas could load and store them too. It computes an address for every 16 bytes, which LLVM keeps in registers over a loop, or in
memory if there are none left. Here addresses are one number, and constants that are combined with it when they are needed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Float32, Shaped

from pallas_kernels.memory import in_tiles
from pallas_kernels.quantize.ptx import SWIZZLE, UNIT, address, asm, masked, of_words, place_in_warpgroup, times, word, words_of

_LINE = plgpu.Layout.TCGEN05_TMEM_NATIVE(4)
_OF_PIECES = _LINE.reduce(1)
# A lane has a row, a warp a piece of each: what is reduced over columns all warps have.
_OF_ROWS = plgpu.Layout.TILED(Tiling(((32, 128), (32, 32), (4,))), warp_dims=(-4,), lane_dims=(-3,), vector_dim=-1).reduce(1)


def of_rows(of_pieces: Float32[Array, "128"]) -> Float32[Array, "32"]:
    """What all pieces of a row have in common, of each row."""
    return _renamed(of_pieces, _OF_PIECES, (32,), _OF_ROWS)


def load_of_rows(ref: Any) -> Shaped[Array, "128"]:
    """A number of each of 32 rows, for its four pieces."""
    return _renamed(plgpu.load(ref, layout=_OF_ROWS), _OF_ROWS, (128,), _OF_PIECES)


def _renamed(x: Array, layout: Any, shape: tuple[int, ...], other: Any) -> Array:
    """The same number in each thread, as an element of another array."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, x.dtype, layout=other))
    def other_name(_: Any, x: Any) -> Any:
        after = other.to_mgpu()
        return mgpu.FragmentedArray(_registers=x.registers.reshape(after.registers_shape(shape)), _layout=after, _is_signed=x.is_signed)

    return other_name(x)


def load_pieces(ref: Any, dtype: Any) -> Shaped[Array, "128 32"]:
    """Pieces of a tile [32, 128]."""

    @plgpu.inline_mgpu(arg_types=(_tiled(dtype),), return_type=_pieces(dtype))
    def pieces_loaded(_: Any, ref: Any) -> Any:
        start, units = _own_units(ref, dtype)
        words = [w for i in range(units) for w in _load(start, i * UNIT)]
        return of_words(words, dtype, _LINE, (128, 32))

    return pieces_loaded(ref)


def store_pieces(ref: Any, x: Shaped[Array, "128 32"]) -> None:
    """Stores pieces as a tile [32, 128]."""
    dtype = x.dtype

    @plgpu.inline_mgpu(arg_types=(_tiled(dtype), _LINE))
    def pieces_stored(_: Any, ref: Any, x: Any) -> None:
        _store_pieces(ref, x, dtype)

    pieces_stored(ref, x)


def turn(ref: Any, x: Float32[Array, "128 32"]) -> Float32[Array, "128 32"]:
    """Pieces, turned by way of a tile in shared memory [32, 128]: a thread then has a column."""
    dtype = x.dtype

    @plgpu.inline_mgpu(arg_types=(_tiled(dtype), _LINE), return_type=_pieces(dtype))
    def pieces_turned(_: Any, ref: Any, x: Any) -> Any:
        utils.warp_barrier()
        _store_pieces(ref, x, dtype)
        utils.warp_barrier()
        return _columns(ref)

    return pieces_turned(ref, x)


def store_columns(ref: Any, x: Shaped[Array, "128 rows"], number: Array) -> None:
    """Columns of some rows of E4M3, as the `number`-th part of the rows of a turned tile [128, 128]."""
    units = x.shape[1] // UNIT

    @plgpu.inline_mgpu(arg_types=(_tiled(x.dtype), _LINE, plgpu.Layout.WG_SPLAT(())))
    def columns_stored(_: Any, ref: Any, x: Any, number: Any) -> None:
        line = masked(utils.thread_idx(), 127)
        unit = arith.xori(times(number.registers.item(), units), masked(line, 7))
        start, words = arith.addi(address(ref), arith.addi(times(line, SWIZZLE), times(unit, UNIT))), words_of(x)
        for i in range(units):
            _store(words[4 * i : 4 * i + 4], start, i * UNIT)

    columns_stored(ref, x, number)


def _tiled(dtype: Any) -> Any:
    return plgpu.RefType(in_tiles(SWIZZLE, dtype))


def _pieces(dtype: Any) -> Any:
    return plgpu.ShapeDtypeStruct((128, 32), dtype, layout=_LINE)


def _own_units(ref: Any, dtype: Any) -> tuple[Any, int]:
    """Where a thread's piece begins, and how many units it has: unit i is where the address has i * UNIT exclusive-ored."""
    size = np.dtype(dtype).itemsize
    row, warp = place_in_warpgroup()
    in_eight, eight = masked(row, 7), arith.shrui(row, word(3))
    each = 4 // size  # pieces side by side in a row of the swizzle
    tile = arith.addi(times(eight, size), arith.divui(warp, word(each)))
    unit = arith.xori(times(arith.remui(warp, word(each)), 2 * size), in_eight)
    offset = arith.addi(times(tile, 8 * SWIZZLE), arith.addi(times(in_eight, SWIZZLE), times(unit, UNIT)))
    return arith.addi(address(ref), offset), 2 * size


def _store_pieces(ref: Any, x: Any, dtype: Any) -> None:
    (start, units), words = _own_units(ref, dtype), words_of(x)
    for i in range(units):
        _store(words[4 * i : 4 * i + 4], start, i * UNIT)


def _columns(ref: Any) -> Any:
    """The columns of a warp's pieces. A lane names a unit of a row in each of four matrices, and gets a number of every row."""
    lane, warp = place_in_warpgroup()
    row, unit = arith.shrui(lane, word(3)), masked(lane, 7)
    offset = arith.addi(times(row, SWIZZLE), times(arith.xori(unit, row), UNIT))
    start = arith.addi(address(ref), arith.addi(times(warp, 8 * SWIZZLE), offset))
    words: list[Any] = []
    for first in range(0, 32, 4):
        # Rows 4 to 7 of eight have their units where the address has 4 * UNIT exclusive-ored.
        flipped, plain = (4 * UNIT, 4 * SWIZZLE) if first % 8 else (0, 0)
        at = arith.addi(arith.xori(start, word(flipped)), word(plain + first // 8 * 4 * 8 * SWIZZLE))
        words += asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", 4, [at])
    return of_words(words, np.float32, _LINE, (128, 32))


def _load(start: Any, flipped: int) -> list[Any]:
    return asm(f"{{ .reg .b32 at; xor.b32 at, $4, {flipped}; ld.shared.v4.b32 {{$0, $1, $2, $3}}, [at]; }}", 4, [start])


def _store(words: Sequence[Any], start: Any, flipped: int) -> None:
    asm(f"{{ .reg .b32 at; xor.b32 at, $0, {flipped}; st.shared.v4.b32 [at], {{$1, $2, $3, $4}}; }}", 0, [start, *words])
