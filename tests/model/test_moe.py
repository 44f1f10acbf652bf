import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.model import moe
from dsv3_jax.model.moe import block_rows, expert_ffn, plan_blocks, plan_few
from dsv3_jax.model.router import Routing
from dsv3_jax.precision.rows import Rows, combine, dispatch


def one_expert_at_a_time(x, routing, gate_up, down):
    """Every expert over every token, weighted by its gate or 0."""
    out = jnp.zeros_like(x)
    for e in range(gate_up.shape[0]):
        gate = (routing.gates * (routing.experts == e)).sum(-1, keepdims=True)
        hidden = jax.nn.silu(x @ gate_up[e, :, 0]) * (x @ gate_up[e, :, 1])
        out += gate * (hidden @ down[e])
    return out


def random_layer(n, k, e, rng, skew):
    scores = rng.normal(size=(n, e)) + skew * np.arange(e)  # a large skew sends every token to the same experts
    experts = np.argsort(-scores, -1)[:, :k]
    x, gate_up, down = (rng.normal(size=s).astype(np.float32) for s in ((n, 6), (e, 6, 2, 5), (e, 5, 6)))
    return (
        jnp.asarray(x),
        Routing(jnp.asarray(experts), jnp.asarray(rng.uniform(size=(n, k)), jnp.float32), jnp.zeros((n, e))),
        gate_up,
        down,
    )


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize(("n", "k", "e", "skew"), [(13, 2, 5, 0.0), (13, 2, 5, 100.0), (1, 3, 7, 0.0), (40, 4, 4, 0.0)])
def test_matches_one_expert_at_a_time(n, k, e, skew, rows):
    x, routing, gate_up, down = random_layer(n, k, e, np.random.default_rng(0), skew)

    def ours(x, gates, gate_up, down):
        return expert_ffn(x, routing._replace(gates=gates), gate_up, down, rows)[0]

    def reference(x, gates, gate_up, down):
        return one_expert_at_a_time(x, routing._replace(gates=gates), gate_up, down)

    arguments = (x, routing.gates, jnp.asarray(gate_up), jnp.asarray(down))
    cotangent = jax.random.normal(jax.random.key(0), x.shape)

    def value_and_gradients(f):
        value, pull = jax.vjp(f, *arguments)
        return value, *pull(cotangent)

    for got, expected in zip(*(jax.jit(value_and_gradients, static_argnums=0)(f) for f in (ours, reference)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(4, 9), st.sampled_from([1, 2, 4, 16]), st.integers(0, 10**6))
def test_plan_drops_nothing(n, k, e, rows, seed):
    experts = np.random.default_rng(seed).integers(0, e, (n, k))
    plan = plan_blocks(jnp.asarray(experts), e, rows)
    slot, pair, block_expert = (np.asarray(a) for a in plan)
    np.testing.assert_array_equal(np.sort(pair[slot.reshape(-1)]), np.arange(n * k))  # every pair has a row of its own
    assert (pair < n * k).sum() == n * k  # and all other rows are padding
    np.testing.assert_array_equal(block_expert[slot // rows], experts)
    assert (np.diff(block_expert) >= 0).all()


@pytest.mark.parametrize(("n", "k", "e"), [(1, 1, 1), (1, 3, 7), (13, 2, 5), (40, 8, 8)])
def test_plan_of_few_tokens_drops_nothing(n, k, e):
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(e)[:k] for _ in range(n)])
    plan = plan_few(jnp.asarray(experts), e)
    slot, pair, used = (np.asarray(a) for a in (plan.slot, plan.pair, plan.block_expert.used))
    rows = pair.size // e
    assert rows % 8 == 0 and n <= rows < n + 8
    np.testing.assert_array_equal(pair[slot.reshape(-1)], np.arange(n * k))
    assert (pair < n * k).sum() == n * k
    np.testing.assert_array_equal(slot // rows, experts)
    np.testing.assert_array_equal(used, np.bincount(experts.reshape(-1), minlength=e))
    assert (slot % rows < used[experts]).all()  # the first rows of each


@pytest.mark.parametrize("most", [None, 90])
def test_few_pairs_are_planned_as_many_are(most, monkeypatch):
    experts = jnp.asarray(np.random.default_rng(0).integers(0, 7 if most else 5, (30, 4)))  # 5 and 6 are elsewhere
    compared = plan_blocks(experts, 5, 8, most)
    monkeypatch.setattr(moe, "_FEW_PAIRS", 0)
    for few, many in zip(compared, plan_blocks(experts, 5, 8, most), strict=True):
        np.testing.assert_array_equal(few, many)


def test_dispatch_and_combine_are_each_others_transpose():
    rows = plan_blocks(jnp.array([[0, 2], [2, 1], [2, 0]]), 4, 4).rows
    x, y = jax.random.normal(jax.random.key(0), (3, 5)), jax.random.normal(jax.random.key(1), (rows.source.size, 5))
    np.testing.assert_allclose((dispatch(x, rows) * y).sum(), (x * combine(y, rows)).sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.vjp(lambda a: dispatch(a, rows), x)[1](y)[0], combine(y, rows), rtol=1e-6)
    np.testing.assert_allclose(jax.vjp(lambda a: combine(a, rows), y)[1](x)[0], dispatch(x, rows), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("width", [6, 7, 8])  # 6: whole words of bfloat16 alone; 7: of neither format; 8: of both
def test_dispatch_moves_whatever_a_row_is_made_of(dtype, width):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, width)), dtype)
    rows = Rows(jnp.array([0, 2, 3, 1, 3, 0]), jnp.array([[0, 5], [3, 3], [1, 1]]))
    copies = jax.jit(dispatch)(x, rows)
    assert copies.dtype == x.dtype
    padded = np.concatenate([np.float32(x), np.zeros((1, width), np.float32)])
    np.testing.assert_array_equal(np.float32(copies), padded[np.asarray(rows.source)])


def test_padding_stays_small():
    for pairs, experts in [(8192, 16), (262144, 64), (4, 16), (1, 1)]:
        rows = block_rows(pairs, experts, "cpu")
        assert rows >= 1
        assert experts * (rows - 1) <= 0.25 * pairs
