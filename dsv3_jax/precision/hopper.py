"""The products of `precision.linear` by the kernels for Hopper GPUs: the same recipe, one kernel for each step of it.

A tensor is quantized once in every orientation that a product will read. Between the two products of an FFN nothing
is written in bfloat16 but the hidden activation and its gradient: SwiGLU, its gradient and their quantization are one
kernel each. Weights are quantized again in the backward pass instead of being kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from dsv3_jax.precision.formats import E4M3
from dsv3_jax.precision.policy import Recipe, Role
from dsv3_jax.precision.quantize import BLOCK, Kernel, Quantized
from dsv3_jax.precision.rows import Rows, combine, dispatch
from pallas_kernels.gemm import gemm, wgrad
from pallas_kernels.grouped_gemm import (
    TILE,
    first_tiles,
    grouped_gemm,
    grouped_gemm_bf16,
    grouped_wgrad,
    grouped_wgrad_bf16,
    masked_gemm,
    masked_gemm_bf16,
)
from pallas_kernels.parts import Operand
from pallas_kernels.quantize import (
    gather_and_retile,
    quantize_and_keep,
    quantize_blocks,
    quantize_both,
    quantize_rows,
    retile,
    swiglu_backward,
    swiglu_quantize,
)

NO_GRADIENTS = "rows of a decoding step have no gradients: its weights are at rest, and no float32 masters"
_IMPL = "pallas"  # whoever calls this module has chosen


class Kept(NamedTuple):
    """What the backward pass keeps of an activation: 1x128 tiles, scales with rows last."""

    values: Float[Array, "m k"]
    scales: Float32[Array, "kb mp"]

    def as_reference(self) -> Quantized:
        """The same as the reference arranges it."""
        return Quantized(self.values, self.scales[:, : self.values.shape[0]].T, (1, BLOCK))


class Owners(NamedTuple):
    """Which expert owns each tile of 128 rows, and at which tile each begins; runs are multiples of `together` tiles."""

    expert_of_tile: Int32[Array, " tiles"]
    first_tile: Int32[Array, " e_plus_1"]
    together: int


class Few(NamedTuple):
    """Rows of a decoding step: every expert has a block of as many, and uses the first of them; what becomes of the others is not said.
    It has no gradients."""

    used: Int32[Array, " e"]

    @property
    def size(self) -> int:
        """Blocks, as of the array that says whose they are elsewhere."""
        return self.used.size


Routed = tuple[Rows, Owners | Few]


def unsupported(recipe: Recipe, dtype: Any, widths: tuple[int, ...], ffn_width: int | None, rows: int | None) -> str | None:
    """Why the kernels cannot run a product, or None. `dtype`: of activations; `widths`: of operands; `rows`: of a block of one expert."""
    if dtype != jnp.bfloat16:
        return f"activations are {dtype}, the kernels take bfloat16 (train.compute_dtype)"
    if recipe.fp8 and (recipe.input_tile, recipe.gradient_tile, recipe.weight_tile) != ((1, BLOCK), (1, BLOCK), (BLOCK, BLOCK)):
        return "the kernels know only tiles of 1x128 and 128x128 (precision.*_tile)"
    if any(width % 64 for width in widths) or (ffn_width or 0) % BLOCK:
        return f"widths {widths} have to be multiples of 64, and that of an FFN one of {BLOCK}"
    if rows is not None and rows % TILE:
        return f"blocks of {rows} rows have to be multiples of {TILE}"
    return None


@overload
def owners(block_expert: Array, rows: int, n_experts: int) -> Owners: ...
@overload
def owners(block_expert: Array | Few, rows: int, n_experts: int) -> Owners | Few: ...


@jax.named_scope("dispatch")
def owners(block_expert: Int[Array, " blocks"] | Few, rows: int, n_experts: int) -> Owners | Few:
    """From the expert of each block of rows; `n_experts` marks blocks that nobody owns."""
    if isinstance(block_expert, Few):
        return block_expert
    together = rows // TILE
    tiles = jnp.repeat(block_expert.astype(jnp.int32), together)
    return Owners(tiles, first_tiles(tiles, n_experts), together)


def quantized(x: Float[Array, "m k"], role: Role) -> tuple[Kept, Kept]:
    """An input as it is multiplied, and as the backward pass keeps it: the same, unless that is in another format."""
    if role.stored is E4M3:
        inputs = Kept(*quantize_rows(x, role.input_power_of_two, _IMPL))
        return inputs, inputs
    values, scales, *kept = quantize_and_keep(x, _IMPL)
    return Kept(values, scales), Kept(*kept)


def fprop(x: Kept, kernel: Kernel, owned: Owners | Few | None) -> Float[Array, "m n"]:
    """The product with a kernel, or with that of each row's owner; one at rest is quantized already."""
    if isinstance(kernel, Quantized):
        return _product(x, kernel.values, kernel.scales, owned)
    _, transposed, _, scales = quantize_blocks(kernel, _IMPL)
    return _product(x, transposed, scales, owned)


