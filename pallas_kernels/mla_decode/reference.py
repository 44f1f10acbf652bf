"""What the decode kernel computes, in plain JAX: attention over the pages of each sequence, in float32 (V2 2405.04434 sec. 2.1.2)."""

import jax
import jax.numpy as jnp

BLOCK = 128  # channels under one scale


def mla_decode(
    q: jax.Array, c_kv: jax.Array, k_r: jax.Array, table: jax.Array, lengths: jax.Array, scale: float, scales: jax.Array | None = None
) -> jax.Array:
    """See `pallas_kernels.mla_decode.mla_decode`."""
    tokens = q.shape[1]
    exact = _exact(q.dtype)
    latent, rope = _gather(c_kv, table).astype(exact), _gather(k_r, table).astype(exact)
    if scales is not None:
        latent = latent * jnp.repeat(_gather(scales, table), BLOCK, axis=-1)[..., : latent.shape[-1]].astype(exact)
    position = jnp.arange(latent.shape[1])
    limit = lengths[:, None] - tokens + 1 + jnp.arange(tokens)
    seen = position < limit[:, :, None]
    # Slots that nobody may see can hold anything: they must not come in, not even times zero.
    known = (position < lengths[:, None])[..., None]
    keys = jnp.where(known, jnp.concatenate([latent, rope], -1), 0)
    scores = jnp.einsum("bthw,bsw->bths", q.astype(exact), keys, precision="highest") * scale
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    largest = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(exact).min)
    weights = jnp.exp(scores - largest)
    total = jnp.einsum("bths,bsr->bthr", weights, keys[..., : latent.shape[-1]], precision="highest")
    return (total / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(exact).tiny)).astype(q.dtype)


def _exact(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _gather(pool: jax.Array, table: jax.Array) -> jax.Array:
    return pool[table].reshape(table.shape[0], -1, pool.shape[-1])
