import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.model.transformer import Execution
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.state import create_state
from dsv3_jax.training.step import Rates, make_eval_step, make_train_step
from tests.small import CONFIG, MODEL, rows

RATES = Rates(jnp.float32(1e-2), jnp.float32(0.01), jnp.float32(0.3))


# Float32 moments and a large eps: where a gradient is nearly 0, Adam would blow rounding up to a full step.
EXACT = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, moment_dtype="float32", eps=1e-3))


@functools.cache
def build(execution=None):
    optimizer = make_optimizer(EXACT.optimizer)
    step = jax.jit(make_train_step(EXACT, execution or Execution(), optimizer))
    return step, jax.jit(lambda: create_state(EXACT, optimizer))()


def assert_states_close(a, b, atol=1e-5):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), atol=atol, rtol=1e-3, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize("execution", [None, Execution(document_eos=0)])
def test_accumulated_micro_batches_equal_one_large_batch(execution):
    batch = rows(MODEL, 24, 16)
    step, state = build(execution)
    whole, metrics = step(state, batch[None], jnp.int32(1), RATES)
    parts = jnp.concatenate([batch.reshape(3, 8, 17), jnp.zeros((2, 8, 17), jnp.int32)])  # two micro-batches that are not used
    accumulated, accumulated_metrics = step(state, parts, jnp.int32(3), RATES)
    assert_states_close(accumulated, whole)
    np.testing.assert_allclose(accumulated_metrics.main.nll, metrics.main.nll, rtol=1e-5)
    np.testing.assert_array_equal(accumulated_metrics.load.moe, metrics.load.moe)


def test_data_shards_give_the_step_of_one_device_and_the_bias_sees_them_all():
    batch = rows(MODEL, 8, 16)[None]
    step, state = build()
    expected, _ = step(state, batch, jnp.int32(1), RATES)
    mesh = make_mesh(MeshConfig(data=8))
    spread = jax.device_put(batch, batch_sharding(mesh))
    got, _ = step(jax.device_put(state, replicated(mesh)), spread, jnp.int32(1), RATES)
    assert_states_close(got, expected)
    np.testing.assert_array_equal(got.router_bias.moe, expected.router_bias.moe)
    assert np.abs(np.asarray(got.router_bias.moe)).max() > 0


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match=r"parallel\.mesh\.data = 64.*8 devices"):
        make_mesh(MeshConfig(data=64))


def test_one_batch_is_learned_by_heart():
    step, state = build()
    batch = rows(MODEL, 8, 16)[None]
    for _ in range(400):
        state, metrics = step(state, batch, jnp.int32(1), RATES)
    assert metrics.main.nll / metrics.main.tokens < 0.05
    assert metrics.mtp[0].nll / metrics.mtp[0].tokens < 0.1


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    step, state = build()
    batch = rows(MODEL, 8, 16)[None]
    broken = state._replace(params=state.params | {"norm": state.params["norm"].at[0].set(jnp.nan)})
    for expected in (1, 2):
        after, metrics = step(broken, batch, jnp.int32(1), RATES)
        assert metrics.skipped_in_a_row == expected
        for name in ("params", "opt_state", "router_bias"):
            for x, y in zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(broken, name)), strict=True):
                np.testing.assert_array_equal(x, y)
        broken = after
    healed, metrics = step(after._replace(params=state.params), batch, jnp.int32(1), RATES)
    assert metrics.skipped_in_a_row == 0
    assert healed.step == 3


def test_evaluation_is_the_loss_of_the_training_step():
    step, state = build()
    batch = rows(MODEL, 8, 16)
    _, metrics = step(state, batch[None], jnp.int32(1), RATES)
    losses = jax.jit(make_eval_step(EXACT, Execution()))(state.params, state.router_bias, batch)
    np.testing.assert_allclose(losses.main.nll, metrics.main.nll, rtol=1e-6)
    np.testing.assert_allclose(losses.mtp[0].correct, metrics.mtp[0].correct)
