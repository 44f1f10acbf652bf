import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.pipeline import Stage, StageParams, run_pipeline
from dsv3_jax.parallel.schedules import GENERATORS, Seat, make_schedule
from dsv3_jax.parallel.ticks import FIRST_SLOT, lower

D, V, BATCH = 6, 11, 3
ACTIVATION = jax.ShapeDtypeStruct((BATCH, D), jnp.float32)


def mesh(ranks):
    return jax.make_mesh((ranks,), ("pipe",), axis_types=(AxisType.Auto,), devices=jax.devices()[:ranks])


def toy_stage(n_stages):
    """A layer with a penalty of its own; the first stage embeds, the last one scores with the same table."""

    def run(own, shared, x, micro, index):
        x = jax.lax.cond(index == 0, lambda: shared["table"][micro["token"]], lambda: x)
        inner = jnp.tanh(x @ own["kernel"] + own["offset"])
        return x + inner, 0.1 * jnp.square(inner).sum()

    def score(shared, y, penalty, micro, index):
        scores = jax.nn.log_softmax(y @ shared["table"].T)
        nll = -jnp.take_along_axis(scores, micro["target"][:, None], axis=1).sum()
        return jnp.where(index == n_stages - 1, nll, 0.0) + penalty, {"sum": y.sum(), "calls": jnp.int32(1)}

    return Stage(run, score)


@functools.cache
def problem(n_stages, n_micro):
    rng = np.random.default_rng(0)
    stages = {"kernel": rng.normal(0, 0.4, (n_stages, D, D)), "offset": rng.normal(0, 0.4, (n_stages, D))}
    table = rng.normal(0, 0.5, (V, D))
    batch = {name: rng.integers(0, V, (n_micro, BATCH)) for name in ("token", "target")}
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32 if a.dtype == float else jnp.int32), (stages, table, batch))


@functools.cache
def unpipelined(n_stages, n_micro):
    """Loss, gradients and the sum of each stage's outputs, one micro-batch after another."""
    stages, table, batch = problem(n_stages, n_micro)

    def total(stages, table):
        def through_stage(x, micro, own, k):
            stage, shared = toy_stage(n_stages), {"table": table}
            y, report = stage.run(own, shared, x, micro, k)
            loss, metrics = stage.score(shared, y, report, micro, k)
            return y, (loss, metrics["sum"])

        def micro_batch(totals, micro):
            per_stage = stages, jnp.arange(n_stages)
            _, (losses, sums) = jax.lax.scan(lambda x, stage: through_stage(x, micro, *stage), jnp.zeros((BATCH, D)), per_stage)
            return (totals[0] + losses.sum(), totals[1] + sums), None

        return jax.lax.scan(micro_batch, (0.0, jnp.zeros(n_stages)), batch)[0]

    (loss, sums), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(stages, table)
    return loss, sums, gradients


def layout(schedule):
    """Stage of each rank, for each direction."""
    return [[schedule.stage(Seat(rank, d)) for rank in range(schedule.n_ranks)] for d in schedule.directions]


def run(schedule, stages, table, batch):
    """The output of all ranks, on a leading axis."""
    own = tuple(jax.tree.map(lambda leaf, where=where: leaf[np.array(where)], stages) for where in layout(schedule))

    def on_rank(own, table, batch):
        own = jax.tree.map(lambda leaf: leaf[0], own)
        out = run_pipeline(schedule, toy_stage(schedule.n_stages), StageParams(own, {"table": table}), batch, ACTIVATION)
        return jax.tree.map(lambda leaf: leaf[None], out)

    in_specs = PartitionSpec("pipe"), PartitionSpec(), PartitionSpec()
    spread = jax.shard_map(on_rank, mesh=mesh(schedule.n_ranks), in_specs=in_specs, out_specs=PartitionSpec("pipe"), check_vma=False)
    return spread(own, table, batch)


