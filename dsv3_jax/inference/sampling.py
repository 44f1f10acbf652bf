"""Choosing the next token from scores."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt32

Number = Float[Array | np.ndarray, "..."] | float


class Sampling(NamedTuple):
    """How tokens are drawn: numbers, or arrays [b] where rows differ."""

    temperature: Number = 0.0  # 0: the most likely token
    top_p: Number = 1.0


GREEDY = Sampling()


def top_p_mask(scores: Float[Array, "b v"], top_p: Number) -> Float[Array, "b v"]:
    """The scores, -inf outside the smallest set of most likely tokens whose probability reaches `top_p`; the likeliest always stays."""
    order = jnp.argsort(scores, axis=-1, descending=True)
    sorted_probabilities = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=-1), axis=-1)
    before = jnp.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
    keep_sorted = (before < top_p).at[:, 0].set(True)
    keep = jnp.take_along_axis(keep_sorted, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, scores, -jnp.inf)


def probabilities(logits: Float[Array, "b v"], sampling: Sampling) -> Float[Array, "b v"]:
    """What `sample` draws from; at temperature 0 all of it on the most likely token."""
    likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])

    def drawn() -> Array:
        return jnp.where(_column(sampling.temperature) == 0, likeliest, jax.nn.softmax(_nucleus(logits, sampling), axis=-1))

    return jax.lax.cond(_all_greedy(sampling), lambda: likeliest, drawn)


def sample(logits: Float[Array, "b v"], key: PRNGKeyArray, sampling: Sampling) -> Int[Array, " b"]:
    """Draws from `softmax(logits / temperature)` cut to its top-p nucleus; temperature 0 takes the most likely token."""

    def drawn() -> Array:
        return jax.random.categorical(key, _nucleus(logits, sampling), axis=-1)

    return jax.lax.cond(sampling.temperature == 0, lambda: jnp.argmax(logits, axis=-1), drawn).astype(jnp.int32)


def sample_rows(
    logits: Float[Array, "b v"], seeds: UInt32[Array, " b"], positions: Int[Array, " b"], sampling: Sampling
) -> Int[Array, " b"]:
    """`sample` with settings of each row; a draw depends on the row's seed and position, not on the other rows."""

    def drawn() -> Array:
        return draw(probabilities(logits, sampling), keys_at(seeds, positions))

    return jax.lax.cond(_all_greedy(sampling), lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32), drawn)


def keys_at(seeds: UInt32[Array, " b"], positions: Int[Array, " b"]) -> Key[Array, " b"]:
    """The key of each row for what it draws at a position."""
    return jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seeds, positions)


def draw(chances: Float[Array, "b v"], keys: Key[Array, " b"]) -> Int[Array, " b"]:
    """A token of each row, with a key of its own, by chances that need not add up to 1."""
    return jax.vmap(jax.random.categorical)(keys, jnp.log(chances)).astype(jnp.int32)


def _all_greedy(sampling: Sampling) -> Array:
    return (jnp.asarray(sampling.temperature) == 0).all()


def _nucleus(logits: Array, sampling: Sampling) -> Array:
    return top_p_mask(logits / jnp.maximum(_column(sampling.temperature), 1e-6), _column(sampling.top_p))


def _column(setting: Number) -> Array:
    """A setting beside scores [b, v], whether it is one or one of each row."""
    return jnp.asarray(setting)[..., None]
