"""The one door to every matrix product of the model.

`linear` multiplies activations by one kernel, `grouped_linear` multiplies blocks of rows each by its own expert's
kernel; `swiglu_linear` and `grouped_swiglu_linear` put the activation of an FFN before that. Each is a `custom_vjp`,
so that the three products of a Linear are visible (V3 sec. 3.3.1):

    Fprop  y  = x W          FP8: 1x128 by 128x128
    Dgrad  dx = dy W^T       FP8: 1x128 by 128x128
    Wgrad  dW = x^T dy       FP8: 1x128 by 128x1, both tiles along tokens; summed and returned in float32

`ffn` and `routed_ffn` are whole FFNs, which the kernels for Hopper fuse further (`precision.hopper`).

Master weights are float32 and are cast, or quantized, here at the moment of use. What a backward pass keeps of x is
x itself in the dtype of activations, or in FP8 its values and scales.
"""

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.precision import hopper
from dsv3_jax.precision.formats import E4M3
from dsv3_jax.precision.hopper import Few
from dsv3_jax.precision.matmul import quantized_matmul
from dsv3_jax.precision.policy import BF16, EXPERT_DOWN, EXPERT_UP, LINEAR, Recipe, Role
from dsv3_jax.precision.quantize import BLOCK, Kernel, Quantized, dequantize, kernel_shape, quantize, retile
from dsv3_jax.precision.rows import Rows, combine, dispatch
from pallas_kernels.backend import platform, use_pallas

_log = logging.getLogger(__name__)

BlockExpert = Int[Array, " blocks"] | Few | None  # None: one kernel for all rows
Roles = tuple[Role, Role]  # of an FFN's first and second product


class Prepared(NamedTuple):
    """What is made of an input in FP8."""

    inputs: Any  # hopper.Kept for the product by the kernels; None for the reference
    kept: Any  # for the backward pass: hopper.Kept, Quantized


def linear(
    x: Float[Array, "*b k"],
    kernel: Float[Array, "k n"] | Quantized,
    recipe: Recipe = BF16,
    role: Role = LINEAR,
    prepared: Prepared | None = None,
) -> Float[Array, "*b n"]:
    """`x @ kernel` in the dtype of x. Its gradients are Dgrad (dtype of x) and Wgrad (float32 sum). `prepared`: by `prepare`, of x."""
    rows = _rows(x)
    y = _product(rows, kernel, None, prepared, recipe, role)
    return _tapped(rows, kernel, None, recipe, role, y).reshape(*x.shape[:-1], kernel_shape(kernel)[1])


def prepare(x: Float[Array, "*b k"], recipe: Recipe, role: Role) -> Prepared | None:
    """For FP8, where more than one need x quantized, or what a backward pass keeps of it: made, named and kept once for all. No gradient
    goes through it. None without FP8."""
    if not recipe.fp8:
        return None
    rows = jax.lax.stop_gradient(_rows(x))
    if _on_kernels(recipe, x, x.shape[-1:]):
        return _for_kernels(rows, None, role)
    return Prepared(None, _named(_kept(rows, recipe, role), role.name))


def restored(kept: Quantized | hopper.Kept, dtype: str) -> Float[Array, "m k"]:
    """Rows of an input, as far as they are kept."""
    return dequantize(kept.as_reference() if isinstance(kept, hopper.Kept) else kept, dtype)


def grouped_linear(
    x: Float[Array, "blocks rows k"],
    kernel: Float[Array, "experts k n"] | Quantized,
    block_expert: Int[Array, " blocks"] | Few,
    recipe: Recipe = BF16,
    role: Role = LINEAR,
) -> Float[Array, "blocks rows n"]:
    """Each block of rows times the kernel of its expert; `block_expert` is sorted, experts may own no block.
    The number of experts stands for blocks that none owns, which hold zeros. Or every expert has one block, of a `Few` rows.

    Rows that pad a block are zero, so they add nothing to Wgrad. The kernels of all blocks are gathered
    first: on a CPU this one batched product runs at the speed of a dense one, where `lax.ragged_dot`
    costs as many times more as there are experts. In FP8 the tiles of Wgrad along rows start with each block.
    """
    return _tapped(x, kernel, block_expert, recipe, role, _product(x, kernel, block_expert, None, recipe, role))


