"""Tiles of rows from anywhere: each thread copies 16 bytes of eight rows into shared memory, by `cp.async`.

TMA copies a row at a time too, but takes some 14 cycles for each, whatever its length, which add up to those of its other copies.
"""

from typing import Any

from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxtyping import Array, Int32

from pallas_kernels.memory import in_tiles
from pallas_kernels.quantize.ptx import SWIZZLE, UNIT, address, asm, masked, place_in_warpgroup, times, word
from pallas_kernels.quantize.reference import BLOCK
from pallas_kernels.registers import elements

# Eight lanes copy a row, a warpgroup 16 rows at once.
OF_ROWS = plgpu.Layout.TILED(Tiling(((16,), (4,), (1,))), warp_dims=(-3,), lane_dims=(-2, plgpu.Replicated(8)), vector_dim=-1)


def gather(target: Any, values: Any, tokens: Int32[Array, "128"], j: Int32[Array, ""]) -> None:
    """Begins to copy the j-th 128 columns of rows of E4M3, laid out as OF_ROWS, to a tile; zeros where there is no such row."""
    (count, columns), dtype = values.shape, values.dtype

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(in_tiles(SWIZZLE, dtype)), plgpu.RefType(), OF_ROWS, plgpu.Layout.WG_SPLAT(())))
    def rows_gathered(_: Any, target: Any, values: Any, tokens: Any, j: Any) -> None:
        i64 = ir.IntegerType.get_signless(64)
        lane, warp = place_in_warpgroup()
        unit, row = masked(lane, 7), arith.addi(times(warp, 4), arith.shrui(lane, word(3)))
        swizzled = times(arith.xori(unit, masked(row, 7)), UNIT)
        to = arith.addi(address(target), arith.addi(times(row, SWIZZLE), swizzled))
        column = arith.addi(times(j.registers.item(), BLOCK), times(unit, UNIT))
        start = arith.addi(address(values, 64), arith.extui(i64, column))
        for n, (token,) in enumerate(map(elements, tokens.registers.flat)):
            there = arith.cmpi(arith.CmpIPredicate.ult, token, word(count))
            # No bytes are read where there is no row, which makes zeros; the address has to be one all the same.
            size, row_of = arith.select(there, word(UNIT), word(0)), arith.select(there, token, word(0))
            source = arith.addi(start, arith.muli(arith.extui(i64, row_of), word(columns, 64)))
            asm(f"cp.async.cg.shared.global [$0+{n * 16 * SWIZZLE}], [$1], {UNIT}, $2;", 0, [to, source, size])

    rows_gathered(target, values, tokens, j)


def wait_for_rows() -> None:
    """Until what a thread began to copy is there. Others' rows need a barrier."""

    @plgpu.inline_mgpu()
    def rows_are_there(_: Any) -> None:
        asm("cp.async.wait_all;", 0, [])

    rows_are_there()
