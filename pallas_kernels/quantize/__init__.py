"""Fine-grained quantization to E4M3 in one pass over memory (V3 sec. 3.3.2).

Layouts, with mp = m rounded up to a multiple of 128 and kb = ceil(k / 128):
a tile of 1x128 has its scale in `scales[kb, mp]`, rows last, so that a product loads the scales of its rows as one line;
a tile of 128x1 is a row of `values_t[mp / 128, k, 128]`, and has its scale in `scales_t[mp / 128, k]`: each 128 rows are
transposed by themselves, so that turned tiles of 128x128 are written, and read by Wgrad, as one piece of memory. Scales of rows
that do not exist are 1, their values 0. A product is `values * scale`. Where Wgrad will take the transposed tiles as its
left or right `operand`, their scales come in the parts that its kernel multiplies (`pallas_kernels.parts`). Every operation takes
`impl`: "reference" (plain JAX), "pallas" (the kernel for Hopper GPUs), or "auto" (the kernel where there is a Hopper GPU).
What a kernel cannot take raises `NotImplementedError`. The numerical rule is in `reference`.
"""

from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float16, Float32, Int32

from pallas_kernels.backend import sm_count, use_pallas
from pallas_kernels.parts import Operand
from pallas_kernels.quantize import reference

BLOCK = reference.BLOCK
ScalesT = Float32[Array, "mb _"] | BFloat16[Array, "mb _ 64"]  # of columns, or parts of them where an operand is named


def quantize_rows(
    x: Float[Array, "m k"], power_of_two: bool = False, impl: str = "auto"
) -> tuple[Float[Array, "m k"], Float32[Array, "kb mp"]]:
    """E4M3 values and scales of 1x128 tiles, for Fprop and Dgrad. `x`: bfloat16 or float32; `power_of_two`: scales rounded up to one."""
    _check_dtype("x", x, ("bfloat16", "float32"))
    _check_rows("x", x)
    return (_kernels() if use_pallas(impl) else reference).quantize_rows(x, power_of_two)


def quantize_and_keep(
    x: BFloat16[Array, "m k"], impl: str = "auto"
) -> tuple[Float[Array, "m k"], Float32[Array, "kb mp"], Float16[Array, "m k"], Float32[Array, "kb mp"]]:
    """`quantize_rows`, and for the backward pass the same tiles in E5M6, held in float16, with powers of two as scales; x is read once.

    So the input of the Linear after attention is multiplied and kept (V3 sec. 3.3.2).
    """
    _check_rows("x", x)
    return (_kernels() if use_pallas(impl) else reference).quantize_and_keep(x)


def quantize_both(
    x: Float[Array, "m k"], power_of_two: bool = False, operand: str | None = None, impl: str = "auto"
) -> tuple[Float[Array, "m k"], Float32[Array, "kb mp"], Float[Array, "mb k 128"], ScalesT]:
    """`quantize_rows`, and for Wgrad the values of 128x1 tiles, transposed, and their scales; x is read once."""
    _check_dtype("x", x, ("bfloat16", "float32"))
    _check_rows("x", x)
    return (_kernels() if use_pallas(impl) else reference).quantize_both(x, power_of_two, _operand(operand))


def quantize_blocks(
    w: Float[Array, "*e k n"], impl: str = "auto"
) -> tuple[Float[Array, "*e k n"], Float[Array, "*e n k"], Float32[Array, "*e kb nb"], Float32[Array, "*e nb kb"]]:
    """128x128 blocks of weights `[k, n]` or `[experts, k, n]`: values as they are (Dgrad), transposed (Fprop), and the scales of both."""
    _check_dtype("w", w, ("bfloat16", "float32"))
    if w.ndim not in (2, 3):
        raise ValueError(f"w: shape {w.shape}: has to be [k, n] or [experts, k, n]; reshape it")
    return (_kernels() if use_pallas(impl) else reference).quantize_blocks(w)


def swiglu_quantize(
    hidden: BFloat16[Array, "m two_f"], gates: Float32[Array, " m"] | None, power_of_two: bool = False, impl: str = "auto"
) -> tuple[Float[Array, "m f"], Float32[Array, "fb mp"], Float[Array, "m two_f"], Float32[Array, "hb mp"]]:
    """`silu(gate) * up * gates` of rows `[gate, up]`, in 1x128 tiles; and `hidden` itself in 1x128 tiles, as the backward pass keeps it.

    The activation is computed in float32 and rounded once. `power_of_two` is of its scales; those of `hidden` never are.
    """
    _check_halves("hidden", hidden)
    _check_gates(gates, hidden.shape[0])
    return (_kernels() if use_pallas(impl) else reference).swiglu_quantize(hidden, gates, power_of_two)


