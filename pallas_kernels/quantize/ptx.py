"""PTX inside of `plgpu.inline_mgpu`: instructions on words of 32 bits, and addresses in shared memory."""

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

UNIT = 16  # bytes that a thread loads or stores at once, and that a swizzle moves


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


def word(value: int) -> Any:
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def masked(x: Any, mask: int) -> Any:
    return arith.andi(x, word(mask))


def times(x: Any, factor: int) -> Any:
    return arith.muli(x, word(factor))


def place_in_warpgroup() -> tuple[Any, Any]:
    """The number of a thread in its warp, and that of the warp in its warpgroup."""
    thread = utils.thread_idx()
    return masked(thread, 31), masked(arith.shrui(thread, word(5)), 3)
