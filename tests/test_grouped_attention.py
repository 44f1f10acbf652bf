"""MHA, GQA and MQA in MLA's place: what they compute, and models of equal size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import study_120m, study_cpu
from dsv3_jax.config import from_config_dict
from dsv3_jax.model.init import parameter_shapes
from dsv3_jax.model.layers import rope
from dsv3_jax.precision.policy import BF16
from dsv3_jax.training.accounting import count_parameters
from experiments.ablations.grouped_attention import GroupedAttention, grouped
from tests import small

CONFIG = grouped(small.model(num_attention_heads=4), 2)


@pytest.fixture(scope="module")
def layer():
    """The layer, its parameters, an input and its positions."""
    module = GroupedAttention(CONFIG, "reference", BF16)
    x = jax.random.normal(jax.random.key(0), (2, 9, CONFIG.hidden_size))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    return module, jax.jit(module.init)(jax.random.key(1), x, positions, None)["params"], x, positions


def test_heads_attend_to_the_key_and_value_of_their_group(layer):
    module, params, x, positions = layer
    width, heads = CONFIG.v_head_dim, []
    for head in range(4):
        columns = [slice(h * width, (h + 1) * width) for h in (head, head // 2, head // 2)]
        q, k, v = (x @ params[f"{name}_proj"]["kernel"][:, cut] for name, cut in zip("qkv", columns, strict=True))
        q, k = (rope(a[:, :, None], positions, CONFIG)[:, :, 0] for a in (q, k))
        scores = jnp.where(jnp.tril(jnp.ones((9, 9), bool)), q @ k.swapaxes(1, 2) / width**0.5, -jnp.inf)
        heads.append(jax.nn.softmax(scores) @ v)
    expected = jnp.concatenate(heads, -1) @ params["o_proj"]["kernel"]
    np.testing.assert_allclose(module.apply({"params": params}, x, positions, None), expected, rtol=1e-4, atol=1e-5)


def test_a_model_has_it_in_every_layer_in_the_place_of_mla():
    def attention(model):
        shapes = parameter_shapes(model)
        return [set(block["self_attn"]) for block in (shapes["dense"], shapes["moe"], shapes["mtp"]["block"])]

    assert attention(CONFIG) == [{"q_proj", "k_proj", "v_proj", "o_proj"}] * 3
    assert all("kv_b_proj" in names for names in attention(small.MODEL))


@pytest.mark.parametrize("file", [study_cpu, study_120m])
@pytest.mark.parametrize("groups", ["all", 2, 1])
def test_models_are_of_equal_size(file, groups):
    model = from_config_dict(file.get_config()).model
    other = grouped(model, model.num_attention_heads if groups == "all" else groups)
    assert count_parameters(other).total == pytest.approx(count_parameters(model).total, rel=5e-3)
    assert other.v_head_dim % 8 == 0 and other.num_attention_heads == model.num_attention_heads
