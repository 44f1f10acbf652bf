"""Routing of DeepSeekMoE: affinities, node-limited top-K, gates, and the balance losses (V3 sec. 2.1.2).

The bias of auxiliary-loss-free balancing is state that the caller holds. It is added to the affinities
for the choice alone: the gates come from the affinities themselves, and no gradient reaches it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig


class Routing(NamedTuple):
    """What the router decides for each of n tokens."""

    experts: Int[Array, "n k"]
    gates: Float[Array, "n k"]
    affinities: Float[Array, "n e"]


def route(x: Float[Array, "n d"], kernel: Float[Array, "d e"], bias: Float[Array, " e"], config: ModelConfig) -> Routing:
    """Affinities in float32, biased choice of `num_experts_per_tok` experts, unbiased gates (eq. 12-16)."""
    logits = _product_in_parts(x, kernel) if x.dtype == jnp.bfloat16 else jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
    affinities = jax.nn.sigmoid(logits) if config.scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    # Scores recomputed in the backward pass could round to another choice of experts, so remat="selective" keeps the choice.
    experts = checkpoint_name(choose_experts(affinities + jax.lax.stop_gradient(bias), config), "routing")
    gates = jnp.take_along_axis(affinities, experts, axis=-1)
    if config.norm_topk_prob:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return Routing(experts, gates * config.routed_scaling_factor, affinities)


@jax.custom_vjp
def _product_in_parts(x: Array, kernel: Array) -> Array:
    """A product in float32 of a bfloat16 x: a GPU takes four times as long to multiply float32 as the bfloat16 parts that add up to it."""
    return _times_parts(x, kernel)


def _times_parts(x: Array, y: Array) -> Array:
    product = jnp.matmul(x, jnp.concatenate(_parts(y, 3), 1), preferred_element_type=jnp.float32)
    high, middle, low = jnp.split(product, 3, axis=1)
    return high + (middle + low)


def _parts(x: Array, count: int) -> list[Array]:
    """bfloat16 numbers, 8 bits each, the highest first."""
    parts = []
    for _ in range(count):
        rounded = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # a cast and back would be left out by XLA
        parts.append(rounded.astype(jnp.bfloat16))
        x = x - rounded
    return parts


def _product_in_parts_bwd(residual: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    x, kernel = residual
    (d_high, d_low), (high, low) = _parts(d, 2), _parts(kernel, 2)
    # Rounded to 8 bits, so 16 of each factor are enough.
    dx = jnp.matmul(jnp.concatenate([d_high, d_high, d_low], 1), jnp.concatenate([high, low, high], 1).T)
    return dx, _times_parts(x.T, d)


_product_in_parts.defvjp(lambda x, kernel: (_times_parts(x, kernel), (x, kernel)), _product_in_parts_bwd)


def choose_experts(scores: Float[Array, "n e"], config: ModelConfig) -> Int[Array, "n k"]:
    """Top-K of the scores within the `topk_group` best groups; a group scores the sum of its K / M (or `group_top_k`) best (sec. 2.1.2).

    Experts of other groups are masked with -inf, not 0: biased scores may be negative.
    """
    n, e = scores.shape
    if config.n_group > 1 and config.topk_group < config.n_group:
        grouped = scores.reshape(n, config.n_group, e // config.n_group)
        best_in_group = min(config.group_top_k or max(config.num_experts_per_tok // config.topk_group, 1), grouped.shape[-1])
        allowed = _ranks(_sum_of_best(grouped, best_in_group)) < config.topk_group
        scores = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(n, e)
    return jax.lax.top_k(scores, config.num_experts_per_tok)[1]


def _sum_of_best(x: Float[Array, "n g e"], count: int) -> Float[Array, "n g"]:
    """Sums of the `count` largest. Neither this nor `_ranks` is by `top_k`, for which a GPU sorts: 0.19 ms a layer of `h200`, now 0.03."""
    total = jnp.zeros(x.shape[:-1], x.dtype)
    for _ in range(count):
        total += x.max(-1)
        x = jnp.where(jnp.arange(x.shape[-1]) == x.argmax(-1, keepdims=True), -jnp.inf, x)
    return total


def _ranks(x: Float[Array, "n g"]) -> Int[Array, "n g"]:
    """How many numbers of its row come before each: those that are larger, and equal ones to its left, as in `top_k`."""
    one, other = x[:, :, None], x[:, None, :]
    left = jnp.arange(x.shape[1])[:, None] > jnp.arange(x.shape[1])
    return ((other > one) | ((other == one) & left)).sum(-1)


def picked_counts(experts: Int[Array, "*b n k"], weights: Float[Array, "*b n"], n_experts: int) -> Float[Array, "*b e"]:
    """How many of the n tokens picked each expert; a token counts `weights` (1, or 0 for one that is not trained on)."""
    picked = (experts[..., None] == jnp.arange(n_experts)).any(-2)
    return (picked * weights[..., None]).sum(-2)


def balance_loss(
    routing: Routing, weights: Float[Array, "b t"], strategy: str, config: ModelConfig, batch_axes: tuple[str, ...] = ()
) -> Float[Array, ""]:
    """The balance term of one layer, before `aux_loss_alpha`; each of its sums is 1 when perfectly balanced.

    loss_free, sequence_wise: per sequence, averaged (eq. 17-20). batch_wise: the same formula over all
    tokens of the micro-batch at once (sec. 4.5.3). auxiliary: the pure auxiliary loss of DeepSeek-V2 (2405.04434, eq. 23-28),
    an expert-level term per sequence plus a device-level one over the expert groups.
    `batch_axes`: mesh axes that the micro-batch is spread over; batch_wise sums over them.
    """
    e, k = config.n_routed_experts, config.num_experts_per_tok
    shape = (1, -1) if strategy == "batch_wise" else weights.shape
    w = weights.reshape(shape)
    normalised = routing.affinities / routing.affinities.sum(-1, keepdims=True)
    sums = (w.sum(-1, keepdims=True), picked_counts(routing.experts.reshape(*shape, k), w, e),
            jnp.einsum("bt,bte->be", w, normalised.reshape(*shape, e)))  # fmt: skip
    counted, picked, probability = jax.lax.psum(sums, batch_axes) if strategy == "batch_wise" and batch_axes else sums
    tokens = jnp.maximum(counted, 1.0)
    frequency, probability = picked * (e / k) / tokens, probability / tokens
    loss = (frequency * probability).sum(-1).mean()
    if strategy == "auxiliary" and config.n_group > 1:
        groups = (frequency.shape[0], config.n_group, -1)
        loss += (frequency.reshape(groups).mean(-1) * probability.reshape(groups).sum(-1)).sum(-1).mean()
    return loss


def update_bias(bias: Float[Array, "*l e"], load: Float[Array, "*l e"], speed: Float[Array, ""] | float) -> Float[Array, "*l e"]:
    """Auxiliary-loss-free balancing (2408.15664, Algorithm 1): `bias + speed * sign(mean load - load)`, once per optimizer step."""
    return bias + speed * jnp.sign(load.mean(-1, keepdims=True) - load)
