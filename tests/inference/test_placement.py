from itertools import permutations, product

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.dynamic_redundancy import host_experts, plan_step, share_tokens
from dsv3_jax.inference.placement import (
    Replicas,
    gpu_loads,
    imbalance,
    index_replicas,
    moved_slots,
    place_experts,
    plain_imbalance,
    plain_loads,
    replace_experts,
)
from dsv3_jax.inference.replicas import with_replicas
from dsv3_jax.model.moe import pick_replicas
from dsv3_jax.model.transformer import Execution, trunk
from tests.small import MODEL, parameters, rows


@st.composite
def units(draw) -> tuple[np.ndarray, int, int, int, int]:
    """Loads of any shape, zeros and a single hot expert among them, and sizes that divide."""
    nodes, gpus_of_node, groups, size = (draw(st.integers(1, n)) for n in (4, 4, 6, 6))
    gpus, experts = nodes * gpus_of_node, groups * size
    least = -(-experts // gpus) if groups % nodes else -(-(experts // nodes) // gpus_of_node)
    replicas = gpus * (least + draw(st.integers(0, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    deviation, picked = draw(st.sampled_from([0.0, 0.5, 3.0])), draw(st.sampled_from([0.3, 1]))
    load = rng.lognormal(0, deviation, (2, experts)) * (rng.random((2, experts)) < picked)
    return load, replicas, groups, nodes, gpus


@given(units())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_placement_is_complete_balanced_and_on_its_nodes(unit):
    load, replicas, groups, nodes, gpus = unit
    experts = load.shape[1]
    placed = place_experts(load, replicas, groups, nodes, gpus)
    assert placed.physical_to_logical.shape == (2, replicas)
    assert (placed.replica_count >= 1).all() and (placed.replica_count.sum(1) == replicas).all()
    for layer in range(2):
        for expert in range(experts):
            slots = np.flatnonzero(placed.physical_to_logical[layer] == expert)
            listed = placed.logical_to_physical[layer, expert]
            assert listed[listed >= 0].tolist() == slots.tolist() and len(slots) == placed.replica_count[layer, expert]
    if groups % nodes == 0:
        group = placed.physical_to_logical.reshape(2, nodes, -1) // (experts // groups)
        for layer in group:
            assert all(len(set(np.flatnonzero([g in node for node in layer]))) == 1 for g in range(groups))
    np.testing.assert_allclose(gpu_loads(load, placed.physical_to_logical, gpus).sum(1), load.sum(1), rtol=1e-9)
    np.testing.assert_allclose(plain_loads(load, groups, nodes, gpus).sum(1), load.sum(1), rtol=1e-9)
    after = imbalance(load, placed.physical_to_logical, gpus)
    assert (after <= plain_imbalance(load, groups, nodes, gpus) * (1 + 1e-9)).all()
    for one, other in zip(placed, place_experts(load.copy(), replicas, groups, nodes, gpus), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_heaviest_expert_is_split_and_each_gpu_gets_its_share():
    placed = place_experts(np.array([[8.0, 1, 1, 1, 1, 4]]), 8, 1, 1, 4)
    assert placed.replica_count.tolist() == [[3, 1, 1, 1, 1, 1]]  # 8 / 3 is under 4; a second copy of the 4 would come next
    assert gpu_loads(np.array([[8.0, 1, 1, 1, 1, 4]]), placed.physical_to_logical, 4).max() == pytest.approx(5)


@given(units(), st.integers(0, 99))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_little_is_moved(unit, seed):
    load, replicas, groups, nodes, gpus = unit
    old = place_experts(load, replicas, groups, nodes, gpus).physical_to_logical
    later = load * np.random.default_rng(seed).lognormal(0, 1, load.shape)
    fresh = place_experts(later, replicas, groups, nodes, gpus).physical_to_logical
    moved = replace_experts(later, old, groups, nodes, gpus, threshold=0.1)
    before, after, best = (imbalance(later, slots, gpus) for slots in (old, moved.physical_to_logical, fresh))
    pays = best < before * 0.9
    np.testing.assert_array_equal(moved.physical_to_logical[~pays], old[~pays])
    np.testing.assert_allclose(after[pays], best[pays], rtol=1e-9)  # named otherwise, balanced the same
    assert (moved_slots(old, moved.physical_to_logical) <= moved_slots(old, fresh)).all()


def fewest_moved(old: np.ndarray, fresh: np.ndarray, nodes: int, gpus: int) -> int:
    """Of all ways to name the nodes and the GPUs of a node; slots of a GPU may change places."""
    theirs, mine = (row.reshape(nodes, gpus // nodes, -1) for row in (old, fresh))
    counts = [[np.bincount(gpu, minlength=old.max() + 1) for gpu in node] for node in (*theirs, *mine)]
    kept = np.array([[np.minimum(np.array(a)[:, None], np.array(b)).sum(-1) for b in counts[nodes:]] for a in counts[:nodes]])
    places, orders = range(nodes), list(permutations(range(gpus // nodes)))
    best = max(
        sum(kept[node, named[node], gpu, order[node][gpu]] for node in places for gpu in range(gpus // nodes))
        for named, order in product(permutations(places), product(orders, repeat=nodes))
    )
    return old.size - int(best)


@pytest.mark.parametrize(("experts", "replicas", "groups", "nodes", "gpus"), [(8, 12, 2, 2, 4), (12, 18, 3, 3, 6), (12, 12, 3, 3, 6)])
def test_as_few_slots_move_as_names_of_nodes_and_gpus_allow(experts, replicas, groups, nodes, gpus):
    rng = np.random.default_rng(0)
    for _ in range(20):
        load, current = rng.lognormal(0, 1, (1, experts)), rng.permutation(np.arange(replicas) % experts)[None]
        wanted = place_experts(load, replicas, groups, nodes, gpus).physical_to_logical
        moved = replace_experts(load, current, groups, nodes, gpus, threshold=-9.0).physical_to_logical
        assert moved_slots(current, moved)[0] == fewest_moved(current[0], wanted[0], nodes, gpus)


@pytest.mark.parametrize(("nodes", "stays"), [(2, False), (1, True)])
def test_a_group_that_spans_nodes_is_brought_together(nodes, stays):
    current = np.array([[0, 2, 4, 6, 1, 3, 5, 7]])
    placed = replace_experts(np.ones((1, 8)), current, 2, nodes, 4, threshold=0.05).physical_to_logical
    assert np.array_equal(placed, current) == stays
    if not stays:
        assert all(len(set(node)) == 1 for node in (placed.reshape(nodes, -1) // 4).tolist())


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((7, 4, 2, 4), ["replicas = 7", "fewer than the 8 experts"]),
        ((10, 4, 2, 4), ["replicas = 10", "multiple of gpus = 4"]),
        ((12, 4, 3, 4), ["gpus = 4", "multiple of nodes = 3"]),
        ((12, 3, 2, 4), ["groups = 3", "divide the 8 experts"]),
        ((12, 0, 2, 4), ["groups = 0", "at least 1"]),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, parts):
    with pytest.raises(ConfigError) as caught:
        place_experts(np.ones((1, 8)), *sizes)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_tables_that_leave_an_expert_out_are_refused():
    with pytest.raises(ConfigError, match=r"layer 1.*expert 2 has no slot"):
        index_replicas(np.array([[0, 1, 2], [0, 1, 1]]), 3)


def test_dynamic_redundancy_serves_every_token_and_beats_the_static_slots():
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 0.8, (1, 64))
    hosted = host_experts(load, 8, 5, 4, 2, 16)[0]
    assert all(len(set(row[5:])) == 3 and not set(row[5:]) & set(row[:5]) for row in hosted.tolist())
    gains = []
    for _ in range(5):
        chance = load[0] * rng.lognormal(0, 0.5, 64)
        step = rng.multinomial(2000, chance / chance.sum()).astype(float)
        plan = plan_step(step, hosted, 5)
        np.testing.assert_allclose(np.bincount(hosted.ravel(), plan.ravel(), 64), step, atol=1e-6)
        assert plan.min() >= 0 and (plan > 0).sum(1).max() <= 5
        static = share_tokens(step, hosted[:, :5], np.ones((16, 5), bool))
        assert static.sum(1).max() <= imbalance(step[None], hosted[:, :5].reshape(1, -1), 16)[0] * step.sum() / 16 + 1e-6
        gains.append(plan.sum(1).max() / static.sum(1).max())
    assert max(gains) <= 1 and np.mean(gains) < 0.95


def test_tokens_take_the_replicas_of_an_expert_in_turn():
    slots = jax.numpy.array([[0, -1, -1], [1, 3, 4], [2, 5, -1]])
    experts = jax.numpy.array([[1, 2], [1, 0], [1, 2], [2, 1]])
    assert pick_replicas(experts, slots).tolist() == [[1, 2], [3, 0], [4, 2], [5, 1]]


def test_replicas_give_the_same_hidden_states_as_without():
    params, bias = parameters(MODEL)
    tokens = rows(MODEL, 2, 12)[:, :-1]
    run = jax.jit(trunk, static_argnums=(3, 4))
    expected = run(params, bias, tokens, MODEL, Execution())
    placed = place_experts(np.asarray(expected.load), 12, 4, 2, 4)
    held = with_replicas(params, placed)
    assert held["moe"]["mlp"]["experts"]["down_proj"].shape[1] == 12
    got = run(held, bias, tokens, MODEL, Execution())
    np.testing.assert_array_equal(got.load, expected.load)
    np.testing.assert_allclose(got.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(1, 8\).*\(2, 8\)"):
        with_replicas(params, Replicas(*(table[:1] for table in placed)))
