"""Fused attention against plain JAX on a Hopper GPU: output and gradients. tokamax at the widths of MLA, cuDNN at others too."""

import dataclasses
import importlib.util

import pytest

from dsv3_jax.model.attention import attend
from dsv3_jax.model.layers import softmax_scale
from dsv3_jax.precision.policy import BF16, Recipe
from experiments.bench.attention_peers import draw, errors, exact_results
from pallas_kernels.backend import is_hopper
from tests.small import MODEL

pytestmark = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
needs_tokamax = pytest.mark.skipif(not importlib.util.find_spec("jax_triton"), reason="needs tokamax")


@pytest.mark.parametrize(
    ("impl", "length", "nope", "rope", "recipe"),
    [
        pytest.param("tokamax", 4096, 128, 64, BF16, marks=needs_tokamax),
        pytest.param("tokamax", 640, 128, 64, BF16, marks=needs_tokamax),
        pytest.param("tokamax", 4096, 128, 64, Recipe(fp8=True), marks=needs_tokamax),
        ("cudnn", 4096, 128, 64, BF16),
        ("cudnn", 640, 64, 32, BF16),
        ("cudnn", 1000, 32, 16, BF16),
    ],
)
def test_output_and_gradients(impl, length, nope, rope, recipe):
    model = dataclasses.replace(MODEL, num_attention_heads=4, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=nope)
    operands = draw(model, "bfloat16", 2, length)
    attended = lambda q, k, v: attend(q, k, v, scale=softmax_scale(model), impl=impl, recipe=recipe).out  # noqa: E731
    found = errors(attended, operands, exact_results(operands, model))
    assert all(error < 6e-3 for error in found)
