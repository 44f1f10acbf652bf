"""The whole small model under the FP8 recipe."""

import functools

import jax
import numpy as np

from dsv3_jax.model.loss import compute_losses, objective, target_counts
from dsv3_jax.model.transformer import Execution
from dsv3_jax.precision.policy import Recipe
from tests.small import model, parameters, rows

FP8 = Recipe(fp8=True)
MODEL = model(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
BATCH, LENGTH = 4, 12


def loss(params, execution):
    batch, (_, bias) = rows(MODEL, BATCH, LENGTH), parameters(MODEL)
    return objective(compute_losses(params, bias, batch, MODEL, execution), target_counts(batch, MODEL, execution), 0.3, 0.01)


@functools.cache
def slope(execution):
    return jax.jit(jax.value_and_grad(lambda params: loss(params, execution)))


def test_fp8_learns_a_batch_and_every_parameter_gets_a_gradient():
    params, _ = parameters(MODEL)
    first, gradients = slope(Execution(recipe=FP8))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).sum() > 0, jax.tree_util.keystr(path)
    value, plain = slope(Execution())(params)
    np.testing.assert_allclose(first, value, rtol=0.02)
    assert first != value
    flat, flat_plain = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g)]) for g in (gradients, plain))
    assert flat @ flat_plain > 0.95 * np.linalg.norm(flat) * np.linalg.norm(flat_plain)
    for _ in range(5):
        gradients = jax.tree.map(np.asarray, gradients)  # steps in NumPy: nothing to compile
        step = 0.5 / np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
        params = jax.tree.map(lambda p, g, s=step: p - s * g, params, gradients)
        last, gradients = slope(Execution(recipe=FP8))(params)
    assert last < first - 0.3, (first, last)


def test_rematerialisation_rounds_as_the_forward_pass_did():
    params, _ = parameters(MODEL)
    value, expected = slope(Execution(recipe=FP8))(params)
    again, got = slope(Execution(recipe=FP8, remat="selective"))(params)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def test_selective_rematerialisation_keeps_fp8():
    execution = Execution(dtype="bfloat16", recipe=FP8, remat="selective")
    leaves = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, execution), p)[1], parameters(MODEL)[0]))
    kept = [(leaf.dtype.name, leaf.shape[1:]) for leaf in leaves if leaf.dtype.itemsize < 4 and leaf.shape[0] == 1]
    tokens, layer = BATCH * LENGTH, MODEL
    attended = layer.num_attention_heads * layer.v_head_dim
    blocks = 9  # of 128 rows: at most one a block more than the 192 pairs fill, for each of 8 experts
    of_tokens = [("bfloat16", (BATCH, LENGTH, width)) for width in (layer.q_lora_rank, layer.kv_lora_rank + layer.qk_rope_head_dim)]
    of_tokens += [("bfloat16", (BATCH, LENGTH, layer.hidden_size))] * 2  # input of the layer, attention_residual
    assert sorted(kept) == sorted(
        [
            *of_tokens,
            ("float16", (tokens, attended)),  # attention_out as E5M6
            ("float8_e4m3fn", (blocks, 128, 2 * layer.moe_intermediate_size)),  # swiglu_in of routed and shared experts
            ("float8_e4m3fn", (tokens, 2 * layer.moe_intermediate_size)),
        ]
    )
