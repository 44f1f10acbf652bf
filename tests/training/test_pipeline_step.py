import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, ConfigError, MeshConfig
from dsv3_jax.model.loss import compute_losses, objective, target_counts
from dsv3_jax.model.transformer import Execution
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.schedules import make_schedule
from dsv3_jax.training.pipeline_step import Cut, micro_batches, pipelined_gradients
from dsv3_jax.training.spread import Spread
from tests import small

UNUSED = 2  # micro-batches that a growing batch does not fill yet
MTP_WEIGHT = 0.3


def pipelined(schedule, config, execution, params, bias, rows, counts, n):
    """Gradients and losses, put together from the parts of all ranks."""
    mesh = make_mesh(MeshConfig(pipe=schedule.n_ranks))
    spread = Spread.of(dataclasses.replace(small.CONFIG, model=config), execution, mesh)

    def run(params, bias, rows, n, counts):
        batch = micro_batches(rows, n, counts, jnp.float32(MTP_WEIGHT), config.aux_loss_alpha / n)
        return pipelined_gradients(params, bias, batch, schedule, config, spread.execution, spread.places)

    return spread.over_rows(run, micro_batches=True, scalars=2, returns_gradients=True)(params, bias, rows, n, counts)


def unpipelined(config, execution, params, bias, rows, counts, n):
    def micro(rows):
        def loss(p):
            losses = compute_losses(p, bias, rows, config, execution)
            return objective(losses, counts, MTP_WEIGHT, config.aux_loss_alpha / n), losses

        return jax.grad(loss, has_aux=True)(params)

    parts = jax.lax.map(micro, rows[:-UNUSED])
    return jax.tree.map(lambda leaf: leaf.sum(0), parts)


def assert_equal(schedule, config, execution):
    params, bias = small.parameters(config)
    M = schedule.n_micro_batches
    rows, n = small.rows(config, 2 * M, 12).reshape(M, 2, 13), jnp.int32(M - UNUSED)
    counts = jax.vmap(lambda r: target_counts(r, config, execution))(rows[:-UNUSED]).sum(0)
    expected = jax.jit(functools.partial(unpipelined, config, execution))(params, bias, rows, counts, n)
    got = jax.jit(functools.partial(pipelined, schedule, config, execution))(params, bias, rows, counts, n)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    np.testing.assert_array_equal(got[1].load.moe, expected[1].load.moe)


# Layers that neither two, four nor eight stages divide, and dense ones on the first stage or two only.
UNEVEN = {"first_k_dense_replace": 2, "aux_loss_alpha": 0.05}


def test_dualpipe_gives_the_gradients_and_losses_of_the_unpipelined_model():
    assert_equal(make_schedule("dualpipe", 2, 6), small.model(num_hidden_layers=5, **UNEVEN), Execution(document_eos=0, remat="full"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("execution", "changes"),
    [
        (Execution(balance="auxiliary"), {"num_nextn_predict_layers": 0, "tie_word_embeddings": True}),
        (Execution(), {"first_k_dense_replace": 5, "num_nextn_predict_layers": 0}),
    ],
    ids=["tied and without MTP", "dense only"],
)
def test_other_models(execution, changes):
    assert_equal(make_schedule("dualpipe", 2, 6), small.model(num_hidden_layers=5, **(UNEVEN | changes)), execution)


def test_the_stages_of_v3():
    """61 layers over 16 stages: the last three, near the head and the MTP module, have 3 layers, the others 4."""
    cut = Cut.of(Config().model, 16)
    assert list(cut.count["dense"] + cut.count["moe"]) == [4] * 13 + [3] * 3
    assert list(cut.count["dense"]) == [3] + [0] * 15
    assert cut.layers["moe"][:3].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]  # the first stage has one, and padding
    assert cut.layers["moe"][15].tolist() == [55, 56, 57, 0]


def test_fewer_layers_than_stages_are_refused():
    with pytest.raises(ConfigError, match=r"num_hidden_layers = 3: the pipeline has 4 stages"):
        Cut.of(small.MODEL, 4)
