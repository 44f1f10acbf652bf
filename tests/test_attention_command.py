"""The benchmark of attention: what it counts, and that a wrong implementation shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.attention import masked_attention
from experiments.bench import attention_peers as attention
from tests import small

MODEL = small.CONFIG.model
OPERANDS = attention.draw(MODEL, "float32", 2, 24)


def test_operations_are_those_of_the_pairs_that_a_causal_mask_leaves():
    pairs = 2 * MODEL.num_attention_heads * sum(t + 1 for t in range(24))
    wide, narrow = MODEL.qk_head_dim, MODEL.v_head_dim
    forward = pairs * (2 * wide + 2 * narrow)  # scores, weighted values
    again = pairs * 2 * wide  # scores, which the backward pass makes anew
    gradients = pairs * (2 * narrow + 2 * narrow + 2 * wide + 2 * wide)  # of probabilities and values, of queries and keys
    assert attention.flops(MODEL, 2, 24, backward=False) == forward
    assert attention.flops(MODEL, 2, 24, backward=True) == forward + again + gradients


@pytest.mark.parametrize("wrong", ["nothing", "sees later tokens", "gradient of the values"])
def test_errors_tell_output_and_gradients_apart(wrong):
    right = attention.implementations(MODEL)["plain JAX"]

    def attend(q, k, v):
        if wrong == "sees later tokens":
            return masked_attention(q, k, v, 0.3, jnp.ones((1, 24, 24), bool))
        if wrong == "gradient of the values":
            return right(q, k, jax.lax.stop_gradient(v))
        return right(q, k, v)

    output, *gradients = attention.errors(attend, OPERANDS, attention.exact_results(OPERANDS, MODEL))
    assert (output > 0.1) == (wrong == "sees later tokens")
    assert (max(gradients) > 0.1) == (wrong != "nothing")
    assert np.isfinite([output, *gradients]).all()
