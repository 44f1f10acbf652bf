"""Causal attention at MLA widths, behind one function that a kernel can stand in for.

Queries and keys are `qk_head_dim` wide, values `v_head_dim`. `reference` is plain JAX in float32 and works everywhere. For bf16 on
NVIDIA GPUs there are two fused ways: `pallas`, our kernels for Hopper (`pallas_kernels.attention`), takes the parts of queries and keys as
they lie; `cudnn` wants equal widths, so the values are padded with zeros to the query width and the padding is cut off the output.
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.precision.linear import Prepared, prepare, restored
from dsv3_jax.precision.policy import AFTER_ATTENTION, BF16, Recipe
from pallas_kernels.attention import Rotated, attention, attention_backward, unsupported
from pallas_kernels.attention.reference import joined
from pallas_kernels.backend import is_hopper, platform

_log = logging.getLogger(__name__)


@functools.cache
def resolve_implementation(impl: str, backend: str, dtype: str, hopper: bool = False, reason: str | None = None) -> str:
    """Turns `auto` into the implementation for this backend and dtype, and logs the choice once.

    hopper: whether it is a Hopper GPU; reason: why its kernels cannot take the operands.
    """
    if impl != "auto":
        return impl
    choice = "reference"
    if backend == "gpu" and dtype in ("bfloat16", "float16"):
        choice = "pallas" if hopper and reason is None else "cudnn"
    because = f"; {reason}" if reason and choice == "cudnn" else ""
    _log.info("attention: impl=auto picked %s (backend %s, %s%s)", choice, backend, dtype, because)
    return choice


class Attended(NamedTuple):
    """The output, and in FP8 what the Linear after it takes, whose backward pass and attention's own keep the same of it."""

    out: Float[Array, "b t h v"]
    prepared: Prepared | None  # None: the Linear makes its own


def attend(
    q: Float[Array, "b t h q"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    *,
    scale: float,
    rotated: Rotated | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    impl: str = "auto",
    recipe: Recipe = BF16,
) -> Attended:
    """Causal softmax attention (V3 eq. 10). With `segment_ids`, which rise along a row, a token sees only its own segment.

    rotated: a second part of queries, and one of keys that all heads share; columns of q past those of k are then not read.
    The output is kept for the backward pass as "attention_out", in FP8 by the Linear after it, which `recipe` is of. The kernels keep
    the sums of their softmax too, as "attention_sums", so that it is not computed again where both are kept, and in FP8 their backward
    pass reads the Linear's E5M6 (V3 sec. 3.3.2). impl: auto | reference | pallas | cudnn. Raises NotImplementedError for what the last
    two cannot do: in `cudnn` a document mask, in `pallas` widths that its kernels do not take.
    """
    reason = unsupported(q, k, v, rotated)
    chosen = resolve_implementation(impl, platform(), q.dtype.name, is_hopper(), reason)
    if chosen == "pallas":
        if reason:
            raise NotImplementedError(f"precision.impl='pallas': {reason}; use precision.impl='auto' or 'reference'")
        starts = None if segment_ids is None else _starts(segment_ids)
        return Attended(*_by_kernels(q, k, v, rotated, starts, scale, recipe))
    if chosen == "cudnn" and segment_ids is not None:
        remedy = "use precision.impl=reference or data.document_mask=False"
        raise NotImplementedError(f"{chosen} attention has no document mask here; {remedy}")
    q, k = joined(q, k, rotated)
    out = _causal_reference(q, k, v, scale, segment_ids) if chosen == "reference" else _cudnn(q, k, v, scale)
    return Attended(out if recipe.fp8 else checkpoint_name(out, "attention_out"), None)


# Queries of long rows go in four pieces, each with the keys up to its end: little over half the scores
# of the full square are computed, and they fit a CPU's cache better.
_PIECES, _LONG = 4, 256


def _causal_reference(q: Array, k: Array, v: Array, scale: float, segment_ids: Array | None) -> Array:
    t = q.shape[1]
    pieces = _PIECES if t >= _LONG and t % _PIECES == 0 else 1
    outputs = []
    for start in range(0, t, t // pieces):
        end = start + t // pieces
        mask = (jnp.arange(end) <= jnp.arange(start, end)[:, None])[None]
        if segment_ids is not None:
            mask = mask & (segment_ids[:, start:end, None] == segment_ids[:, None, :end])
        outputs.append(masked_attention(q[:, start:end], k[:, :end], v[:, :end], scale, mask))
    return jnp.concatenate(outputs, axis=1)


def masked_attention(
    q: Float[Array, "b t h k"], k: Float[Array, "b s h k"], v: Float[Array, "b s h v"], scale: float, mask: Bool[Array, "#b t s"]
) -> Float[Array, "b t h v"]:
    """Softmax attention where `mask` is True, scores and softmax in float32. Every query must see a key."""
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    probabilities = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", probabilities.astype(v.dtype), v)


def _starts(segment_ids: Array) -> Array:
    """Where the segment of each token begins."""
    positions = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    begins = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)), mode="edge")[:, :-1]
    return jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _by_kernels(
    q: Array, k: Array, v: Array, rotated: Rotated | None, starts: Array | None, scale: float, recipe: Recipe
) -> tuple[Array, Prepared | None]:
    out, _ = attention(q, k, v, rotated, starts, scale, "pallas")
    return out, _prepared(out, recipe)


def _prepared(out: Array, recipe: Recipe) -> Prepared | None:
    return prepare(out.reshape(*out.shape[:2], -1), recipe, AFTER_ATTENTION)


def _by_kernels_fwd(
    q: Array, k: Array, v: Array, rotated: Rotated | None, starts: Array | None, scale: float, recipe: Recipe
) -> tuple[tuple[Array, Prepared | None], tuple]:
    out, log_sums = attention(q, k, v, rotated, starts, scale, "pallas")
    log_sums = checkpoint_name(log_sums, "attention_sums")
    if not recipe.fp8:
        out = checkpoint_name(out, "attention_out")
    prepared = _prepared(out, recipe)
    return (out, prepared), (q, k, v, rotated, starts, log_sums, prepared.kept if prepared else out)


def _by_kernels_bwd(scale: float, recipe: Recipe, residual: tuple, gradient: tuple[Array, Any]) -> tuple:
    q, k, v, rotated, starts, log_sums, kept = residual
    out = restored(kept, q.dtype.name).reshape(v.shape) if recipe.fp8 else kept
    return *attention_backward(q, k, v, rotated, starts, out, gradient[0], log_sums, scale, "pallas"), None


_by_kernels.defvjp(_by_kernels_fwd, _by_kernels_bwd)


def _cudnn(q: Array, k: Array, v: Array, scale: float) -> Array:
    v_width = v.shape[-1]
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - v_width)))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
    return out[..., :v_width]
