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
    with_zero_row = jnp.concatenate([x, jnp.zeros_like(x[:1])])
    return with_zero_row.at[rows.source].get(mode="promise_in_bounds")


@jax.custom_vjp
@jax.named_scope("combine")
def combine(y: Num[Array, "rows d"], rows: Rows) -> Num[Array, "n d"]:
    """Sums the rows of each token, in float32. Its gradient is `dispatch`."""
    copies = y.at[rows.slot].get(mode="promise_in_bounds")
    return copies.astype(jnp.float32).sum(1).astype(y.dtype)


dispatch.defvjp(lambda x, rows: (dispatch(x, rows), rows), lambda rows, dy: (combine(dy, rows), None))
combine.defvjp(lambda y, rows: (combine(y, rows), rows), lambda rows, dy: (dispatch(dy, rows), None))
