"""Products of FP8 on the tensor cores whose sums start over in given registers, written in PTX by `plgpu.inline_mgpu`.

`plgpu.wgmma` adds to its accumulator, so a sum that starts over takes zeros, and ptxas may then give every product
registers of its own. With several products written out one after another it moves a promotion behind the product that
follows, needs more registers than there are, and spills. Here a product overwrites `spent`, the registers of one that is
done: they stay an operand of the instruction, with PTX's `scale-d` false, so that all they held has to be used before.

The other reason: the address of an operand is a number that the caller can compute before the operand is there, in 32
bits, where Mosaic forms 64 for each product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float32, Int32

from pallas_kernels.gemm.product import SWIZZLE, WAVE
from pallas_kernels.memory import in_tiles
from pallas_kernels.parts import PARTS
from pallas_kernels.registers import elements, together

UNIT = 16  # bytes: what descriptors count in

_NUMBER, _SUMS = plgpu.Layout.WG_SPLAT(()), plgpu.Layout.WGMMA
_TILED = plgpu.RefType(in_tiles(SWIZZLE, jnp.int8))  # of one byte
_PLAIN = plgpu.RefType()
# The upper halves of descriptors: how far apart every eight rows begin and, in bit 62, that rows of 128 bytes are swizzled.
# The lower halves are addresses, with nothing above them: that would be how far apart both halves of an instruction's k are, which
# swizzled rows do not ask for, and which is zero for parts, so that they are read twice.
_SWIZZLED, _FLAT = 8 * SWIZZLE // UNIT | 1 << 30, PARTS * 2 // UNIT
_EACH = fragmented_array.WGMMA_LAYOUT_ACC_32BIT  # the layout of sums, with every number in a register of its own
_TYPES = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


class Operand(NamedTuple):
    """A buffer of shared memory, and its address in units of 16 bytes."""

    ref: Any
    address: Int32[Array, ""]


def address(ref: Any, tiled: bool) -> Int32[Array, ""]:
    """Where a buffer of shared memory begins, in units of 16 bytes."""

    @plgpu.inline_mgpu(arg_types=(_TILED if tiled else _PLAIN,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_NUMBER))
    def shared_address(_: Any, ref: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        whole = llvm.ptrtoint(i32, utils.memref_ptr(ref))
        # In a cluster, bits above these say which thread block it is.
        within = llvm.and_(whole, mgpu.c(0x3FFFF, i32))
        return _number(llvm.lshr(within, mgpu.c(UNIT.bit_length() - 1, i32)))

    return shared_address(ref)


def registers(columns: int) -> Float32[Array, "64 columns"]:
    """Registers for the first product to overwrite."""
    return plgpu.layout_cast(jnp.zeros((WAVE, columns), jnp.float32), _SUMS)


def multiply(a: Operand, b: Operand, spent: Float32[Array, "64 columns"], ends_reads: bool = False) -> Float32[Array, "64 columns"]:
    """a [64, 128] times b [columns, 128] transposed, once it is done. `ends_reads`: with a fence, as `plgpu.commit_smem`, while it runs."""
    kind = _kind(a, b, spent)

    @plgpu.inline_mgpu(arg_types=(_TILED, _TILED, _NUMBER, _NUMBER, _SUMS), return_type=_sums(spent))
    def product(_: Any, _a: Any, _b: Any, at_a: Any, at_b: Any, spent: Any) -> Any:
        running = _issue([_Overwritten(kind, 4, _SWIZZLED, at_a, at_b)], _Taken.of(spent))
        if ends_reads:
            mgpu.commit_shared()
        return _wait(running).arrays()[0]

    return product(a.ref, b.ref, a.address, b.address, spent)


def multiply_scaled(
    a: Operand, b: Operand, a_scales: Operand, b_scales: Operand, spent: tuple[Float32[Array, "64 columns"], ...]
) -> tuple[Float32[Array, "64 columns"], ...]:
    """The same, and what each of the sums is multiplied by, in registers like theirs: a scale of its row times one of its column.

    Scales are eight bfloat16 parts each, [rows / 8, 64], of which the tensor cores make products that are exact to float32's
    rounding. They read each part twice, as both halves of 16 along k, so those of a stand for half a scale.
    """
    kind, of_scales = _kind(a, b, spent[0]), f"m64n{spent[1].shape[1]}k16.f32.bf16.bf16"
    arguments = (_TILED, _TILED, _PLAIN, _PLAIN, (_NUMBER,) * 4, (_SUMS, _SUMS))

    @plgpu.inline_mgpu(arg_types=arguments, return_type=(_sums(spent[0]),) * 2)
    def product_and_scales(_: Any, _a: Any, _b: Any, _a_scales: Any, _b_scales: Any, at: Any, spent: Any) -> Any:
        at_a, at_b, at_a_scales, at_b_scales = at
        products = [_Overwritten(kind, 4, _SWIZZLED, at_a, at_b), _Overwritten(of_scales, 1, _FLAT, at_a_scales, at_b_scales)]
        return _wait(_issue(products, _Taken.of(*spent))).arrays()

    operands = a, b, a_scales, b_scales
    return product_and_scales(*(x.ref for x in operands), tuple(x.address for x in operands), spent)


def start(a: Operand, b: Operand, spent: Float32[Array, "64 columns"]) -> Float32[Array, "64 columns"]:
    """Issues a product. What it returns may be used once `finish` has waited for it."""
    kind = _kind(a, b, spent)

    @plgpu.inline_mgpu(arg_types=(_TILED, _TILED, _NUMBER, _NUMBER, _SUMS), return_type=_sums(spent))
    def started(_: Any, _a: Any, _b: Any, at_a: Any, at_b: Any, spent: Any) -> Any:
        return _issue([_Overwritten(kind, 4, _SWIZZLED, at_a, at_b)], _Taken.of(spent)).arrays()[0]

    return started(a.ref, b.ref, a.address, b.address, spent)


def finish(running: Float32[Array, "64 columns"], in_flight: int = 0) -> Float32[Array, "64 columns"]:
    """Waits until at most `in_flight` products that were issued later than this are under way; then its sums are there."""

    @plgpu.inline_mgpu(arg_types=(_SUMS,), return_type=_sums(running))
    def finished(_: Any, running: Any) -> Any:
        return _wait(_Taken.of(running), in_flight).arrays()[0]

    return finished(running)


def _sums(like: Array) -> Any:
    return plgpu.ShapeDtypeStruct(like.shape, jnp.float32, layout=_SUMS)


def _number(value: Any) -> Any:
    return mgpu.FragmentedArray.splat(value, (), is_signed=True)


def _kind(a: Operand, b: Operand, spent: Array) -> str:
    left, right = (_TYPES[x.ref.dtype.name] for x in (a, b))
    return f"m64n{spent.shape[1]}k32.f32.{left}.{right}"


class _Taken(NamedTuple):
    """Arrays of sums as the registers that wgmma names, one after the other."""

    numbers: list[Any]
    shapes: list[tuple[int, ...]]

    @classmethod
    def of(cls, *sums: Any) -> "_Taken":
        whole = [x.to_layout(_EACH).registers for x in sums]
        return cls([number for each in whole for x in each.flat for number in elements(x)], [x.shape for x in whole])

    def after(self, text: str, addresses: Sequence[Any] = ()) -> "_Taken":
        """After a statement that may change them where they are. None can be used before it."""
        f32, total = ir.F32Type.get(), len(self.numbers)
        constraints = ",".join(["=f"] * total + [str(i) for i in range(total)] + ["r"] * len(addresses))
        result_type = llvm.StructType.get_literal([f32] * total)
        out = llvm.inline_asm(result_type, [*self.numbers, *addresses], text, constraints, has_side_effects=True)
        return _Taken([llvm.extractvalue(f32, out, [i]) for i in range(total)], self.shapes)

    def arrays(self) -> tuple[Any, ...]:
        numbers, arrays = iter(self.numbers), []
        for shape in self.shapes:
            registers = np.empty(shape, dtype=object)
            for at in np.ndindex(shape):
                registers[at] = together([next(numbers)])
            arrays.append(mgpu.FragmentedArray(_registers=registers, _layout=_EACH, _is_signed=None).to_layout(mgpu.WGMMA_LAYOUT))
        return tuple(arrays)


class _Overwritten(NamedTuple):
    """Instructions of one product, each of 32 bytes along k; the first overwrites sums, the others add to them."""

    kind: str
    instructions: int
    upper: int  # half of the descriptors
    a: Any
    b: Any

    def lines(self, sums: range, a: int, b: int) -> list[str]:
        """In PTX, with operands by number."""
        signs = "1, 1, 0, 0" if self.kind.endswith("bf16") else "1, 1"  # 16-bit operands could also be transposed
        taken = "{" + ", ".join(f"${i}" for i in sums) + "}"
        return [
            f"add.s32 a, ${a}, {2 * i}; add.s32 b, ${b}, {2 * i}; mov.b64 da, {{a, {self.upper}}}; mov.b64 db, {{b, {self.upper}}};"
            f"wgmma.mma_async.sync.aligned.{self.kind} {taken}, da, db, {'adds' if i else 'starts'}, {signs};"
            for i in range(self.instructions)
        ]


def _issue(products: list[_Overwritten], sums: _Taken) -> _Taken:
    """One group of wgmma: all in one statement, so that nothing can stand between its instructions that needs their registers."""
    size, first = len(sums.numbers) // len(products), 2 * len(sums.numbers)  # operands: sums as they will be, as they are, addresses
    text = ["{ .reg .pred starts, adds; .reg .b32 a, b; .reg .b64 da, db;", "setp.ne.b32 starts, 0, 0; setp.eq.b32 adds, 0, 0;"]
    text.append("wgmma.fence.sync.aligned;")
    for i, each in enumerate(products):
        text += each.lines(range(i * size, (i + 1) * size), first + 2 * i, first + 2 * i + 1)
    text.append("wgmma.commit_group.sync.aligned; }")
    return sums.after("\n".join(text), [x.registers.item() for each in products for x in (each.a, each.b)])


def _wait(running: _Taken, in_flight: int = 0) -> _Taken:
    return running.after(f"wgmma.wait_group.sync.aligned {in_flight};")
