"""Choosing the next token from scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def top_p_mask(scores: Float[Array, "b v"], top_p: Float[Array, ""] | float) -> Float[Array, "b v"]:
    """The scores, -inf outside the smallest set of most likely tokens whose probability reaches `top_p`; the likeliest always stays."""
    order = jnp.argsort(scores, axis=-1, descending=True)
    sorted_probabilities = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
    before = jnp.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
    keep_sorted = (before < top_p).at[:, 0].set(True)
    keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, scores, -jnp.inf)


def probabilities(
    logits: Float[Array, "b v"], temperature: Float[Array, ""] | float, top_p: Float[Array, ""] | float
) -> Float[Array, "b v"]:
    """What `sample` draws from; at temperature 0 all of it on the most likely token."""
    drawn = jax.nn.softmax(top_p_mask(logits / jnp.maximum(temperature, 1e-6), top_p), axis=-1)
    return jnp.where(temperature == 0, jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1]), drawn)


def sample(
    logits: Float[Array, "b v"], key: PRNGKeyArray, temperature: Float[Array, ""] | float, top_p: Float[Array, ""] | float
) -> Int[Array, " b"]:
    """Draws from `softmax(logits / temperature)` cut to its top-p nucleus; temperature 0 takes the most likely token."""
    cut = top_p_mask(logits / jnp.maximum(temperature, 1e-6), top_p)
    drawn = jax.random.categorical(key, cut, axis=-1)
    return jnp.where(temperature == 0, jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)
