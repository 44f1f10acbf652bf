import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import attention_backward, hopper
from tests.kernels.attention_cases import GradientCases, Problem
from tests.kernels.interpreter import interpreted


class TestReference(GradientCases):
    def run(self, problem):
        return jax.jit(functools.partial(attention_backward, scale=problem.scale, impl="reference"))(*problem.operands)


class TestInterpreted(GradientCases):
    """The kernel as written."""

    def run(self, problem):
        operands = problem.operands
        return interpreted(lambda: attention_backward(*operands, problem.scale, impl="pallas"))


@pytest.mark.parametrize(
    ("rows", "length", "heads", "width", "v_width"), [(8, 4096, 32, 192, 128), (1, 4096, 128, 192, 128), (2, 1001, 4, 64, 64)]
)
def test_sizes_of_training_can_be_lowered(rows, length, heads, width, v_width):
    of_keys, of_values = (jax.ShapeDtypeStruct((rows, length, heads, columns), jnp.bfloat16) for columns in (width, v_width))
    log_sums = jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)
    run = jax.jit(functools.partial(attention_backward, scale=0.1, impl="pallas"))
    run.trace(of_keys, of_keys, of_values, of_values, of_values, log_sums).lower(lowering_platforms=("cuda",))


def test_a_line_holds_what_its_queries_need():
    problem = Problem(length=70)
    _, _, _, out, gradient, log_sums = problem.operands
    lines = hopper.lines(log_sums, out, gradient)
    assert lines.shape == (1, 1, 2, 128)
    assert jnp.array_equal(lines[0, 0, :, :64].reshape(-1)[:70], log_sums[0, 0])
    assert jnp.isposinf(lines[0, 0, 1, 6:64]).all() and not lines[0, 0, 1, 70:].any()  # so P and dS of queries that do not exist are 0


@pytest.mark.parametrize(
    ("dtype", "width", "v_width", "words"),
    [("float32", 192, 128, "q: dtype float32"), ("bfloat16", 96, 64, "q: 96 columns"), ("bfloat16", 192, 192, "v: 192 columns")],
)
def test_what_cannot_be_taken_is_named(dtype, width, v_width, words):
    of_keys, of_values = (jnp.zeros((1, 8, 1, columns), dtype) for columns in (width, v_width))
    with pytest.raises(NotImplementedError, match=words):
        attention_backward(of_keys, of_keys, of_values, of_values, of_values, jnp.zeros((1, 1, 8)), 1.0, impl="pallas")
