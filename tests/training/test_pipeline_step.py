import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Config, ConfigError, MeshConfig, ParallelConfig
from dsv3_jax.model.loss import compute_losses, objective, target_counts
from dsv3_jax.model.transformer import Execution
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from dsv3_jax.parallel.schedules import make_schedule
from dsv3_jax.parallel.sharding import state_shardings
from dsv3_jax.training.checkpoint import abstract_like
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.pipeline_step import Cut, micro_batches, pipelined_gradients
from dsv3_jax.training.spread import Spread
from dsv3_jax.training.state import create_state
from dsv3_jax.training.step import Rates, make_train_step
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


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "remat"), [(5, "full"), (13, "selective")], ids=["written out", "in loops"])
def test_dualpipe_gives_the_gradients_and_losses_of_the_unpipelined_model(layers, remat):
    assert_equal(make_schedule("dualpipe", 2, 6), small.model(num_hidden_layers=layers, **UNEVEN), Execution(document_eos=0, remat=remat))


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


def traced_step(sizes, M, length=16):
    """A training step of two MoE layers, traced on shapes, and the bytes of what stages send one another."""
    model = small.model(num_hidden_layers=2, first_k_dense_replace=0, num_nextn_predict_layers=0, max_position_embeddings=128)
    config = dataclasses.replace(small.CONFIG, model=model, parallel=ParallelConfig(sizes))
    mesh, optimizer = make_mesh(sizes), make_optimizer(config.optimizer)
    state = jax.eval_shape(functools.partial(create_state, config, optimizer))
    shardings = state_shardings(state, mesh)
    step = jax.jit(make_train_step(config, Execution(remat="full"), optimizer, mesh), out_shardings=(shardings, replicated(mesh)))
    rows = jax.ShapeDtypeStruct((M, 8, length + 1), jnp.int32, sharding=batch_sharding(mesh))
    return step.trace(abstract_like(state, shardings), rows, jnp.int32(M), Rates(*jnp.zeros(3))), 8 * length * model.hidden_size * 4


def subexpressions(jaxpr):
    """Every equation, those of inner functions included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from subexpressions(inner)


def reached_from(jaxpr, source):
    """Indices of the equations that use a result of equation `source`, or of one that does."""
    values, found = set(jaxpr.eqns[source].outvars), set()
    for i, equation in enumerate(jaxpr.eqns):
        if any(isinstance(v, jax.extend.core.Var) and v in values for v in equation.invars):
            values |= set(equation.outvars)
            found.add(i)
    return found


def test_the_passes_of_an_overlapped_pair_do_not_wait_for_one_another():
    """In a tick's branch no result of the forward pass reaches the backward pass, nor back; both send tokens to experts."""
    traced, _ = traced_step(MeshConfig(pipe=2, gpu=2), M=6)
    branches = [b.jaxpr for e in subexpressions(traced.jaxpr.jaxpr) if e.primitive.name == "cond" for b in e.params["branches"]]
    pairs = 0
    for branch in branches:
        where = {equation.params["name"]: i for i, equation in enumerate(branch.eqns) if "name" in equation.params}
        if {"_forward", "_backward"} <= where.keys():
            pairs += 1
            assert where["_backward"] not in reached_from(branch, where["_forward"])
            assert where["_forward"] not in reached_from(branch, where["_backward"])
            for i in (where["_forward"], where["_backward"]):
                assert any(e.primitive.name == "all_to_all" for e in subexpressions(branch.eqns[i].params["jaxpr"].jaxpr))
    assert pairs == 2  # each direction's forward pass beside the other's backward pass


@pytest.mark.slow
def test_memory_of_the_compiled_step_does_not_grow_with_the_batch():
    """Twelve micro-batches take the memory of four, to within one activation of one micro-batch."""
    temporary = {}
    for M in (4, 12):
        traced, activation = traced_step(MeshConfig(pipe=2), M, length=128)
        temporary[M] = traced.lower().compile().memory_analysis().temp_size_in_bytes
    assert abs(temporary[12] - temporary[4]) < activation
