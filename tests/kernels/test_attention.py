import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import attention, attention_backward, hopper_backward
from tests.kernels.attention_cases import AttentionCases, Problem
from tests.kernels.interpreter import interpreted


class TestReference(AttentionCases):
    def run(self, problem):
        return jax.jit(functools.partial(attention, scale=problem.scale, impl="reference"))(*problem.operands)

    def run_backward(self, problem):
        return jax.jit(functools.partial(attention_backward, scale=problem.scale, impl="reference"))(*problem.of_gradients)


class TestInterpreted(AttentionCases):
    """The kernels as written."""

    def run(self, problem):
        return interpreted(lambda: attention(*problem.operands, problem.scale, impl="pallas"))

    def run_backward(self, problem):
        operands = problem.of_gradients
        return interpreted(lambda: attention_backward(*operands, problem.scale, impl="pallas"))


def _operands(rows, length, heads, width, v_width, rope, dtype="bfloat16", documents=False):
    """Shapes of what `attention` takes, and of what it returns."""
    shape = lambda *columns: jax.ShapeDtypeStruct((rows, length, *columns), dtype)  # noqa: E731
    rotated = (shape(heads, rope), shape(rope)) if rope else None
    starts = jax.ShapeDtypeStruct((rows, length), jnp.int32) if documents else None
    operands = shape(heads, width + rope), shape(heads, width), shape(heads, v_width), rotated, starts
    return operands, shape(heads, v_width), jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)


@pytest.mark.parametrize(
    ("sizes", "documents"),
    [
        ((8, 4096, 32, 128, 128, 64), False),
        ((8, 4096, 32, 128, 128, 64), True),
        ((1, 4096, 128, 128, 128, 64), False),
        ((8, 4096, 32, 192, 128, 0), False),
        ((2, 1001, 4, 64, 64, 0), True),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_sizes_of_training_can_be_lowered(sizes, documents, backward):
    operands, out, log_sums = _operands(*sizes, documents=documents)
    run = jax.jit(functools.partial(attention_backward if backward else attention, scale=0.1, impl="pallas"))
    run.trace(*operands, *((out, out, log_sums) if backward else ())).lower(lowering_platforms=("cuda",))


def test_a_line_holds_what_its_queries_need():
    problem = Problem(length=70)
    *_, out, gradient, log_sums = problem.of_gradients
    lines = hopper_backward.lines(log_sums, out, gradient)
    assert lines.shape == (1, 1, 2, 128)
    assert jnp.array_equal(lines[0, 0, :, :64].reshape(-1)[:70], log_sums[0, 0])
    assert jnp.isposinf(lines[0, 0, 1, 6:64]).all() and not lines[0, 0, 1, 70:].any()  # so P and dS of queries that do not exist are 0


@pytest.mark.parametrize(
    ("dtype", "widths", "words"),
    [
        ("float32", (128, 128, 64), "q: dtype float32"),
        ("bfloat16", (96, 64, 0), "k: 96 columns"),
        ("bfloat16", (96, 64, 32), "k: 96 and 32 columns: .* parts in multiples of 64"),
        ("bfloat16", (128, 192, 64), "v: 192 columns"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_what_cannot_be_taken_is_named(dtype, widths, words, backward):
    operands, out, log_sums = _operands(1, 8, 1, *widths, dtype)
    run = functools.partial(attention_backward if backward else attention, scale=1.0, impl="pallas")
    with pytest.raises(NotImplementedError, match=words):
        jax.eval_shape(run, *operands, *((out, out, log_sums) if backward else ()))