def swiglu_backward(
    hidden: Float[Array, "m two_f"],
    scales: Float32[Array, "hb mp"],
    gates: Float32[Array, " m"] | None,
    d_act: BFloat16[Array, "m f"],
    power_of_two: bool = False,
    act_power_of_two: bool = False,
    parts: bool = False,
    impl: str = "auto",
) -> tuple[
    Float[Array, "m two_f"],
    Float32[Array, "hb mp"],
    Float[Array, "mb two_f 128"],
    ScalesT,
    Float[Array, "mb f 128"],
    ScalesT,
    Float32[Array, " m"] | None,
]:
    """The backward pass of `swiglu_quantize`, from the `hidden` values and scales that it kept, in float32.

    Returns the gradient of hidden as `quantize_both` would, with scales by `power_of_two`; for Wgrad of the
    down-projection the activation in 128x1 tiles, transposed; and the gradient of `gates`, or None. The activation is first
    rounded to 1x128 tiles, since that is what a forward pass keeps of an input, both times with scales by `act_power_of_two`.
    With `parts` scales of columns come as parts: the gradient's as those of the right operand, the activation's of the left.
    """
    _check_halves("hidden", hidden)
    _check_dtype("hidden", hidden, ("float8_e4m3fn",))
    _check_dtype("d_act", d_act, ("bfloat16",))
    _check_scales("scales", scales, hidden.shape)
    _check_gates(gates, hidden.shape[0])
    if d_act.shape != (hidden.shape[0], hidden.shape[1] // 2):
        raise ValueError(
            f"d_act: shape {d_act.shape}: has to be half as wide as hidden, {hidden.shape}; pass the gradient of the activation"
        )
    arguments = hidden, scales, gates, d_act, power_of_two, act_power_of_two, parts
    return _kernels().swiglu_backward(*arguments, sm_count()) if use_pallas(impl) else reference.swiglu_backward(*arguments)


def retile(
    values: Float[Array, "m k"],
    scales: Float32[Array, "kb mp"],
    power_of_two: bool = False,
    operand: str | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "mb k 128"], ScalesT]:
    """1x128 tiles, of E4M3 or of E5M6 kept in 16 bits, to E4M3 of 128x1 tiles, transposed: dequantize, quantize (V3 sec. 3.3.2)."""
    _check_dtype("values", values, ("float8_e4m3fn", "bfloat16", "float16"))
    _check_rows("values", values)
    _check_scales("scales", scales, values.shape)
    arguments = values, scales, power_of_two, _operand(operand)
    return _kernels().retile(*arguments, sm_count()) if use_pallas(impl) else reference.retile(*arguments)


def gather_and_retile(
    values: Float[Array, "n k"],
    scales: Float32[Array, "kb mp"],
    source: Int32[Array, " m"],
    power_of_two: bool = False,
    keep: bool = False,
    operand: str | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "m k"] | None, Float[Array, "mb k 128"], ScalesT]:
    """`retile` of rows of tokens: row r is `values[source[r]]`, or zeros where that is n. Returns these rows first, with `keep`, or None.

    `scales` are those of the rows; m is a multiple of 128, as rows of experts are.
    """
    _check_dtype("values", values, ("float8_e4m3fn",))
    _check_rows("values", values)
    if source.ndim != 1 or not source.size or source.size % BLOCK:
        raise ValueError(f"source: shape {source.shape}: has to be a multiple of {BLOCK} rows; pad it with {len(values)}, rows of zeros")
    _check_scales("scales", scales, (source.size, values.shape[1]))
    arguments = values, scales, source, power_of_two, keep, _operand(operand)
    return _kernels().gather_and_retile(*arguments, sm_count()) if use_pallas(impl) else reference.gather_and_retile(*arguments)


def _kernels() -> Any:
    """Imported when called: Mosaic GPU takes a second, and on a CPU nobody calls it."""
    from pallas_kernels.quantize import hopper

    return hopper


def _check_dtype(name: str, x: Array, allowed: tuple[str, ...]) -> None:
    if jnp.dtype(x.dtype).name not in allowed:
        raise ValueError(f"{name}: dtype {x.dtype}: has to be one of {', '.join(allowed)}; cast it")


def _operand(operand: str | None) -> Operand | None:
    if operand in (None, "left", "right"):
        return cast(Operand | None, operand)
    raise ValueError(f"operand={operand!r}: has to be 'left' or 'right', the side of Wgrad that takes the columns, or None")


def _check_rows(name: str, x: Array) -> None:
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name}: shape {x.shape}: has to be [rows, columns], none of them 0; reshape it")


def _check_halves(name: str, x: Array) -> None:
    _check_rows(name, x)
    if x.shape[1] % 2:
        raise ValueError(f"{name}: shape {x.shape}: a row has to hold gate and up, as many of each; concatenate them")


def _check_scales(name: str, scales: Array, shape: tuple[int, ...]) -> None:
    expected = (-(-shape[1] // BLOCK), -(-shape[0] // BLOCK) * BLOCK)
    if scales.shape != expected:
        raise ValueError(f"{name}: shape {scales.shape}: values of {shape} need {expected}; pass what quantize_rows returns")


def _check_gates(gates: Array | None, rows: int) -> None:
    if gates is not None and gates.shape != (rows,):
        raise ValueError(f"gates: shape {gates.shape}: hidden has {rows} rows; pass one number a row, or None")
