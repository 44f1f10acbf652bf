"""AdamW with both moments in a low precision (V3 sec. 3.3.3): bf16 moments, float32 arithmetic, master weights and gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.model.init import NORM_NAMES


class AdamState(NamedTuple):
    """Number of updates, and the moments."""

    updates: Int[Array, ""]
    mu: PyTree[Float[Array, "..."]]
    nu: PyTree[Float[Array, "..."]]


def scale_by_adam(beta1: float, beta2: float, eps: float, moment_dtype: str) -> optax.GradientTransformation:
    """Adam's direction with bias correction. optax's own keeps the second moment in the dtype of the parameters."""

    def init(params: Any) -> AdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=moment_dtype), params)
        return AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        del params
        updates = state.updates + 1
        mu = jax.tree.map(lambda m, g: beta1 * m.astype(jnp.float32) + (1 - beta1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: beta2 * v.astype(jnp.float32) + (1 - beta2) * g * g, state.nu, grads)
        mu_scale, nu_scale = 1 / (1 - beta1**updates), 1 / (1 - beta2**updates)
        direction = jax.tree.map(lambda m, v: m * mu_scale / (jnp.sqrt(v * nu_scale) + eps), mu, nu)
        low = [jax.tree.map(lambda m: m.astype(moment_dtype), moment) for moment in (mu, nu)]
        return direction, AdamState(updates, *low)

    return optax.GradientTransformation(init, update)


def decay_mask(params: PyTree) -> PyTree[bool]:
    """True for the leaves that weight decay applies to: all but the scales of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NORM_NAMES, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay. The caller multiplies the result by `-learning_rate`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        scale_by_adam(config.beta1, config.beta2, config.eps, config.moment_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
    )
