"""Losses of pre-training, returned and never left behind as side effects (V3 eq. 17-25)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mtp import predict_ahead, target_weights
from dsv3_jax.model.transformer import Execution, Params, RouterBias, TrunkOutput, head_kernel, trunk

# Logits held at once, in elements: 1 GiB of float32.
LOGITS_PER_CHUNK = 2**28


class HeadSums(NamedTuple):
    """Sums over the tokens that count: negative log-likelihood in nats, targets with the highest score, tokens."""

    nll: Float[Array, ""]
    correct: Float[Array, ""]
    tokens: Float[Array, ""]


class Losses(NamedTuple):
    """What one forward pass says of a batch of rows."""

    main: HeadSums
    mtp: list[HeadSums]
    balance_loss: Float[Array, ""]  # sum over layers, before aux_loss_alpha
    load: RouterBias  # tokens each expert received, laid out as the router bias
    fullness: Float[Array, ""]  # of the fullest dispatch buffer of all layers


def add_losses(a: Losses, b: Losses) -> Losses:
    """Of two batches, or of two parts of the model over one."""
    return jax.tree.map(jnp.add, a, b)._replace(fullness=jnp.maximum(a.fullness, b.fullness))


def psum_losses(losses: Losses, axes: str | tuple[str, ...]) -> Losses:
    """`add_losses` over the devices along mesh axes."""
    return jax.lax.psum(losses, axes)._replace(fullness=jax.lax.pmax(losses.fullness, axes))


@jax.custom_vjp
def head_sums(hidden: Float[Array, "n d"], kernel: Float[Array, "d v"], targets: Int[Array, " n"], weights: Float[Array, " n"]) -> HeadSums:
    """Cross-entropy of the head over n tokens, a chunk of logits at a time.

    Differentiable in `nll` with respect to hidden and kernel. The gradient is made in the same pass as
    the loss, while the chunk's logits exist, so logits are neither stored nor computed twice.
    """
    sums, _ = _over_chunks(hidden, kernel, targets, weights, with_gradient=False)
    return sums


def _head_fwd(hidden: Array, kernel: Array, targets: Array, weights: Array) -> tuple[HeadSums, tuple[Array, Array]]:
    return _over_chunks(hidden, kernel, targets, weights, with_gradient=True)


def _head_bwd(gradients: tuple[Array, Array], cotangent: HeadSums) -> tuple[Array, Array, None, None]:
    d_hidden, d_kernel = gradients
    return (cotangent.nll * d_hidden).astype(d_hidden.dtype), cotangent.nll * d_kernel, None, None


head_sums.defvjp(_head_fwd, _head_bwd)


def _over_chunks(hidden: Array, kernel: Array, targets: Array, weights: Array, with_gradient: bool) -> tuple[HeadSums, tuple[Array, Array]]:
    n, d = hidden.shape
    chunk = min(n, max(LOGITS_PER_CHUNK // kernel.shape[1], 1))
    padding = -n % chunk

    def chunked(a: Array) -> Array:
        return jnp.pad(a, ((0, padding), *[(0, 0)] * (a.ndim - 1))).reshape(-1, chunk, *a.shape[1:])

    chunks = (chunked(hidden), chunked(targets), chunked(weights))
    cast = kernel.astype(hidden.dtype)

    def step(carry: tuple[HeadSums, Array], inputs: tuple[Array, Array, Array]) -> tuple[tuple[HeadSums, Array], Array]:
        sums, d_kernel = carry
        chunk_sums, d_logits = _chunk_loss(jnp.dot(inputs[0], cast, preferred_element_type=jnp.float32), *inputs[1:])
        sums = jax.tree.map(jnp.add, sums, chunk_sums)
        if not with_gradient:
            return (sums, d_kernel), jnp.zeros((0,), hidden.dtype)
        d_logits = d_logits.astype(hidden.dtype)
        d_kernel = d_kernel + jnp.einsum("nd,nv->dv", inputs[0], d_logits, preferred_element_type=jnp.float32)
        return (sums, d_kernel), d_logits @ cast.T

    zero = HeadSums(*(jnp.zeros(()) for _ in HeadSums._fields))
    d_kernel = jnp.zeros(kernel.shape if with_gradient else (0,), jnp.float32)
    (sums, d_kernel), d_hidden = jax.lax.scan(step, (zero, d_kernel), chunks)
    return sums, (d_hidden.reshape(-1, d)[:n], d_kernel.astype(kernel.dtype))


def _chunk_loss(scores: Array, targets: Array, weights: Array) -> tuple[HeadSums, Array]:
    """Sums of one chunk, and the gradient of its nll with respect to the scores."""
    best = scores.max(-1)
    exponentials = jnp.exp(scores - best[:, None])
    z = exponentials.sum(-1)
    target_score = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
    nll = best + jnp.log(z) - target_score
    sums = HeadSums(jnp.sum(nll * weights), jnp.sum((target_score == best) * weights), jnp.sum(weights))
    is_target = targets[:, None] == jnp.arange(scores.shape[-1])
    return sums, exponentials * (weights / z)[:, None] - is_target * weights[:, None]


def compute_losses(params: Params, bias: RouterBias, rows: Int[Array, "b row"], config: ModelConfig, execution: Execution) -> Losses:
    """Forward pass over rows of T+1 tokens: main head, MTP heads, balance losses and loads."""
    return head_losses(params, bias, trunk(params, bias, rows[:, :-1], config, execution), rows, config, execution)


def head_losses(
    params: Params, bias: RouterBias, main: TrunkOutput, rows: Int[Array, "b row"], config: ModelConfig, execution: Execution
) -> Losses:
    """The part of `compute_losses` that follows the trunk: both kinds of head, and the MTP modules."""
    kernel = head_kernel(params)

    def sums(hidden: Array, targets: Array, weights: Array) -> HeadSums:
        return head_sums(hidden.reshape(-1, hidden.shape[-1]), kernel, targets.reshape(-1), weights.reshape(-1))

    ahead = predict_ahead(params, bias, main.hidden, rows, config, execution) if config.num_nextn_predict_layers else []
    main_weights = target_weights(rows, 0, execution.document_eos)
    mtp_load = jnp.stack([out.load for out in ahead]) if ahead else jnp.zeros_like(bias.mtp)
    return Losses(
        sums(main.hidden, rows[:, 1:], main_weights),
        [sums(out.hidden, out.targets, out.weights) for out in ahead],
        main.balance_loss + sum(out.balance_loss for out in ahead),
        RouterBias(main.load, mtp_load),
        jnp.stack([main.fullness, *(out.fullness for out in ahead)]).max(),
    )


def target_counts(rows: Int[Array, "b row"], config: ModelConfig, execution: Execution) -> Float[Array, " heads"]:
    """Tokens with a target, for the main head and for each MTP depth."""
    depths = range(config.num_nextn_predict_layers + 1)
    return jnp.stack([target_weights(rows, k, execution.document_eos).sum() for k in depths])


def objective(
    losses: Losses, counts: Float[Array, " heads"], mtp_weight: Float[Array, ""] | float, balance_weight: float | Float[Array, ""]
) -> Float[Array, ""]:
    """`CE + lambda / D sum_k CE_k + alpha sum_layers balance` (eq. 17, 24, 25).

    `counts` are the `target_counts` of the whole batch and `balance_weight` is alpha over the number of
    micro-batches, so that the objectives of the micro-batches add up to that of the batch.
    """
    loss = losses.main.nll / counts[0] + balance_weight * losses.balance_loss
    for k, sums in enumerate(losses.mtp, start=1):
        loss += mtp_weight / len(losses.mtp) * sums.nll / counts[k]
    return loss
