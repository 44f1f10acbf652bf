"""The gradients in plain JAX, probabilities and sums in float32: slow, and what the kernel is compared with."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def attention_backward(
    q: Array, k: Array, v: Array, out: Array, gradient: Array, log_sums: Array, scale: float
) -> tuple[Array, Array, Array]:
    """As `pallas_kernels.attention.attention_backward`, in any float type; holds all scores of a batch, [b, h, t, t], at once."""
    product = lambda equation, *x: jnp.einsum(equation, *x, preferred_element_type=jnp.float32)  # noqa: E731
    scores = product("bthk,bshk->bhts", q, k) * (scale * math.log2(math.e))
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    p = jnp.exp2(jnp.where(seen, scores, -jnp.inf) - log_sums[..., None])
    of_row = product("bthv,bthv->bht", out, gradient)
    d_scores = (p * (product("bthv,bshv->bhts", gradient, v) - of_row[..., None])).astype(q.dtype)
    dq, dk = product("bhts,bshk->bthk", d_scores, k) * scale, product("bhts,bthk->bshk", d_scores, q) * scale
    dv = product("bhts,bthv->bshv", p.astype(v.dtype), gradient)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
