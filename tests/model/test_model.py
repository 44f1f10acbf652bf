import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv3_jax.model.loss as loss_module
from dsv3_jax.model.init import init_router_bias, parameter_shapes
from dsv3_jax.model.loss import compute_losses, head_sums, objective, target_counts
from dsv3_jax.model.mtp import predict_ahead, shifted, target_weights
from dsv3_jax.model.transformer import UNROLLED_LAYERS, Execution, embed, logits, segments, trunk
from tests.small import MODEL, model, parameters, rows


def test_no_gradient_flows_from_a_prediction_to_later_tokens():
    params, bias = parameters(MODEL)
    tokens = rows(MODEL, 1, 11)[:, :-1]

    def prediction(table, at):
        # One embedding row a position, so that the gradient tells positions apart.
        own = params | {"embed": table}
        return logits(own, trunk(own, bias, jnp.arange(11)[None], MODEL, Execution()).hidden)[0, at].sum()

    table = params["embed"][tokens[0]]
    slope = jax.jit(jax.grad(prediction))
    for at in (0, 4, 10):
        gradient = np.abs(slope(table, at)).sum(-1)
        assert (gradient[: at + 1] > 0).all()
        assert (gradient[at + 1 :] == 0).all()


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_at_depth_k_sees_k_tokens_ahead_and_no_more(depth):
    config = model(num_nextn_predict_layers=depth, vocab_size=12)
    params, bias = parameters(config)
    table = jax.random.normal(jax.random.key(3), (12, config.hidden_size))
    positions = jnp.arange(12)[None]  # token i is row i of the table

    def prediction(table, at):
        own = params | {"embed": table}
        hidden = trunk(own, bias, positions[:, :-1], config, Execution()).hidden
        return predict_ahead(own, bias, hidden, positions, config, Execution())[depth - 1].hidden[0, at].sum()

    slope = jax.jit(jax.grad(prediction))
    for at in (0, 5):
        gradient = np.abs(slope(table, at)).sum(-1)
        assert (gradient[: at + depth + 1] > 0).all()
        assert (gradient[at + depth + 1 :] == 0).all()


def test_mtp_targets_lie_one_token_further_at_each_depth():
    row = jnp.arange(10, 17)[None]
    for depth in (1, 2):
        weights, targets = target_weights(row, depth, None)[0], shifted(row, depth + 1)[0]
        for i in range(6):
            if i + depth + 1 <= 6:
                assert weights[i] == 1
                assert targets[i] == 10 + i + depth + 1
            else:
                assert weights[i] == 0


