"""Operands that the studies take from a model: multiplied without FP8 they give the model's own gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.loss import compute_losses, objective, target_counts
from dsv3_jax.model.transformer import Execution
from dsv3_jax.precision import linear
from dsv3_jax.precision.policy import BF16, EXPERT_UP, LINEAR, Recipe
from dsv3_jax.training.state import TrainState
from experiments.ablations import products
from tests import small

CONFIG = dataclasses.replace(small.CONFIG, model=small.model(num_hidden_layers=2))


@pytest.fixture(scope="module")
def found():
    """Operands of the model, and the gradients of its parameters."""
    params, bias = small.parameters(CONFIG.model)
    rows = small.rows(CONFIG.model, 2, 12)

    def loss(params):
        losses = compute_losses(params, bias, rows, CONFIG.model, Execution())
        return objective(losses, target_counts(rows, CONFIG.model, Execution()), CONFIG.train.mtp_loss_weight, 0.0)

    state = TrainState(jnp.int32(0), params, (), bias, jnp.int32(0))
    return products.products_of(state, CONFIG, rows), jax.jit(jax.grad(loss))(params)


def test_wgrad_of_every_product_is_the_gradient_of_its_kernel(found):
    layers, gradients = found
    assert [list(layer) for layer in layers] == [products.product_names(CONFIG, is_moe) for is_moe in (False, True)]
    for layer, stack, ffns in zip(layers, ("dense", "moe"), (("ffn",), ("experts", "shared")), strict=True):
        of = jax.tree.map(lambda leaf: leaf[0], gradients[stack])
        expected = {name: of["self_attn"][f"{name}_proj"]["kernel"] for name in ("q_a", "q_b", "o")}
        expected |= {"kv_a": of["self_attn"]["kv_a_proj_with_mqa"]["kernel"], "kv_b": of["self_attn"]["kv_b_proj"]}
        for ffn in ffns:
            kernels = of["mlp"] if ffn == "ffn" else of["mlp"]["experts" if ffn == "experts" else "shared_experts"]
            expected |= {f"{ffn} up": kernels["gate_up_proj"], f"{ffn} down": kernels["down_proj"]}
        assert expected.keys() == layer.keys()
        for name, product in layer.items():
            _, _, dw = products._multiply(products._in_whole_blocks(product), BF16)
            exact = expected[name].reshape(dw.shape)
            np.testing.assert_allclose(dw, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max(), err_msg=f"{stack} {name}")


def test_rows_keep_their_experts_in_whole_blocks():
    rng, owners = np.random.default_rng(0), [0, 2, 2, 2, 4, 5, 5]  # of 5 experts; 5 owns nothing
    x, dy = (np.float32(rng.normal(size=(7, 64, width))) for width in (3, 2))
    x[5:], dy[5:] = 0, 0
    old = products.Product(jnp.asarray(x), jnp.ones((5, 3, 2)), jnp.array(owners), jnp.asarray(dy), EXPERT_UP)
    new = products._in_whole_blocks(old)
    assert new.x.shape[1] == 128 and list(new.block_expert) == sorted(new.block_expert)
    for ours, exact in zip(products._multiply(new, BF16)[2], products._multiply(old, BF16)[2], strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)
    runs = np.concatenate([np.asarray(new.x)[np.asarray(new.block_expert) == 2].reshape(-1, 3)])
    np.testing.assert_array_equal(runs[: 3 * 64], x[1:4].reshape(-1, 3))


def test_errors_tell_the_product_that_a_tile_serves():
    x, dy = (np.random.default_rng(seed).normal(size=(256, 128)) * np.exp2(np.arange(256) % 24)[:, None] for seed in (0, 1))
    product = products.Product(jnp.float32(x), jnp.eye(128), None, jnp.float32(dy), LINEAR)
    fine, coarse = Recipe(True, impl="reference"), Recipe(True, gradient_tile=(128, 128), impl="reference")
    errors = products.errors_of(product, {"fine": fine, "coarse": coarse})
    same = errors["fine"] == errors["coarse"]
    assert list(same) == [True, False, False]  # Fprop does not see gradients
    assert all((error > 0.01).all() and (error < 0.05).all() for error in errors.values())


def test_a_tap_and_the_kernels_exclude_each_other(monkeypatch):
    monkeypatch.setattr(linear, "use_pallas", lambda impl: True)
    with pytest.raises(NotImplementedError, match="tap"):
        linear.linear(jnp.ones((128, 128)), jnp.ones((128, 128)), Recipe(True, impl="pallas", tap=lambda *args: args[-1]))
