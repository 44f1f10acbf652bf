"""Attention and its gradients in plain JAX, scores and sums in float32: slow, and what the kernels are compared with.

Takes any float type, and holds all scores of a batch, [b, h, t, t], at once.
"""

import functools
import math

import jax
import jax.numpy as jnp

Array = jax.Array
Rotated = tuple[Array, Array]

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(q: Array, k: Array, v: Array, rotated: Rotated | None, starts: Array | None, scale: float) -> tuple[Array, Array]:
    """As `pallas_kernels.attention.attention`."""
    scores = _scores(*joined(q, k, rotated), starts, scale)
    largest = scores.max(-1, keepdims=True)
    p = jnp.exp2(scores - largest)
    total = p.sum(-1, keepdims=True)
    out = _product("bhts,bshv->bthv", p.astype(v.dtype), v) / total.transpose(0, 2, 1, 3)
    return out.astype(v.dtype), (largest + jnp.log2(total))[..., 0]


def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    rotated: Rotated | None,
    starts: Array | None,
    out: Array,
    gradient: Array,
    log_sums: Array,
    scale: float,
) -> tuple[Array, Array, Array, Rotated | None]:
    """As `pallas_kernels.attention.attention_backward`."""
    whole_q, whole_k = joined(q, k, rotated)
    p = jnp.exp2(_scores(whole_q, whole_k, starts, scale) - log_sums[..., None])
    of_row = _product("bthv,bthv->bht", out, gradient)
    d_scores = (p * (_product("bthv,bshv->bhts", gradient, v) - of_row[..., None])).astype(q.dtype)
    dq = (_product("bhts,bshk->bthk", d_scores, whole_k) * scale).astype(q.dtype)
    dk = (_product("bhts,bthk->bshk", d_scores, whole_q) * scale).astype(k.dtype)
    dv = _product("bhts,bthv->bshv", p.astype(v.dtype), gradient).astype(v.dtype)
    width = k.shape[-1]
    of_rotated = (dq[..., width:], dk[..., width:].sum(2, dtype=jnp.float32).astype(k.dtype)) if rotated else None
    return widened(dq[..., :width], q), dk[..., :width], dv, of_rotated


def joined(q: Array, k: Array, rotated: Rotated | None) -> tuple[Array, Array]:
    """Queries and keys with their parts side by side, for every head."""
    q = q[..., : k.shape[-1]]
    if rotated is None:
        return q, k
    q_r, k_r = rotated
    k_r = jnp.broadcast_to(k_r[:, :, None], (*k.shape[:3], k_r.shape[-1]))
    return jnp.concatenate([q, q_r], -1), jnp.concatenate([k, k_r], -1)


def widened(dq: Array, q: Array) -> Array:
    """Gradients of the first columns of q, and zeros for those that nobody read."""
    return jnp.pad(dq, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - dq.shape[-1])))


def _scores(q: Array, k: Array, starts: Array | None, scale: float) -> Array:
    """Powers of two of them are exponentials."""
    scores = _product("bthk,bshk->bhts", q, k) * (scale * math.log2(math.e))
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if starts is not None:
        seen &= (jnp.arange(k.shape[1]) >= starts[..., None])[:, None]
    return jnp.where(seen, scores, -jnp.inf)
