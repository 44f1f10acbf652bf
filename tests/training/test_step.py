import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model.transformer import Execution
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.state import create_state
from dsv3_jax.training.step import Rates, make_eval_step, make_train_step
from tests.small import CONFIG, model, rows

RATES = Rates(jnp.float32(1e-2), jnp.float32(0.01), jnp.float32(0.3))
MODEL = model(num_hidden_layers=2)
# Float32 moments and a large eps: where a gradient is nearly 0, Adam would blow rounding up to a full step.
EXACT = dataclasses.replace(CONFIG, model=MODEL, optimizer=dataclasses.replace(CONFIG.optimizer, moment_dtype="float32", eps=1e-3))


# Documents apart, so that rows and micro-batches have different numbers of targets.
EXECUTION = Execution(document_eos=0)


@functools.cache
def build():
    optimizer = make_optimizer(EXACT.optimizer)
    step = jax.jit(make_train_step(EXACT, EXECUTION, optimizer))
    return step, jax.jit(lambda: create_state(EXACT, optimizer))()


def assert_states_close(a, b, atol=1e-5):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), np.asarray(y, np.float32), atol=atol, rtol=1e-3, err_msg=jax.tree_util.keystr(path)
        )


def test_accumulated_micro_batches_equal_one_large_batch():
    batch = rows(MODEL, 8, 16)
    step, state = build()
    whole, metrics = step(state, batch[None], jnp.int32(1), RATES)
    parts = jnp.concatenate([batch.reshape(2, 4, 17), jnp.zeros((1, 4, 17), jnp.int32)])  # the last micro-batch is not used
    accumulated, accumulated_metrics = step(state, parts, jnp.int32(2), RATES)
    assert_states_close(accumulated, whole)
    np.testing.assert_allclose(accumulated_metrics.main.nll, metrics.main.nll, rtol=1e-5)
    np.testing.assert_array_equal(accumulated_metrics.load.moe, metrics.load.moe)


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
    losses = jax.jit(make_eval_step(EXACT, EXECUTION))(state.params, state.router_bias, batch)
    np.testing.assert_allclose(losses.main.nll, metrics.main.nll, rtol=1e-6)
    np.testing.assert_allclose(losses.mtp[0].correct, metrics.mtp[0].correct)
