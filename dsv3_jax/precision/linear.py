"""The one door to every matrix product of the model.

`linear` multiplies activations by one kernel, `grouped_linear` multiplies blocks of rows each by its own
expert's kernel. Master weights are float32; they are cast to the dtype of the activations here, at the
moment of use. Both are `custom_vjp`s so that the three products of a Linear (V3 sec. 3.3: Fprop, Dgrad,
Wgrad) are visible, and so that weight gradients leave in float32 whatever the activations are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def linear(x: Float[Array, "*b k"], kernel: Float[Array, "k n"]) -> Float[Array, "*b n"]:
    """Fprop: `x @ kernel` in the dtype of x. Its gradients are Dgrad (dtype of x) and Wgrad (float32 sum)."""
    return x @ kernel.astype(x.dtype)


def _linear_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, kernel), (x, kernel)


def _linear_bwd(residual: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residual
    dx = dy @ kernel.astype(x.dtype).T
    dw = jnp.einsum("mk,mn->kn", _rows(x), _rows(dy), preferred_element_type=jnp.float32)
    return dx, dw.astype(kernel.dtype)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


linear.defvjp(_linear_fwd, _linear_bwd)


@jax.custom_vjp
def grouped_linear(
    x: Float[Array, "blocks rows k"], kernel: Float[Array, "experts k n"], block_expert: Int[Array, " blocks"]
) -> Float[Array, "blocks rows n"]:
    """Each block of rows times the kernel of its expert; `block_expert` is sorted, experts may own no block.

    Rows that pad a block are zero, so they add nothing to Wgrad. The kernels of all blocks are gathered
    first: on a CPU this one batched product runs at the speed of a dense one, where `lax.ragged_dot`
    costs as many times more as there are experts.
    """
    return jnp.einsum("brk,bkn->brn", x, _kernel_of_blocks(kernel, block_expert, x.dtype))


def _kernel_of_blocks(kernel: Array, block_expert: Array, dtype: jnp.dtype) -> Array:
    return kernel.astype(dtype).at[block_expert].get(mode="promise_in_bounds")


def _grouped_fwd(x: Array, kernel: Array, block_expert: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return grouped_linear(x, kernel, block_expert), (x, kernel, block_expert)


def _grouped_bwd(residual: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, kernel, block_expert = residual
    dx = jnp.einsum("brn,bkn->brk", dy, _kernel_of_blocks(kernel, block_expert, x.dtype))
    return dx, _grouped_wgrad(x, dy, block_expert, kernel.shape).astype(kernel.dtype), None


def _grouped_wgrad(x: Array, dy: Array, block_expert: Array, shape: tuple[int, ...]) -> Array:
    """Sums each block's `x^T dy` into its expert, always in the same order.

    On a GPU the sum is a product with the one-hot experts: XLA's scatter fails to compile at these sizes there.
    """
    by_block = jnp.einsum("brk,brn->bkn", x, dy, preferred_element_type=jnp.float32)
    if jax.default_backend() == "cpu":
        return jax.ops.segment_sum(by_block, block_expert, shape[0], indices_are_sorted=True)
    one_hot = jax.nn.one_hot(block_expert, shape[0], dtype=jnp.float32)
    return jnp.einsum("be,bkn->ekn", one_hot, by_block, precision=jax.lax.Precision.HIGHEST)


grouped_linear.defvjp(_grouped_fwd, _grouped_bwd)
