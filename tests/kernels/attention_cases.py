"""One test base for every implementation of attention and its gradients: against plain softmax attention in float32, and jax.vjp of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.product_cases import assert_near

ERROR = 3e-3  # relative, Frobenius: probabilities or gradients of scores, and the results, are rounded to bfloat16, 1.7e-3 each


class Problem:
    """Operands and the gradient of the output: rows of different sizes, some outliers, so that some queries see one key and others all.

    rope: columns of the rotated part; 0: there is none. With one, queries have as many columns more, which nobody may read.
    documents: where those of the first row begin; in other rows they begin a position later each.
    """

    def __init__(self, length, width=128, v_width=128, rope=64, batch=1, heads=1, documents=None, seed=0):
        rng = np.random.default_rng(seed)
        self.scale, self.width = (width + rope) ** -0.5, width
        of_head = functools.partial(_rough, rng, batch, length, heads)
        self.q, self.k, self.v, self.gradient = of_head(width), of_head(width), of_head(v_width), of_head(v_width)
        self.rotated = (of_head(rope), _rough(rng, batch, length, rope)) if rope else None
        unread = jnp.full((batch, length, heads, rope), jnp.nan, jnp.bfloat16)
        self.starts = None if documents is None else _starts(length, batch, documents)
        self.operands = jnp.concatenate([self.q, unread], -1), self.k, self.v, self.rotated, self.starts

    @functools.cached_property
    def expected(self):
        """The output, log2 of the sums of exponentials, and the gradients of q, k, v and of the rotated parts."""
        return jax.jit(_exact)((self.q, self.k, self.v, self.rotated), self.starts, self.gradient, self.scale)

    @property
    def of_gradients(self):
        """The output is not rounded: where a query sees few keys, its rounding would be most of the error."""
        out, log_sums, _ = self.expected
        return *self.operands, out, self.gradient, log_sums


def _rough(rng, *shape):
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-2, 2, (*shape[:-1], 1))
    x[rng.random(shape) < 1e-3] *= 10
    return jnp.asarray(np.float32(x), jnp.bfloat16)


def _starts(length, batch, documents):
    rows = [[max([begin + row for begin in documents if begin + row <= t], default=0) for t in range(length)] for row in range(batch)]
    return jnp.asarray(rows, jnp.int32)


def _exact(operands, starts, gradient, scale):
    def attend(q, k, v, rotated):
        scores = jnp.einsum("bthk,bshk->bhts", q, k)
        if rotated:
            scores += jnp.einsum("bthk,bsk->bhts", *rotated)
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        if starts is not None:
            seen &= jnp.arange(seen.shape[0]) >= starts[:, None, :, None]
        scores = jnp.where(seen, scores * scale, -jnp.inf)
        return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores, axis=-1), v), scores

    with jax.default_matmul_precision("highest"):
        operands = jax.tree.map(lambda x: x.astype(jnp.float32), operands)
        out, pull, scores = jax.vjp(attend, *operands, has_aux=True)
        gradients = pull(gradient.astype(jnp.float32))
    return out, jax.nn.logsumexp(scores, axis=-1) * np.log2(np.e).astype(np.float32), gradients


class AttentionCases:
    """Subclasses say how the operations run, and on which problems."""

    problems = {  # noqa: RUF012 (cases, not state)
        "two queries": dict(length=2, heads=4),
        "a tile, parts side by side": dict(length=64, width=64, v_width=64, rope=0, heads=2),
        "keys end within a warpgroup, values narrower": dict(length=70, width=128, v_width=64, rope=0),
        "two blocks of keys, several heads and rows": dict(length=200, width=64, rope=64, batch=2, heads=3),
        "a block and a query": dict(length=129),
        "documents that end within tiles, at their ends, and after one token": dict(
            length=300, heads=2, batch=2, documents=(40, 41, 128, 191, 270)
        ),
        "documents of three tokens": dict(length=140, width=64, rope=0, documents=range(0, 140, 3)),
    }

    def run(self, problem):
        raise NotImplementedError

    def run_backward(self, problem):
        raise NotImplementedError

    @pytest.mark.parametrize("name", [*problems])
    def test_output_and_sums(self, name):
        problem = Problem(**self.problems[name])
        out, log_sums = self.run(problem)
        assert out.dtype == jnp.bfloat16
        assert_near(out, problem.expected[0], ERROR)
        np.testing.assert_allclose(log_sums, problem.expected[1], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", [*problems])
    def test_gradients(self, name):
        problem = Problem(**self.problems[name])
        dq, *others = self.run_backward(problem)
        assert not dq[..., problem.width :].any()
        got, expected = (jax.tree.leaves(x) for x in ((dq[..., : problem.width], *others), problem.expected[2]))
        for of_got, of_expected in zip(got, expected, strict=True):
            assert of_got.dtype == jnp.bfloat16
            assert_near(of_got, of_expected, ERROR)

    def test_no_query_sees_later_keys(self):
        """Bit for bit: neither in its output nor in any gradient."""
        problem, last = Problem(length=200), 100
        out, _ = self.run(problem)
        problem.operands = jax.tree.map(lambda x: x.at[:, last + 1 :].set(7), problem.operands)
        assert np.array_equal(out[:, : last + 1], self.run(problem)[0][:, : last + 1])

    def test_no_gradient_leaves_the_keys_that_a_query_sees(self):
        """Bit for bit: what a query does not see has no part in it."""
        problem, last = Problem(length=200), 100
        problem.gradient = problem.gradient.at[:, last + 1 :].set(0)
        gradients = [np.asarray(x, np.float32) for x in jax.tree.leaves(self.run_backward(problem))]
        assert not any(x[:, last + 1 :].any() for x in gradients)
        assert all(np.abs(x[:, 1 : last + 1]).max(-1).all() for x in gradients)
