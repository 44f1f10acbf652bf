"""One test base for every implementation of attention's gradients: against those of plain softmax attention in float32, by jax.vjp."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.product_cases import assert_near

ERROR = 3e-3  # relative, Frobenius: gradients of scores and the results are rounded to bfloat16, 1.7e-3 each


class Problem:
    """q, k, v and the gradient of the output: rows of different sizes, some outliers, so that some queries see one key and others all."""

    def __init__(self, length, width=192, v_width=128, batch=1, heads=1, seed=0):
        rng = np.random.default_rng(seed)
        self.scale = width**-0.5
        self.q, self.k, self.v, self.gradient = (_rough(rng, batch, length, heads, columns) for columns in (width, width, v_width, v_width))

    @property
    def operands(self):
        """All but the scale. `out` is not rounded: where a query sees few keys, its rounding would be most of the error."""
        scores = jax.jit(_scores)(*self.of_float32[:2], self.scale)
        out = jax.jit(_attention)(*self.of_float32[:3], self.scale)
        log_sums = jax.nn.logsumexp(scores, axis=-1) * np.log2(np.e).astype(np.float32)
        return self.q, self.k, self.v, out, self.gradient, log_sums

    @property
    def of_float32(self):
        return tuple(x.astype(jnp.float32) for x in (self.q, self.k, self.v, self.gradient))

    def expected(self):
        *inputs, gradient = self.of_float32
        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda *x: jax.vjp(lambda *y: _attention(*y, self.scale), *x)[1](gradient))(*inputs)


def _rough(rng, *shape):
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-2, 2, (*shape[:-1], 1))
    x[rng.random(shape) < 1e-3] *= 10
    return jnp.asarray(np.float32(x), jnp.bfloat16)


def _scores(q, k, scale):
    scores = jnp.einsum("bthk,bshk->bhts", q, k, precision="highest") * scale
    return jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)


def _attention(q, k, v, scale):
    return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(_scores(q, k, scale), axis=-1), v, precision="highest")


class GradientCases:
    """Subclasses say how the operation runs, and on which problems."""

    problems = {  # noqa: RUF012 (cases, not state)
        "two queries": dict(length=2),
        "a tile": dict(length=64, width=64, v_width=64, heads=2),
        "keys end within a warpgroup": dict(length=70, width=128),
        "two blocks of keys, several heads and rows": dict(length=200, width=128, v_width=64, batch=2, heads=3),
        "a block and a query": dict(length=129),
    }

    def run(self, problem):
        raise NotImplementedError

    @pytest.mark.parametrize("name", [*problems])
    def test_gradients(self, name):
        problem = Problem(**self.problems[name])
        for got, expected in zip(self.run(problem), problem.expected(), strict=True):
            assert got.dtype == jnp.bfloat16
            assert_near(got, expected, ERROR)

    def test_no_gradient_leaves_the_keys_that_a_query_sees(self):
        """Bit for bit: what a query does not see has no part in it."""
        problem, last = Problem(length=200), 100
        problem.gradient = problem.gradient.at[:, last + 1 :].set(0)
        dq, dk, dv = (np.asarray(x, np.float32) for x in self.run(problem))
        assert not any(x[:, last + 1 :].any() for x in (dq, dk, dv))
        assert all(np.abs(x[:, 1 : last + 1]).max(-1).all() for x in (dq, dk, dv))