def gradients(kept: Kept, kernel: Array, owned: Owners | Few | None, dy: Float[Array, "m n"], role: Role) -> tuple[Array, Array]:
    """Dgrad and Wgrad."""
    owned = _with_gradients(owned)
    values, scales, *columns = quantize_both(dy, role.gradient_power_of_two, "right", _IMPL)
    dx = _times_kernel_transposed(Kept(values, scales), kernel, owned)
    return dx, _wgrad(retile(*kept, role.wgrad_power_of_two, "left", _IMPL), columns, owned)


def _with_gradients(owned: Owners | Few | None) -> Owners | None:
    """The same, unless rows have no gradients."""
    if isinstance(owned, Few):
        raise NotImplementedError(NO_GRADIENTS)
    return owned


def ffn(
    x: Kept, up: Kernel, gates: Float32[Array, " m"] | None, down: Kernel, routed: Routed | None, down_role: Role
) -> tuple[Float[Array, "n n_out"], Kept]:
    """`(gates * swiglu(x up)) down`, and what is kept of the input of SwiGLU. `routed`: of the rows of each token, summed.

    x are tokens, not their copies in the rows of experts: so tokens are what a backward pass keeps.
    """
    rows, owned = routed or (None, None)
    hidden = fprop(x if rows is None else _arranged(x, rows), up, owned)
    *activated, values, scales = swiglu_quantize(hidden, gates, down_role.input_power_of_two, _IMPL)
    return _summed(fprop(Kept(*activated), down, owned), rows), Kept(values, scales)


def ffn_gradients(
    kept: tuple[Kept, Kept],
    up: Array,
    gates: Float32[Array, " m"] | None,
    down: Array,
    routed: Routed | None,
    dy: Float[Array, "n n_out"],
    roles: tuple[Role, Role],
) -> tuple[Array, Array, Array | None, Array]:
    """Gradients of x, up, gates and down."""
    (inputs, hidden), (rows, owned) = kept, routed or (None, None)
    owned = _with_gradients(owned)
    gradient, columns = _gradient_of_rows(dy, rows, roles[1].gradient_power_of_two)
    d_activated = _times_kernel_transposed(gradient, down, owned)
    powers = roles[0].gradient_power_of_two, roles[1].wgrad_power_of_two
    values, scales, *d_hidden, activated, of_activated, d_gates = swiglu_backward(*hidden, gates, d_activated, *powers, True, _IMPL)
    dx = _summed(_times_kernel_transposed(Kept(values, scales), up, owned), rows)
    power = roles[0].wgrad_power_of_two
    columns_of_inputs = retile(*inputs, power, "left", _IMPL) if rows is None else _turned(inputs, rows, power, False, "left")[1]
    d_up = _wgrad(columns_of_inputs, d_hidden, owned)
    return dx, d_up, d_gates, _wgrad((activated, of_activated), columns, owned)


def grouped_bf16(x: Float[Array, "m k"], kernel: Float[Array, "e k n"], owned: Owners | Few) -> Float[Array, "m n"]:
    """The product of the BF16 policy, with weights as they lie: turned ones would be written anew in every pass, and for every token."""
    if isinstance(owned, Few):
        by_expert = x.reshape(owned.used.size, -1, x.shape[1])
        return masked_gemm_bf16(by_expert, _cast(kernel, x), owned.used, _IMPL).reshape(x.shape[0], -1)
    return grouped_gemm_bf16(x, _cast(kernel, x), owned.expert_of_tile, owned.together, _IMPL, contraction_first=True)


