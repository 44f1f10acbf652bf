"""Training on a mesh is training on one device: losses, gradients, router bias and parameters after five steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import MeshConfig, ParallelConfig
from dsv3_jax.model.transformer import Execution
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from dsv3_jax.parallel.sharding import state_shardings
from dsv3_jax.precision.policy import Recipe
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.state import create_state
from dsv3_jax.training.step import Rates, make_train_step
from tests.small import CONFIG, MODEL, rows

# Float32 moments and a large eps: where a gradient is nearly 0, Adam would blow rounding up to a full step.
OPTIMIZER = dataclasses.replace(CONFIG.optimizer, moment_dtype="float32", eps=1e-3)
SMALL = dataclasses.replace(MODEL, num_hidden_layers=1, first_k_dense_replace=0, max_position_embeddings=128)
DEEP = dataclasses.replace(MODEL, max_position_embeddings=128)
EXACT = Execution()
LOW = Execution(dtype="bfloat16")
FP8 = Execution(dtype="bfloat16", recipe=Recipe(fp8=True))
RATES = Rates(jnp.float32(1e-2), jnp.float32(0.01), jnp.float32(0.3))
STEPS, BATCH = 5, 8


@functools.cache
def train(model, execution, sizes=(1, 1, 1, 1), dispatch="direct", shard="optimizer", length=16):
    """State after five steps of two micro-batches, and the metrics of each step."""
    parallel = ParallelConfig(MeshConfig(*sizes), dispatch, shard=shard)
    config = dataclasses.replace(CONFIG, model=model, optimizer=OPTIMIZER, parallel=parallel)
    mesh, optimizer = make_mesh(parallel.mesh), make_optimizer(OPTIMIZER)
    create = functools.partial(create_state, config, optimizer)
    shardings = state_shardings(jax.eval_shape(create), mesh)
    step = jax.jit(make_train_step(config, execution, optimizer, mesh), out_shardings=(shardings, replicated(mesh)))
    # Some experts are liked so much that others get nothing.
    state = jax.jit(create)()
    bias = jax.tree.map(lambda b: b + jnp.linspace(-1, 1, b.shape[1]) ** 3, state.router_bias)
    state, metrics = jax.device_put(state._replace(router_bias=bias), shardings), []
    for i in range(STEPS):
        batch = jnp.stack([rows(model, BATCH, length, seed=2 * i + j) for j in range(2)])
        state, reported = step(state, jax.device_put(batch, batch_sharding(mesh)), jnp.int32(2), RATES)
        metrics.append(reported)
    return jax.device_get(state), jax.device_get(metrics)


def assert_same(got, expected, rtol, atol):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        if "fullness" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_two_hops_and_zero_in_float32():
    state, metrics = train(SMALL, EXACT, (1, 2, 2, 2), "two_hop")
    assert_same((state, metrics), train(SMALL, EXACT), 1e-4, 2e-6)
    load = metrics[0].load.moe
    assert load.min() == 0 and load.max() > 1.5 * load.mean()
    assert load.sum() == 2 * BATCH * 16 * MODEL.num_experts_per_tok  # the bias saw every device's tokens


SPLIT = [(1, 1, 2, 4), (1, 2, 2, 2)]
EVERYWHERE = [((1, 8, 1, 1), "direct"), *((sizes, dispatch) for sizes in SPLIT for dispatch in ("direct", "two_hop"))]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dispatch"), EVERYWHERE)
def test_float32_equals_one_device(sizes, dispatch):
    assert_same(train(DEEP, EXACT, sizes, dispatch), train(DEEP, EXACT), 1e-4, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["gradients", "parameters"])
@pytest.mark.parametrize("balance", ["batch_wise", "auxiliary"])
def test_gradients_and_parameters_cut_too(shard, balance):
    execution = dataclasses.replace(EXACT, remat="selective", balance=balance)
    assert_same(train(DEEP, execution, (1, 2, 2, 2), "direct", shard), train(DEEP, execution), 1e-4, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dispatch"), EVERYWHERE)
@pytest.mark.parametrize(("execution", "off"), [(LOW, 0.2), (FP8, 0.3)], ids=["bf16", "fp8"])
def test_low_precision_equals_one_device_but_for_rounding(execution, off, sizes, dispatch):
    """What is summed in another order rounds otherwise, and routers then pick other experts for a few tokens, from the first step on.

    One token that goes to another expert moves the loss of a step by up to 1e-4; which do depends on the processor. `off` bounds
    how far five steps may lead apart, as a share of what they changed; on one device, sequences in another order give 0.02 and 0.08.
    """
    length = 128 if execution is FP8 else 16  # tiles of Wgrad along tokens begin where a device's do
    start = jax.jit(functools.partial(create_state, dataclasses.replace(CONFIG, model=DEEP), make_optimizer(OPTIMIZER)))()
    (got, metrics), (expected, expected_metrics) = (train(DEEP, execution, *mesh, length=length) for mesh in ((sizes, dispatch), ()))
    for i, (a, b) in enumerate(zip(metrics, expected_metrics, strict=True)):
        np.testing.assert_allclose(a.main.nll, b.main.nll, rtol=5e-3 if i else 5e-4)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=0.2 if i else 3e-3)
    apart, moved = (optax.tree.norm(jax.tree.map(np.subtract, state.params, expected.params)) for state in (got, start))
    assert apart <= off * moved
