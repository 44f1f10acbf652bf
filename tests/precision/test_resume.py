"""An FP8 run continues bit for bit from its checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.model.transformer import Execution
from dsv3_jax.precision.policy import Recipe
from dsv3_jax.training.checkpoint import Checkpointer, abstract_like
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.state import create_state
from dsv3_jax.training.step import Rates, make_train_step
from tests.small import model, rows

MODEL = model(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, q_lora_rank=None, n_shared_experts=0)


def test_an_fp8_run_continues_bit_for_bit(tmp_path):
    config = dataclasses.replace(Config(), model=MODEL)
    optimizer = make_optimizer(config.optimizer)
    step = jax.jit(make_train_step(config, Execution(recipe=Recipe(fp8=True)), optimizer))
    batches = [rows(MODEL, 2, 12, seed)[None] for seed in range(2)]
    rates = Rates(*jnp.float32([1e-2, 1e-3, 0.3]))
    state, _ = step(jax.jit(lambda: create_state(config, optimizer))(), batches[0], jnp.int32(1), rates)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert jnp.dtype("bfloat16") in {leaf.dtype for leaf in jax.tree.leaves(state.opt_state)}
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, state, None, {"progress": {}, "data": {}})
    checkpointer.close()
    checkpointer = Checkpointer(tmp_path, keep=1)
    restored = checkpointer.restore(abstract_like(state, jax.sharding.SingleDeviceSharding(jax.devices()[0])), None)
    checkpointer.close()
    undisturbed, _ = step(state, batches[1], jnp.int32(1), rates)
    continued, _ = step(restored.state, batches[1], jnp.int32(1), rates)
    jax.tree.map(np.testing.assert_array_equal, continued, undisturbed)
