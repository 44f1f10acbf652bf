"""Instructions that Pallas has no operation for, element by element, written in PTX by `plgpu.inline_mgpu`.

Operands are in registers; `layout` is how theirs are laid out, which `inline_mgpu` has to be told.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxtyping import Array, BFloat16, Float32, UInt32

from pallas_kernels.registers import elements, together


def reciprocal(x: Float32[Array, "*s"], layout: Any) -> Float32[Array, "*s"]:
    """1 / x to an ulp in one instruction, where a division tests x for extremes. A subnormal x or result counts as zero."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=_numbers(x, layout))
    def approximate_reciprocal(_: Any, x: Any) -> Any:
        return _each(_instruction("rcp.approx.ftz.f32 $0, $1;"), x)

    return approximate_reciprocal(x)


def larger(x: Float32[Array, "*s"], y: Float32[Array, "*s"], layout: Any) -> Float32[Array, "*s"]:
    """-max(|x|, |y|), of a NaN and a number the number: one instruction. Of two NaNs it is positive, the only such result."""

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=_numbers(x, layout))
    def larger_magnitude(_: Any, x: Any, y: Any) -> Any:
        text = "{ .reg .f32 x, y; abs.f32 x, $1; abs.f32 y, $2; neg.f32 x, x; neg.f32 y, y; min.f32 $0, x, y; }"
        return _each(_instruction(text), x, y)

    return larger_magnitude(x, y)


def product(x: Float32[Array, "*s"], y: Float32[Array, "*s"], layout: Any) -> Float32[Array, "*s"]:
    """x * y, where subnormal numbers, also the product, count as zero: one instruction, where a test of x takes two more."""

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=_numbers(x, layout))
    def product_of_normals(_: Any, x: Any, y: Any) -> Any:
        return _each(_instruction("mul.ftz.f32 $0, $1, $2;"), x, y)

    return product_of_normals(x, y)


def flushed(x: Float32[Array, "*s"], layout: Any) -> Float32[Array, "*s"]:
    """x, where subnormal numbers count as zero: one instruction, where a test takes two."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=_numbers(x, layout))
    def normal_or_zero(_: Any, x: Any) -> Any:
        return _each(_instruction("mul.ftz.f32 $0, $1, 0f3F800000;"), x)

    return normal_or_zero(x)


def widened(x: BFloat16[Array, "*s"], layout: Any) -> Float32[Array, "*s"]:
    """float32 of x, an instruction each, where a conversion takes one more for the upper half of a register."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=_numbers(x, layout))
    def pairs_to_float32(_: Any, x: Any) -> Any:
        return _each(_widen, x)

    return pairs_to_float32(x)


def side_by_side(words: Sequence[UInt32[Array, "n"]], layout: Any) -> BFloat16[Array, "n 8"]:
    """Four words of each line as its eight bfloat16 numbers, which are stored at once. `layout`: of lines of eight."""
    of_line = layout.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(of_line,) * len(words),
        return_type=plgpu.ShapeDtypeStruct((words[0].size, 2 * len(words)), jnp.bfloat16, layout=layout),
    )
    def words_side_by_side(_: Any, *words: Any) -> Any:
        after = layout.to_mgpu()
        registers = np.empty(after.registers_shape((words[0].shape[0], 2 * len(words))), dtype=object)
        numbers = ir.VectorType.get((2 * len(words),), ir.BF16Type.get())
        registers.flat = [utils.bitcast(together([elements(w.registers.item())[0] for w in words]), numbers)]
        return mgpu.FragmentedArray(_registers=registers, _layout=after, _is_signed=None)

    return words_side_by_side(*words)


def meet() -> None:
    """A barrier of the warpgroup, for what it has in shared memory: `commit_smem` without the fence that copies need."""

    @plgpu.inline_mgpu()
    def warpgroup_barrier(_: Any) -> None:
        utils.warpgroup_barrier()

    warpgroup_barrier()


def fence() -> None:
    """What a thread did in shared memory comes before copies that begin once it has said so: `commit_smem` without its barrier."""

    @plgpu.inline_mgpu()
    def fence_of_copies(_: Any) -> None:
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence_of_copies()


def _numbers(like: Array, layout: Any) -> Any:
    return plgpu.ShapeDtypeStruct(like.shape, jnp.float32, layout=layout)


def _each(operation: Callable[..., Any], *operands: Any) -> Any:
    """Applied to every register of a thread."""
    first = operands[0]
    registers = np.empty(first.registers.shape, dtype=object)
    for at in np.ndindex(registers.shape):
        registers[at] = operation(*(x.registers[at] for x in operands))
    return mgpu.FragmentedArray(_registers=registers, _layout=first.layout, _is_signed=None)


def _instruction(text: str) -> Callable[..., Any]:
    """Applied to vectors of float32."""

    def apply(*operands: Any) -> Any:
        f32, constraints = ir.F32Type.get(), ",".join(["=f"] + ["f"] * len(operands))
        return together([llvm.inline_asm(f32, list(each), text, constraints) for each in zip(*map(elements, operands), strict=True)])

    return apply


def _widen(pairs: Any) -> Any:
    """Both halves of each register, as the upper half of one."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    words = elements(utils.bitcast(pairs, ir.VectorType.get((ir.VectorType(pairs.type).shape[0] // 2,), i32)))
    halves = [half for x in words for half in (arith.shli(x, mgpu.c(16, i32)), arith.andi(x, mgpu.c(-(1 << 16), i32)))]
    return together([arith.bitcast(f32, half) for half in halves])
