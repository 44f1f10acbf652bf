"""Copies of tokens in the rows of a buffer, and sums of a token's rows. Both are gathers, so nothing depends on atomic addition."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Num


class Rows(NamedTuple):
    """Which token a row of the buffer is a copy of, and which rows a token has."""

    source: Int[Array, " rows"]  # n, the number of tokens: a row of zeros
    slot: Int[Array, "n k"]


@jax.custom_vjp
@jax.named_scope("dispatch")
def dispatch(x: Num[Array, "n d"], rows: Rows) -> Num[Array, "rows d"]:
    """Copies each token to its rows. Its gradient is `combine`."""
    words = _words(x)
    with_zero_row = jnp.concatenate([words, jnp.zeros_like(words[:1])])
    copies = with_zero_row.at[rows.source].get(mode="promise_in_bounds")
    return jax.lax.bitcast_convert_type(copies, x.dtype).reshape(-1, x.shape[1])


@jax.custom_vjp
@jax.named_scope("combine")
def combine(y: Num[Array, "rows d"], rows: Rows) -> Num[Array, "n d"]:
    """Sums the rows of each token, in float32. Its gradient is `dispatch`."""
    copies = y.at[rows.slot].get(mode="promise_in_bounds")
    return copies.astype(jnp.float32).sum(1).astype(y.dtype)


def _words(x: Array) -> Array:
    """The same bits, 32 at a time where a row has whole words: a GPU's thread gathers four numbers, whatever their size."""
    each = 4 // x.dtype.itemsize
    if each < 2 or x.shape[1] % each:
        return x
    return jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, each), jnp.uint32)


dispatch.defvjp(lambda x, rows: (dispatch(x, rows), rows), lambda rows, dy: (combine(dy, rows), None))
combine.defvjp(lambda y, rows: (combine(y, rows), rows), lambda rows, dy: (dispatch(dy, rows), None))
