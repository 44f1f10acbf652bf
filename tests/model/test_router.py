import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.router import Routing, balance_loss, choose_experts, picked_counts, route, update_bias
from tests.small import MODEL, model


def reference_choice(scores, n_group, topk_group, k):
    """One token at a time, in NumPy: groups by the sum of their best K/M, then the best K of the groups that stay."""
    picked = []
    for row in scores:
        groups = row.reshape(n_group, -1)
        group_scores = np.sort(groups, axis=1)[:, -max(k // topk_group, 1) :].sum(1)
        kept = np.argsort(-group_scores, kind="stable")[:topk_group]
        candidates = [i for i in range(len(row)) if i // groups.shape[1] in kept]
        picked.append(sorted(candidates, key=lambda i: -row[i])[:k])
    return np.array(picked)


@pytest.mark.parametrize("offset", [0.0, -5.0])
@pytest.mark.parametrize(
    ("experts", "n_group", "topk_group", "k"), [(8, 4, 2, 4), (24, 6, 3, 6), (16, 4, 1, 3), (16, 1, 1, 5), (16, 4, 4, 4)]
)
def test_choice_is_the_node_limited_top_k(experts, n_group, topk_group, k, offset):
    # With all scores negative, masking with 0 in place of -inf would choose from the excluded groups.
    config = model(n_routed_experts=experts, n_group=n_group, topk_group=topk_group, num_experts_per_tok=k)
    scores = np.random.default_rng(0).normal(offset, 1.0, (64, experts)).astype(np.float32)
    chosen = np.asarray(jax.jit(choose_experts, static_argnums=1)(scores, config))
    np.testing.assert_array_equal(np.sort(chosen, -1), np.sort(reference_choice(scores, n_group, topk_group, k), -1))


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalised", [True, False])
def test_gates_come_from_unbiased_affinities(scoring, normalised):
    config = model(scoring_func=scoring, norm_topk_prob=normalised, routed_scaling_factor=2.5)
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(32, 24)).astype(np.float32), rng.normal(size=(24, 8)).astype(np.float32)
    # So large a bias that (affinity + bias) - bias would lose the affinity altogether.
    bias = rng.choice([-1e6, 0.0, 1e6], 8).astype(np.float32)
    routing = jax.jit(route, static_argnums=3)(x, kernel, bias, config)
    logits = x.astype(np.float64) @ kernel
    scores = 1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gates = np.take_along_axis(scores, np.asarray(routing.experts), -1)
    gates = gates / gates.sum(-1, keepdims=True) if normalised else gates
    np.testing.assert_allclose(routing.gates, 2.5 * gates, rtol=2e-5)


def test_rows_in_bfloat16_are_routed_in_float32():
    """Logits and their gradients against float64; a kernel cut to bfloat16 would be 1e-3 off."""
    rng = np.random.default_rng(2)
    x, kernel, d = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((512, 96), (96, 8), (512, 8)))
    kernel, rows = kernel / 10, x.astype(jnp.bfloat16)  # sigmoids of small numbers tell them exactly

    def logits(x, kernel):
        affinities = route(x, kernel, jnp.zeros(8), model(n_routed_experts=8)).affinities
        return jnp.log(affinities) - jnp.log1p(-affinities)

    found, back = jax.vjp(logits, rows, kernel)
    exact_rows, exact_kernel, exact_d = (np.asarray(a, np.float64) for a in (rows, kernel, d))
    expected = exact_rows @ exact_kernel, exact_d @ exact_kernel.T, exact_rows.T @ exact_d
    for got, exact, tolerance in zip((found, *back(d)), expected, (1e-6, 4e-3, 1e-6), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - exact) < tolerance * np.linalg.norm(exact)


def test_no_gradient_reaches_the_bias():
    x, kernel = jax.random.normal(jax.random.key(0), (16, 24)), jax.random.normal(jax.random.key(1), (24, 8))
    gradient = jax.grad(lambda bias: (route(x, kernel, bias, MODEL).gates ** 2).sum())(jnp.linspace(-1, 1, 8))
    assert not gradient.any()


def hand_balance(affinities, experts, weights, e, k):
    """V3 eq. 17-20 for one sequence, written as loops."""
    tokens = weights.sum()
    total = 0.0
    for i in range(e):
        f = e / (k * tokens) * sum(w for chosen, w in zip(experts, weights, strict=True) if i in chosen)
        p = sum(w * s[i] / s.sum() for s, w in zip(affinities, weights, strict=True)) / tokens
        total += f * p
    return total


@pytest.fixture
def routed():
    rng = np.random.default_rng(2)
    affinities = rng.uniform(0.05, 1, (3, 10, 8))
    experts = np.argsort(rng.uniform(size=(3, 10, 8)), -1)[..., :4]
    weights = np.ones((3, 10))
    weights[:, 8:] = 0
    routing = Routing(jnp.asarray(experts.reshape(30, 4)), jnp.ones((30, 4)), jnp.asarray(affinities.reshape(30, 8), jnp.float32))
    return routing, affinities, experts, weights


@pytest.mark.parametrize("strategy", ["loss_free", "sequence_wise"])
def test_sequence_wise_loss_by_hand(routed, strategy):
    routing, affinities, experts, weights = routed
    expected = np.mean([hand_balance(affinities[b], experts[b], weights[b], 8, 4) for b in range(3)])
    np.testing.assert_allclose(balance_loss(routing, jnp.asarray(weights, jnp.float32), strategy, MODEL), expected, rtol=1e-5)


def test_batch_wise_loss_by_hand(routed):
    routing, affinities, experts, weights = routed
    expected = hand_balance(affinities.reshape(30, 8), experts.reshape(30, 4), weights.reshape(30), 8, 4)
    np.testing.assert_allclose(balance_loss(routing, jnp.asarray(weights, jnp.float32), "batch_wise", MODEL), expected, rtol=1e-5)


def test_auxiliary_loss_adds_the_device_level_term(routed):
    routing, affinities, experts, weights = routed
    expected = 0.0
    for b in range(3):
        expected += hand_balance(affinities[b], experts[b], weights[b], 8, 4) / 3
        kept = weights[b] > 0
        for group in range(4):
            members = [2 * group, 2 * group + 1]
            f = np.mean([8 / (4 * 8) * sum(i in chosen for chosen in experts[b][kept]) for i in members])
            p = sum((affinities[b][kept][:, i] / affinities[b][kept].sum(-1)).mean() for i in members)
            expected += f * p / 3
    np.testing.assert_allclose(balance_loss(routing, jnp.asarray(weights, jnp.float32), "auxiliary", MODEL), expected, rtol=1e-5)


def test_perfect_balance_costs_one():
    experts = jnp.arange(16).reshape(4, 4) % 8
    routing = Routing(experts, jnp.ones((4, 4)), jnp.full((4, 8), 0.3))
    np.testing.assert_allclose(balance_loss(routing, jnp.ones((1, 4)), "sequence_wise", MODEL), 1.0, rtol=1e-6)


def test_counts_leave_out_tokens_without_weight():
    counts = picked_counts(jnp.array([[0, 1], [1, 2], [1, 3]]), jnp.array([1.0, 1.0, 0.0]), 5)
    np.testing.assert_array_equal(counts, [1, 2, 1, 0, 0])


def test_bias_moves_towards_balance():
    bias = update_bias(jnp.zeros((1, 4)), jnp.array([[5.0, 3.0, 3.0, 1.0]]), 0.5)
    np.testing.assert_array_equal(bias, [[-0.5, 0.0, 0.0, 0.5]])
