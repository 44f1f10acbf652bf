"""Gradients of causal softmax attention at the widths of MLA, from what the forward pass left (2307.08691, algorithm 2).

`impl` is "reference" (plain JAX), "pallas" (the kernel for Hopper GPUs) or "auto" (the kernel where there is a Hopper GPU).
What the kernel cannot take raises `NotImplementedError`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.attention import reference
from pallas_kernels.backend import use_pallas


def attention_backward(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    out: Float[Array, "b t h v"],
    gradient: Float[Array, "b t h v"],
    log_sums: Float32[Array, "b h t"],
    scale: float,
    impl: str = "auto",
) -> tuple[Float[Array, "b t h k"], Float[Array, "b t h k"], Float[Array, "b t h v"]]:
    """Gradients of q, k and v, given that of `out = softmax(scale q k^T) v`, where a query sees keys up to its own position.

    `log_sums` are log2 of the sums of exponentials of a query's scores, as of exp(scale q k^T). The kernel adds up the gradient of q
    in float32 in whatever order its blocks come, so that its last bits differ from run to run.
    """
    if not use_pallas(impl):
        return reference.attention_backward(q, k, v, out, gradient, log_sums, scale)
    reason = unsupported(q.dtype.name, q.shape[-1], v.shape[-1])
    if reason:
        raise NotImplementedError(f"{reason}; use impl='reference'")
    # Only here: Mosaic GPU takes a second to import, and on a CPU nobody calls it.
    from pallas_kernels.attention import hopper
    from pallas_kernels.memory import whole_rows

    lines, length = hopper.lines(log_sums, out, gradient), q.shape[1]
    q, k, v, gradient = (whole_rows(x, axis=1) for x in (q, k, v, gradient))
    dq, dk, dv = (x[:, :length] for x in hopper.gradients(q, k, v, gradient, lines, scale))
    return (dq * scale).astype(q.dtype), dk, dv


def unsupported(dtype: str, width: int, v_width: int) -> str | None:
    """Why the kernel cannot take queries and keys of `width` and values of `v_width` columns; None if it can."""
    reasons = {
        f"q: dtype {dtype}: the Hopper kernel reads bfloat16 only": jnp.dtype(dtype) != jnp.bfloat16,
        f"q: {width} columns: the Hopper kernel takes 64, 128 or 192": width not in (64, 128, 192),
        f"v: {v_width} columns: the Hopper kernel takes 64 or 128": v_width not in (64, 128),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
