import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.training.optimizer import decay_mask, make_optimizer, scale_by_adam
from tests.small import MODEL, parameters


def trajectory(transform, dtype=jnp.float32, steps=20):
    params = {"w": jnp.linspace(-1, 1, 12).reshape(3, 4).astype(dtype)}
    state, updates = transform.init(params), []
    for i in range(steps):
        grads = {"w": jnp.sin(params["w"] * (i + 1))}
        update, state = transform.update(grads, state, params)
        updates.append(update["w"])
    return np.stack(updates), state


def test_float32_moments_are_optax_adam():
    ours, _ = trajectory(scale_by_adam(0.9, 0.95, 1e-8, "float32"))
    theirs, _ = trajectory(optax.scale_by_adam(0.9, 0.95, 1e-8))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_both_moments_are_stored_in_bf16_and_stay_close():
    ours, state = trajectory(scale_by_adam(0.9, 0.95, 1e-8, "bfloat16"))
    theirs, _ = trajectory(optax.scale_by_adam(0.9, 0.95, 1e-8))
    assert state.mu["w"].dtype == state.nu["w"].dtype == jnp.bfloat16
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.02)


def test_weight_decay_spares_norms_and_nothing_else():
    params, _ = parameters(MODEL)
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        name = jax.tree_util.keystr(path)
        assert decays != ("norm" in name), name


def test_gradients_are_clipped_to_the_global_norm_before_adam():
    # Adam's direction does not see a constant factor, so the clip shows in the first moment.
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, moment_dtype="float32"))
    grads = {"a": jnp.full(3, 30.0), "b": jnp.full(4, 20.0)}
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    clipped = jax.tree.map(lambda m: m / 0.1, state[1].mu)
    assert float(optax.tree.norm(clipped)) == pytest.approx(1.0, rel=1e-5)
