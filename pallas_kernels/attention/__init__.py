"""Causal softmax attention at the widths of MLA and its gradients (2307.08691, algorithms 1 and 2), in training and prefill.

Queries and keys may come in two parts, as MLA has them, so that nobody has to put them side by side: `q` and `k`, and `rotated`, whose
keys all heads share. `q` may have more columns than `k`, which are not read: a projection as it is, before its last ones were rotated.

`impl` is "reference" (plain JAX), "pallas" (the kernels for Hopper GPUs) or "auto" (the kernels where there is a Hopper GPU).
What the kernels cannot take raises `NotImplementedError`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.attention import reference
from pallas_kernels.backend import use_pallas

Rotated = tuple[Float[Array, "b t h p"], Float[Array, "b t p"]]  # of queries; of keys


def attention(
    q: Float[Array, "b t h q"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    rotated: Rotated | None,
    starts: Int32[Array, "b t"] | None,
    scale: float,
    impl: str = "auto",
) -> tuple[Float[Array, "b t h v"], Float32[Array, "b h t"]]:
    """`softmax(scale [q ; q_r] [k ; k_r]^T) v`, where a query sees keys up to its own position, and log2 of the sums of exponentials.

    starts: the first position that each query sees, where its document begins, which never falls along a row; None: all see the first.
    The kernels pass over keys of other documents.
    """
    if not use_pallas(impl):
        return reference.attention(q, k, v, rotated, starts, scale)
    _check(q, k, v, rotated)
    # Only here: Mosaic GPU takes a second to import, and on a CPU nobody calls it.
    from pallas_kernels.attention import hopper

    out, log_sums = hopper.attention(*_parts(q, k, v, rotated), starts, scale)
    return out[:, : q.shape[1]], log_sums[..., : q.shape[1]]


def attention_backward(
    q: Float[Array, "b t h q"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    rotated: Rotated | None,
    starts: Int32[Array, "b t"] | None,
    out: Float[Array, "b t h v"],
    gradient: Float[Array, "b t h v"],
    log_sums: Float32[Array, "b h t"],
    scale: float,
    impl: str = "auto",
) -> tuple[Float[Array, "b t h q"], Float[Array, "b t h k"], Float[Array, "b t h v"], Rotated | None]:
    """Gradients of `q`, `k`, `v` and `rotated`, given that of the output of `attention`.

    The kernel adds up the gradient of queries in float32 in whatever order its blocks come, so that its last bits differ from run to run.
    """
    if not use_pallas(impl):
        return reference.attention_backward(q, k, v, rotated, starts, out, gradient, log_sums, scale)
    _check(q, k, v, rotated)
    from pallas_kernels.attention import hopper_backward
    from pallas_kernels.memory import whole_rows

    lines, length, width = hopper_backward.lines(log_sums, out, gradient), q.shape[1], k.shape[-1]
    operands = (*_parts(q, k, v, rotated), whole_rows(gradient, axis=1), lines, starts)
    dq, dk, dv = hopper_backward.gradients(*operands, scale)
    dq, (dk, *dk_r), dv = ((dq[:, :length] * scale).astype(q.dtype), [part[:, :length] for part in dk], dv[:, :length])
    of_rotated = (dq[..., width:], dk_r[0].sum(2, dtype=jnp.float32).astype(k.dtype)) if rotated else None
    return reference.widened(dq[..., :width], q), dk, dv, of_rotated


def unsupported(q: Array, k: Array, v: Array, rotated: Rotated | None) -> str | None:
    """Why the kernels cannot take operands of these types and widths; None if they can."""
    widths = [k.shape[-1], rotated[1].shape[-1]] if rotated else [k.shape[-1]]
    columns = " and ".join(map(str, widths))
    whole = sum(widths) in (64, 128, 192) and all(width % 64 == 0 for width in widths)
    reasons = {
        f"q: dtype {q.dtype}: the Hopper kernels read bfloat16 only": q.dtype != jnp.bfloat16,
        f"k: {columns} columns: the Hopper kernels take 64, 128 or 192, parts in multiples of 64": not whole,
        f"v: {v.shape[-1]} columns: the Hopper kernels take 64 or 128": v.shape[-1] not in (64, 128),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _check(*operands: Any) -> None:
    reason = unsupported(*operands)
    if reason:
        raise NotImplementedError(f"{reason}; use impl='reference'")


def _parts(q: Array, k: Array, v: Array, rotated: Rotated | None) -> tuple[tuple[Array, ...], tuple[Array, ...], Array]:
    """Operands as the kernels take them."""
    from pallas_kernels.memory import whole_rows

    whole = functools.partial(whole_rows, axis=1)
    parts = ((q, rotated[0]), (k, rotated[1])) if rotated else ((q,), (k,))
    of_q, of_k = (tuple(map(whole, part)) for part in parts)
    return of_q, of_k, whole(v)