def test_with_a_document_mask_no_target_crosses_an_end():
    eos = 0
    row = jnp.array([[5, 6, eos, 7, 8, 9, eos, 3]])
    np.testing.assert_array_equal(segments(row, eos)[0], [0, 0, 0, 1, 1, 1, 1, 2])
    np.testing.assert_array_equal(target_weights(row, 0, eos)[0], [1, 1, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(target_weights(row, 1, eos)[0], [1, 0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(target_weights(row, 0, None)[0], [1] * 7)


def test_document_mask_makes_packed_documents_independent():
    params, bias = parameters(MODEL)
    execution = Execution(document_eos=0)
    first, second = jnp.array([[5, 6, 7, 0]]), jnp.array([[9, 3, 4, 2, 8]])
    run = jax.jit(trunk, static_argnums=(3, 4))
    packed = run(params, bias, jnp.concatenate([first, second], 1), MODEL, execution).hidden
    np.testing.assert_allclose(packed[:, 4:], run(params, bias, second, MODEL, Execution()).hidden, rtol=1e-3, atol=1e-4)


@functools.cache
def slope(config, execution):
    """((objective, losses), gradients) of parameters; compiled once for all tests."""
    _, bias = parameters(config)
    batch = rows(config, 4, 12)

    def loss(p):
        losses = compute_losses(p, bias, batch, config, execution)
        return objective(losses, target_counts(batch, config, execution), 0.3, 0.01), losses

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def gradients(config, execution):
    return slope(config, execution)(parameters(config)[0])


def assert_trees_close(a, b, rtol, atol):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_rematerialisation_changes_neither_gradients_nor_counts(policy):
    (value, losses), expected = gradients(MODEL, Execution())
    (again, losses_again), got = gradients(MODEL, Execution(remat=policy))
    np.testing.assert_allclose(again, value, rtol=1e-6)
    assert_trees_close(losses_again.load, losses.load, 0, 0)
    assert_trees_close(got, expected, 1e-4, 1e-6)


def test_every_parameter_gets_a_gradient():
    _, grads = gradients(MODEL, Execution())
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and np.abs(leaf).sum() > 0, jax.tree_util.keystr(path)


def test_gradient_agrees_with_finite_differences():
    params, rng = jax.tree.map(np.asarray, parameters(MODEL)[0]), np.random.default_rng(0)
    direction = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
    # Routing is piecewise constant and the head is float32, so the step is small but not tiny.
    step = 1e-3 / np.sqrt(sum((d**2).sum() for d in jax.tree.leaves(direction)))
    moved = (jax.tree.map(lambda p, d, s=s: p + s * step * d, params, direction) for s in (1, -1))
    (ahead, _), (behind, _) = (slope(MODEL, Execution())(p)[0] for p in moved)
    _, grads = gradients(MODEL, Execution())
    along = sum((g * d).sum() for g, d in zip(map(np.asarray, jax.tree.leaves(grads)), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose((ahead - behind) / (2 * step), along, rtol=0.05)


def test_load_counts_every_token_once():
    params, bias = parameters(MODEL)
    load = jax.jit(compute_losses, static_argnums=(3, 4))(params, bias, rows(MODEL, 3, 10), MODEL, Execution()).load
    np.testing.assert_array_equal(load.moe.sum(-1), [3 * 10 * 4] * 2)
    np.testing.assert_array_equal(load.mtp.sum(-1), [3 * 9 * 4])  # the last position has no second token


@pytest.mark.parametrize("chunk", [4, 7, 100])
def test_head_in_chunks_equals_plain_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(loss_module, "LOGITS_PER_CHUNK", chunk * 11)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, kernel = jax.random.normal(keys[0], (10, 6)), jax.random.normal(keys[1], (6, 11))
    targets, weights = jax.random.randint(keys[2], (10,), 0, 11), jnp.arange(10) % 3 / 2.0

    def plain(h, k):
        return -(jnp.take_along_axis(jax.nn.log_softmax(h @ k), targets[:, None], 1)[:, 0] * weights).sum()

    value, grads = jax.value_and_grad(lambda h, k: 2.0 * head_sums(h, k, targets, weights).nll, (0, 1))(hidden, kernel)
    expected, expected_grads = jax.value_and_grad(lambda h, k: 2.0 * plain(h, k), (0, 1))(hidden, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_trees_close(grads, expected_grads, 1e-4, 1e-5)
    sums = head_sums(hidden, kernel, targets, weights)
    np.testing.assert_allclose(sums.correct, (((hidden @ kernel).argmax(-1) == targets) * weights).sum())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 2},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0},
        {"tie_word_embeddings": True, "n_shared_experts": 0},
        {"n_group": 1, "topk_group": 1, "scoring_func": "softmax", "q_lora_rank": None},
    ],
)
def test_every_shape_of_model_trains(changes):
    config = model(num_hidden_layers=2, **changes)
    (value, losses), _ = gradients(config, Execution())
    assert np.isfinite(value)
    assert len(losses.mtp) == config.num_nextn_predict_layers
    np.testing.assert_allclose(losses.main.nll / losses.main.tokens, np.log(48), atol=3.0)


def test_bf16_stays_close_to_float32():
    config = model(num_hidden_layers=2, num_nextn_predict_layers=0)
    (value, _), _ = gradients(config, Execution())
    (low, _), grads = gradients(config, Execution(dtype="bfloat16"))
    np.testing.assert_allclose(low, value, rtol=0.02)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


def test_program_does_not_grow_with_depth():
    def size(layers):
        config = model(num_hidden_layers=layers)
        params, bias = parameter_shapes(config), jax.eval_shape(lambda: init_router_bias(config))
        batch = jax.ShapeDtypeStruct((2, 9), jnp.int32)
        return len(
            jax.jit(lambda p, b, r: compute_losses(p, b, r, config, Execution()).main.nll).lower(params, bias, batch).as_text().splitlines()
        )

    assert size(UNROLLED_LAYERS + 2) == size(12)  # one dense layer, and one more than are unrolled


def test_embedding_is_cast_to_the_activation_dtype():
    params, _ = parameters(MODEL)
    assert embed(params, jnp.zeros((1, 2), jnp.int32), "bfloat16").dtype == jnp.bfloat16