@jax.named_scope("swiglu")
def swiglu(gate_up: Float[Array, "*b two_f"]) -> Float[Array, "*b f"]:
    """`silu(gate) * up` of a row that holds [gate, up]."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def swiglu_linear(
    hidden: Float[Array, "*b two_f"], kernel: Float[Array, "f n"] | Quantized, recipe: Recipe = BF16, role: Role = LINEAR
) -> Float[Array, "*b n"]:
    """`swiglu(hidden) @ kernel`; the backward pass keeps `hidden` (in FP8: quantized) and computes the activation again."""
    ones = jnp.ones((), hidden.dtype)
    return _activated_product(_rows(hidden), ones, kernel, None, recipe, role).reshape(*hidden.shape[:-1], kernel_shape(kernel)[1])


def grouped_swiglu_linear(
    hidden: Float[Array, "blocks rows two_f"],
    gates: Float[Array, "blocks rows 1"],
    kernel: Float[Array, "experts f n"] | Quantized,
    block_expert: Int[Array, " blocks"] | Few,
    recipe: Recipe = BF16,
) -> Float[Array, "blocks rows n"]:
    """`(gates * swiglu(hidden)) @ kernel[block_expert]`: the down-projection of routed experts."""
    return _activated_product(hidden, gates.astype(hidden.dtype), kernel, block_expert, recipe, EXPERT_DOWN)


def ffn(
    x: Float[Array, "*b d"],
    up: Float[Array, "d two_f"] | Quantized,
    down: Float[Array, "f n"] | Quantized,
    recipe: Recipe = BF16,
    roles: Roles = (LINEAR, LINEAR),
    prepared: Prepared | None = None,
) -> Float[Array, "*b n"]:
    """`swiglu(x @ up) @ down`, where a row of `x @ up` holds [gate, up]. `prepared`: by `prepare`, of x, for the first of `roles`."""
    width, n = kernel_shape(down)
    if recipe.fp8 and _on_kernels(recipe, x, (*kernel_shape(up), width, n), width):
        return _fused_ffn(_rows(x), prepared, _Weights(up, None, down), None, roles).reshape(*x.shape[:-1], n)
    y = swiglu_linear(linear(x, up, recipe, roles[0], prepared), down, recipe, roles[1])
    return _rounded_gradient(y) if roles[1].gradient_power_of_two and recipe.sends_gradients else y


def routed_ffn(
    x: Float[Array, "n d"],
    rows: Rows,
    up: Float[Array, "experts d two_f"] | Quantized,
    gates: Float[Array, " rows"],
    down: Float[Array, "experts f n_out"] | Quantized,
    block_expert: Int[Array, " blocks"] | Few,
    recipe: Recipe = BF16,
    prepared: Prepared | None = None,
) -> Float[Array, "n n_out"]:
    """Each token's sum, over its rows, of `(gate * swiglu(x up)) down` with the kernels of the expert that owns the row's block.

    By the kernels for FP8, a token is quantized once and its rows are copies in one byte a number, in both directions. `prepared`: by
    `prepare`, of x, for EXPERT_UP.
    """
    height = gates.size // block_expert.size
    _, width, _ = down_shape = kernel_shape(down)
    if recipe.fp8 and _on_kernels(recipe, x, (*kernel_shape(up)[1:], *down_shape[1:]), width, _height(height, block_expert)):
        weights = _Weights(up, gates.astype(jnp.float32), down)
        return _fused_ffn(x, prepared, weights, (rows, block_expert), (EXPERT_UP, EXPERT_DOWN))
    hidden = grouped_linear(dispatch(x, rows).reshape(-1, height, x.shape[1]), up, block_expert, recipe, EXPERT_UP)
    y = grouped_swiglu_linear(hidden, gates.reshape(-1, height, 1), down, block_expert, recipe)
    y = combine(_rows(y), rows)
    return _rounded_gradient(y) if recipe.sends_gradients else y


@jax.custom_vjp
def _rounded_gradient(y: Array) -> Array:
    """y. Its gradient is rounded as dispatch sends it, also where nothing is sent, so that it does not depend on the mesh."""
    return y


def _rounded(_: None, dy: Array) -> tuple[Array]:
    return (dequantize(quantize(dy, (1, BLOCK), power_of_two=EXPERT_DOWN.gradient_power_of_two), dy.dtype.name),)


_rounded_gradient.defvjp(lambda y: (y, None), _rounded)


# --- one product and its gradients ---


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _product(x: Array, kernel: Kernel, block_expert: BlockExpert, prepared: Prepared | None, recipe: Recipe, role: Role) -> Array:
    # Nothing is kept, so there is no other format to make.
    return _product_fwd(x, kernel, block_expert, prepared, recipe, dataclasses.replace(role, stored=E4M3))[0]


def _product_fwd(
    x: Array, kernel: Kernel, block_expert: BlockExpert, prepared: Prepared | None, recipe: Recipe, role: Role
) -> tuple[Array, tuple]:
    if recipe.fp8 and _on_kernels(recipe, x, kernel_shape(kernel)[-2:], rows=_height(x.shape[-2], block_expert)):
        inputs, kept = _for_kernels(_rows(x), prepared, role)
        y = hopper.fprop(inputs, kernel, _owners(x, kernel, block_expert))
        return y.reshape(*x.shape[:-1], -1), (kept, kernel, block_expert)
    if prepared and prepared.inputs is not None:
        prepared = None  # it was prepared without knowing the kernel's width
    kept = prepared.kept if prepared else _named(_kept(x, recipe, role), role.name) if recipe.fp8 else x
    return _fprop(x, kernel, block_expert, recipe, role), (kept, kernel, block_expert)


def _product_bwd(recipe: Recipe, role: Role, residual: tuple, dy: Array) -> tuple[Array, Array, None, None]:
    kept, kernel, block_expert = residual
    if isinstance(kept, hopper.Kept):
        dx, d_kernel = hopper.gradients(kept, kernel, _owners(dy, kernel, block_expert), _rows(dy), role)
        return dx.reshape(*dy.shape[:-1], -1), d_kernel, None, None
    return (*_gradients(kept, kernel, block_expert, dy, recipe, role), None, None)


_product.defvjp(_product_fwd, _product_bwd)


def _activated_product(hidden: Array, gates: Array, kernel: Kernel, block_expert: BlockExpert, recipe: Recipe, role: Role) -> Array:
    y = _swiglu_product(hidden, gates, kernel, block_expert, recipe, role)
    return y if recipe.tap is None else _tapped(_activated(hidden, gates, recipe), kernel, block_expert, recipe, role, y)


def _tapped(x: Array, kernel: Kernel, block_expert: BlockExpert, recipe: Recipe, role: Role, y: Array) -> Array:
    if recipe.tap is None:
        return y
    assert not isinstance(kernel, Quantized) and not isinstance(block_expert, Few), "a tap sees masters, and whole blocks"
    return recipe.tap(x, kernel, block_expert, role, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _swiglu_product(hidden: Array, gates: Array, kernel: Kernel, block_expert: BlockExpert, recipe: Recipe, role: Role) -> Array:
    return _swiglu_fwd(hidden, gates, kernel, block_expert, recipe, role)[0]


def _swiglu_fwd(hidden: Array, gates: Array, kernel: Kernel, block_expert: BlockExpert, recipe: Recipe, role: Role) -> tuple[Array, tuple]:
    kept = _named(quantize(hidden, recipe.input_tile) if recipe.fp8 else hidden, "swiglu_in")
    hidden = kept if isinstance(kept, Array) else hidden  # so the loop over layers sees that what is kept is used too
    y = _fprop(_activated(hidden, gates, recipe), kernel, block_expert, recipe, role).astype(hidden.dtype)
    return y, (kept, gates, kernel, block_expert)


@jax.named_scope("swiglu")
def _activated(hidden: Array, gates: Array, recipe: Recipe) -> Array:
    """The input of the product. What is going to be quantized is computed in float32 and rounded once."""
    wide = jnp.float32 if recipe.fp8 else hidden.dtype
    return swiglu(hidden.astype(wide)) * gates.astype(wide)


def _swiglu_bwd(recipe: Recipe, role: Role, residual: tuple, dy: Array) -> tuple[Array, Array, Array, None]:
    kept, gates, kernel, block_expert = residual
    hidden = dequantize(kept) if recipe.fp8 else kept
    activated, gradient_of_activation = jax.vjp(lambda h, g: _activated(h, g, recipe), hidden, gates)
    again = _kept(activated, recipe, role) if recipe.fp8 else activated
    d_activated, d_kernel = _gradients(again, kernel, block_expert, dy, recipe, role)
    d_hidden, d_gates = gradient_of_activation(d_activated.astype(activated.dtype))
    return d_hidden.astype(dy.dtype), d_gates, d_kernel, None


_swiglu_product.defvjp(_swiglu_fwd, _swiglu_bwd)


class _Weights(NamedTuple):
    """What an FFN multiplies by; each row of experts has a gate."""

    up: Kernel
    gates: Array | None
    down: Kernel


_Placed = tuple[Rows, Array | Few] | None  # rows of tokens, and the expert of each block of them; None: tokens as they lie, and no experts


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _fused_ffn(x: Array, prepared: Prepared | None, weights: _Weights, placed: _Placed, roles: Roles) -> Array:
    return _fused_fwd(x, prepared, weights, placed, roles)[0]


def _fused_fwd(x: Array, prepared: Prepared | None, weights: _Weights, placed: _Placed, roles: Roles) -> tuple[Array, tuple]:
    inputs, kept = _for_kernels(x, prepared, roles[0])
    y, hidden = hopper.ffn(inputs, *weights, _routed(placed, weights), roles[1])
    return y, (kept, _named(hidden, "swiglu_in"), weights, placed)


def _fused_bwd(roles: Roles, residual: tuple, dy: Array) -> tuple[Array, None, _Weights, None]:
    kept, hidden, weights, placed = residual
    up, gates, down = weights
    dx, d_up, d_gates, d_down = hopper.ffn_gradients((kept, hidden), up, gates, down, _routed(placed, weights), dy, roles)
    return dx, None, _Weights(d_up, d_gates, d_down), None


def _routed(placed: _Placed, weights: _Weights) -> hopper.Routed | None:
    if placed is None:
        return None
    rows, block_expert = placed
    return rows, hopper.owners(block_expert, rows.source.size // block_expert.size, kernel_shape(weights.up)[0])


_fused_ffn.defvjp(_fused_fwd, _fused_bwd)


def _on_kernels(recipe: Recipe, x: Array, widths: tuple[int, ...], ffn_width: int | None = None, rows: int | None = None) -> bool:
    """Whether the kernels for Hopper run this product: where they cannot, `impl="pallas"` is refused and "auto" says so."""
    if not use_pallas(recipe.impl):
        return False
    reason = "a tap sees the products one by one" if recipe.tap else hopper.unsupported(recipe, x.dtype, tuple(widths), ffn_width, rows)
    if reason is None:
        return True
    if recipe.impl == "pallas":
        raise NotImplementedError(f"precision.impl='pallas': {reason}; use precision.impl='auto' or 'reference'")
    _log_reference(reason)
    return False


@functools.cache
def _log_reference(reason: str) -> None:
    _log.info("impl=auto runs a product in plain JAX: %s", reason)


def _height(rows: int, block_expert: BlockExpert) -> int | None:
    """Rows of a block, where kernels work on whole tiles of them."""
    return None if block_expert is None or isinstance(block_expert, Few) else rows


def _owners(x: Array, kernel: Kernel, block_expert: BlockExpert) -> hopper.Owners | Few | None:
    return None if block_expert is None else hopper.owners(block_expert, x.shape[1], kernel_shape(kernel)[0])


def _for_kernels(rows: Array, prepared: Prepared | None, role: Role) -> Prepared:
    """What was prepared, if it was for the kernels."""
    if prepared and prepared.inputs is not None:
        return prepared
    inputs, kept = hopper.quantized(rows, role)
    return Prepared(inputs, _named(kept, role.name))


def _kept(x: Array, recipe: Recipe, role: Role) -> Quantized:
    """The input as the backward pass keeps it."""
    return quantize(x, recipe.input_tile, role.stored, role.wgrad_power_of_two)


def _named[T](kept: T, name: str) -> T:
    return jax.tree.map(lambda part: checkpoint_name(part, name), kept)


def _fprop(x: Array, kernel: Kernel, block_expert: BlockExpert, recipe: Recipe, role: Role) -> Array:
    if not recipe.fp8:
        assert not isinstance(kernel, Quantized), "kernels at rest are for FP8"
        if block_expert is not None and _on_kernels(recipe, x, kernel.shape[1:], rows=_height(x.shape[1], block_expert)):
            owned = hopper.owners(block_expert, x.shape[1], kernel.shape[0])
            return hopper.grouped_bf16(_rows(x), kernel, owned).reshape(*x.shape[:-1], -1)
        return jnp.matmul(x, _of_blocks(kernel.astype(x.dtype), block_expert))
    inputs = quantize(x, recipe.input_tile, E4M3, role.input_power_of_two)
    return quantized_matmul(inputs, _quantized_kernel(kernel, block_expert, recipe)).astype(x.dtype)


def _gradients(
    kept: Array | Quantized, kernel: Array, block_expert: BlockExpert, dy: Array, recipe: Recipe, role: Role
) -> tuple[Array, Array]:
    """Dgrad and Wgrad."""
    if isinstance(block_expert, Few):
        raise NotImplementedError(hopper.NO_GRADIENTS)
    if isinstance(kept, Quantized):
        gradient = quantize(dy, recipe.gradient_tile, E4M3, role.gradient_power_of_two)
        dx = quantized_matmul(gradient, _quantized_kernel(kernel, block_expert, recipe).transpose()).astype(dy.dtype)
        columns = retile(kept.transpose(), recipe.input_tile, E4M3, role.wgrad_power_of_two)
        rows = quantize(dy, recipe.gradient_tile[::-1], E4M3, role.gradient_power_of_two)
        return dx, _sum_over_blocks(quantized_matmul(columns, rows), kernel, block_expert)
    if block_expert is not None and _on_kernels(recipe, dy, kernel.shape[1:], rows=dy.shape[1]):
        owned = hopper.owners(block_expert, dy.shape[1], kernel.shape[0])
        dx, d_kernel = hopper.grouped_gradients_bf16(_rows(kept), kernel, owned, _rows(dy))
        return dx.reshape(kept.shape), d_kernel.astype(kernel.dtype)
    dx = jnp.matmul(dy, _of_blocks(kernel.astype(dy.dtype), block_expert).mT)
    by_block = jnp.einsum("...mk,...mn->...kn", kept, dy, preferred_element_type=jnp.float32)
    return dx, _sum_over_blocks(by_block, kernel, block_expert)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _of_blocks(per_expert: Array, block_expert: BlockExpert) -> Array:
    if block_expert is None or isinstance(block_expert, Few):
        return per_expert
    return per_expert.at[block_expert].get(mode="clip")  # blocks without an expert hold zeros


def _quantized_kernel(kernel: Kernel, block_expert: BlockExpert, recipe: Recipe) -> Quantized:
    quantized = kernel.transpose() if isinstance(kernel, Quantized) else quantize(kernel, recipe.weight_tile)
    return jax.tree.map(lambda part: _of_blocks(part, block_expert), quantized)


def _sum_over_blocks(by_block: Array, kernel: Array, block_expert: Array | None) -> Array:
    """Adds each block's `x^T dy` to its expert, always in the same order; in the dtype of the kernel.

    On a GPU the sum is a product with the one-hot experts: XLA's scatter fails to compile at these sizes there.
    """
    if block_expert is None:
        return by_block.astype(kernel.dtype)
    experts = kernel.shape[0]
    if platform() == "cpu":
        return jax.ops.segment_sum(by_block, block_expert, experts, indices_are_sorted=True).astype(kernel.dtype)
    one_hot = jax.nn.one_hot(block_expert, experts, dtype=jnp.float32)
    return jnp.einsum("be,bkn->ekn", one_hot, by_block, precision=jax.lax.Precision.HIGHEST).astype(kernel.dtype)
