import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.inference.cache import init_cache
from dsv3_jax.inference.decode import at_rest, forward_cached, forward_prompts
from dsv3_jax.model.transformer import Execution
from dsv3_jax.precision.policy import Recipe
from pallas_kernels.backend import is_hopper
from tests.kernels.product_cases import assert_near
from tests.small import model, parameters, rows

pytestmark = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
WIDTHS = dict.fromkeys(("moe_intermediate_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 128)
WIDE = model(hidden_size=256, intermediate_size=384, qk_rope_head_dim=64, initializer_range=0.05, **WIDTHS)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("batch", [1, 8, 40])
def test_generation_from_kernels_at_rest(batch, fp8):
    """A prompt and a token after it: experts by the masked product, where masters, and the prompts of 40, go by the grouped one."""
    params, bias = parameters(WIDE)
    tokens, execution = rows(WIDE, batch, 6), Execution("bfloat16", recipe=Recipe(fp8=fp8, impl="pallas"))

    @jax.jit
    def states(params):
        cache = init_cache(WIDE, batch, 16, "bfloat16")
        prompt, cache = forward_prompts(params, bias, tokens[:, :6], cache, WIDE, execution)
        token, _ = forward_cached(params, bias, tokens[:, 6:], jnp.full((batch, 1), 6), cache, WIDE, execution)
        return jnp.concatenate([prompt, token], 1).astype(jnp.float32)

    assert_near(states(at_rest(params, execution)), states(params), 1e-3)
