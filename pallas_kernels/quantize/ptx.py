"""PTX inside of `plgpu.inline_mgpu`: instructions on words of 32 bits, addresses, and arrays whose registers have four numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.registers import elements, together

UNIT = 16  # bytes that a thread loads or stores at once, and that a swizzle moves
SWIZZLE = 128  # bytes of a row of a tile in shared memory, in which units change places


def asm(text: str, results: int, operands: Sequence[Any]) -> list[Any]:
    """Instructions that touch memory, with so many words as results; operands are words, or addresses of 64 bits."""
    i32 = ir.IntegerType.get_signless(32)
    kind = llvm.StructType.get_literal([i32] * results) if results else ir.Type.parse("!llvm.void")
    constraints = ",".join(["=r"] * results + ["r" if x.type == i32 else "l" for x in operands] + ["~{memory}"])
    out = llvm.inline_asm(kind, list(operands), text, constraints, has_side_effects=True)
    return [llvm.extractvalue(i32, out, [i]) for i in range(results)]


def address(ref: Any, bits: int = 32) -> Any:
    """Where an array begins: of 32 bits in shared memory, of 64 in global memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(bits), utils.memref_ptr(ref))


def word(value: int, bits: int = 32) -> Any:
    return mgpu.c(value, ir.IntegerType.get_signless(bits))


def masked(x: Any, mask: int) -> Any:
    return arith.andi(x, word(mask))


def times(x: Any, factor: int) -> Any:
    return arith.muli(x, word(factor))


def place_in_warpgroup() -> tuple[Any, Any]:
    """The number of a thread in its warp, and that of the warp in its warpgroup."""
    thread = utils.thread_idx()
    return masked(thread, 31), masked(arith.shrui(thread, word(5)), 3)


def words_of(x: Any) -> list[Any]:
    """The registers of an array, as words."""
    of_register = ir.VectorType.get((utils.bitwidth(x.mlir_dtype) // 8,), ir.IntegerType.get_signless(32))
    return [w for r in x.registers.flat for w in elements(utils.bitcast(r, of_register))]


def of_words(words: Sequence[Any], dtype: Any, layout: Any, shape: tuple[int, ...]) -> Any:
    """And back."""
    after, each = layout.to_mgpu(), np.dtype(dtype).itemsize
    registers = np.empty(after.registers_shape(shape), dtype=object)
    of_register = ir.VectorType.get((4,), utils.dtype_to_ir_type(np.dtype(dtype)))
    registers.flat = [utils.bitcast(together(words[i : i + each]), of_register) for i in range(0, len(words), each)]
    return mgpu.FragmentedArray(_registers=registers, _layout=after, _is_signed=None)