def grouped_gradients_bf16(
    x: Float[Array, "m k"], kernel: Float[Array, "e k n"], owned: Owners, dy: Float[Array, "m n"]
) -> tuple[Array, Array]:
    """Dgrad and Wgrad of the BF16 policy."""
    dx = grouped_gemm_bf16(dy, _cast(kernel, dy), owned.expert_of_tile, owned.together, _IMPL)
    return dx, grouped_wgrad_bf16(x, dy, owned.first_tile, _IMPL)


@jax.named_scope("cast_weights")
def _cast(kernel: Array, x: Array) -> Array:
    return kernel.astype(x.dtype)


def _gradient_of_rows(dy: Array, rows: Rows | None, power_of_two: bool) -> tuple[Kept, list[Array]]:
    """Both orientations. What dispatch sends, by powers of two, is rounded as it sends it, and re-tiled: nothing is changed where it has
    been sent. So routed and shared experts, whose gradient is the same, begin with the same call, which XLA makes once."""
    if not power_of_two:
        assert rows is None, "gradients of routed experts have scales by powers of two"
        values, scales, *columns = quantize_both(dy, power_of_two, "right", _IMPL)
        return Kept(values, scales), columns
    tokens = Kept(*quantize_rows(dy, power_of_two, _IMPL))
    if rows is None:
        return tokens, [*retile(*tokens, power_of_two, "right", _IMPL)]
    gradient, columns = _turned(tokens, rows, power_of_two, True, "right")
    assert gradient is not None
    return gradient, columns


def _turned(tokens: Kept, rows: Rows, power_of_two: bool, keep: bool, operand: Operand) -> tuple[Kept | None, list[Array]]:
    """Columns of the rows of experts, and these rows themselves, if they are needed."""
    if tokens.values.shape[1] % BLOCK:  # which the kernel for gathered rows does not take
        arranged = _arranged(tokens, rows)
        return arranged if keep else None, [*retile(*arranged, power_of_two, operand, _IMPL)]
    scales = _scales_of(tokens, rows)
    values, *columns = gather_and_retile(tokens.values, scales, rows.source, power_of_two, keep, operand, _IMPL)
    return None if values is None else Kept(values, scales), columns


def _arranged(tokens: Kept, rows: Rows) -> Kept:
    """Copies of quantized tokens in the rows of experts."""
    return Kept(dispatch(tokens.values, rows), _scales_of(tokens, rows))


@jax.named_scope("dispatch")
def _scales_of(tokens: Kept, rows: Rows) -> Float32[Array, "kb m"]:
    return tokens.scales.at[:, rows.source].get(mode="fill", fill_value=1)


def _summed(y: Array, rows: Rows | None) -> Array:
    return y if rows is None else combine(y, rows)


def _times_kernel_transposed(x: Kept, kernel: Array, owned: Owners | None) -> Array:
    values, _, scales, _ = quantize_blocks(kernel, _IMPL)
    return _product(x, values, scales, owned)


def _product(x: Kept, b: Array, b_scales: Array, owned: Owners | Few | None) -> Array:
    if owned is None:
        return gemm(*x, b, b_scales, _IMPL)
    if isinstance(owned, Few):
        experts, (rows, width), tiles = owned.used.size, x.values.shape, len(x.scales)
        scales = x.scales[:, :rows].reshape(tiles, experts, -1).swapaxes(0, 1)
        return masked_gemm(x.values.reshape(experts, -1, width), scales, b, b_scales, owned.used, _IMPL).reshape(rows, -1)
    return grouped_gemm(*x, b, b_scales, owned.expert_of_tile, owned.together, _IMPL)


def _wgrad(x: Sequence[Array], dy: Sequence[Array], owned: Owners | None) -> Array:
    """From values and scales of 128x1 tiles, turned."""
    if owned is None:
        return wgrad(x[0], x[1], dy[0], dy[1], impl=_IMPL)
    return grouped_wgrad(x[0], x[1], dy[0], dy[1], owned.first_tile, impl=_IMPL)