@pytest.mark.parametrize(("P", "M"), [pytest.param(2, 4, marks=pytest.mark.slow), (4, 10), pytest.param(8, 18, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", GENERATORS)
def test_every_schedule_gives_the_loss_and_gradients_of_the_unpipelined_run(name, P, M):
    schedule = make_schedule(name, P, M)
    stages, table, batch = problem(schedule.n_stages, M)
    loss, sums, (d_stages, d_table) = unpipelined(schedule.n_stages, M)
    out = jax.jit(functools.partial(run, schedule))(stages, table, batch)
    np.testing.assert_allclose(out.loss.sum(), loss, rtol=1e-5)
    np.testing.assert_allclose(out.gradients.shared["table"].sum(0), d_table, rtol=2e-4, atol=2e-4)
    got, got_sums, calls = jax.tree.map(np.zeros_like, d_stages), np.zeros(schedule.n_stages), np.zeros(schedule.n_stages)
    for where, own, metrics in zip(layout(schedule), out.gradients.own, out.metrics, strict=True):
        for rank, stage in enumerate(where):
            got = jax.tree.map(lambda total, part, at=(stage, rank): total + _row(part, at, total), got, own)
            got_sums[stage] += metrics["sum"][rank]
            calls[stage] += metrics["calls"][rank]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, d_stages)
    np.testing.assert_allclose(got_sums, sums, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(calls, M)


def _row(part, at, like):
    stage, rank = at
    return np.zeros_like(like) + np.eye(len(like))[stage].reshape(-1, *[1] * (like.ndim - 1)) * np.asarray(part[rank])


@pytest.mark.parametrize(
    ("name", "inputs", "gradients", "kept"), [("1f1b", 8, 1, 8), ("zb1p", 8, 7, 8), ("dualpipe", 10, 4, 9), ("dualpipe_v", 18, 8, 17)]
)
def test_slots_are_the_peak_of_activations_and_do_not_grow_with_the_batch(name, inputs, gradients, kept):
    """DualPipe's ranks have room for what P + 1 = 9 forward passes keep, for their inputs, and for one that arrives before its turn."""
    expected = {"activation": inputs, "gradient": gradients, "kept": kept}
    for M in (16, 32):
        slots = lower(make_schedule(name, 8, M)).slots
        assert {payload: count - FIRST_SLOT[payload] for payload, count in slots.items()} == expected


def activations_in_memory(name, M):
    """Temporary memory of the compiled program on each device, in activations, which are large beside all else."""
    schedule, activation = make_schedule(name, 4, M), jax.ShapeDtypeStruct((64, 1024), jnp.float32)

    def scale(own, shared, x, micro, index):
        y = jnp.tanh(x * own + micro)
        return y, ()

    def on_rank(batch):
        own = tuple(jnp.ones(()) for _ in schedule.directions)
        return run_pipeline(schedule, Stage(scale, lambda shared, y, *_: (y.sum(), ())), StageParams(own, ()), batch, activation).loss[None]

    spread = jax.shard_map(on_rank, mesh=mesh(4), in_specs=PartitionSpec(), out_specs=PartitionSpec("pipe"), check_vma=False)
    compiled = jax.jit(spread).lower(jax.ShapeDtypeStruct((M,), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * activation.size)


def test_memory_of_the_compiled_program_follows_the_peak_of_activations_not_the_batch():
    for name in ("1f1b", "dualpipe"):
        small, large = (activations_in_memory(name, M) for M in (8, 40))
        assert large == pytest.approx(small, abs=0.1)
        assert large < sum(lower(make_schedule(name, 4, 40)).slots.values()) + 1
    # Of each micro-batch more a stage has its input and its output, which is all that tanh keeps.
    assert activations_in_memory("gpipe", 40) == pytest.approx(activations_in_memory("gpipe", 8) + 2 * 32, abs=0.1)


def test_a_mesh_of_another_length_is_refused():
    refused = functools.partial(run_pipeline, make_schedule("1f1b", 4, 8), toy_stage(4), StageParams((), None), None, ACTIVATION)
    with pytest.raises(ConfigError, match=r"mesh\.pipe = 2: the schedule has 4 ranks"):
        jax.shard_map(refused, mesh=mesh(2), in_specs=(), out_specs=PartitionSpec())()
