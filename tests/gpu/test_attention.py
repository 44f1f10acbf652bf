"""Fused attention against plain JAX on a Hopper GPU: our kernels, alone and as a model calls them, and cuDNN at other widths too."""

import dataclasses
import functools

import jax
import pytest

from dsv3_jax.model.attention import attend
from dsv3_jax.model.layers import softmax_scale
from dsv3_jax.precision.policy import BF16, Recipe
from experiments.bench.attention_peers import draw, errors, exact_results
from pallas_kernels.attention import attention, attention_backward
from pallas_kernels.backend import is_hopper
from tests.kernels.attention_cases import AttentionCases
from tests.small import MODEL

pytestmark = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")


@pytest.mark.parametrize(
    ("impl", "length", "nope", "rope", "recipe"),
    [
        ("pallas", 4096, 128, 64, BF16),
        ("pallas", 4096, 128, 64, Recipe(fp8=True)),
        ("pallas", 1000, 128, 64, BF16),
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


class TestKernels(AttentionCases):
    problems = AttentionCases.problems | {
        "a row of training": dict(length=4096, heads=4, batch=2),
        "no multiple of a tile": dict(length=2999, heads=3),
        "narrow": dict(length=1000, width=64, v_width=64, rope=0, heads=5, batch=3),
        "documents": dict(length=4096, heads=4, batch=2, documents=(5, 700, 701, 1024, 3000)),
        "one part": dict(length=1500, width=192, rope=0, heads=3),
    }

    def run(self, problem):
        return jax.jit(functools.partial(attention, scale=problem.scale, impl="pallas"))(*problem.operands)

    def run_backward(self, problem):
        return jax.jit(functools.partial(attention_backward, scale=problem.scale, impl="pallas"))(*problem.of_gradients)

    @pytest.mark.parametrize("name", [*problems])
    def test_output_and_sums(self, name):
        super().test_output_and_sums(name)

    @pytest.mark.parametrize("name", [*problems])
    def test_gradients(self, name):
        super().test_gradients(name)
