"""One test base for every implementation of decoding: against attention in float64 over the positions that a query may see."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.product_cases import assert_near

ERROR = 3e-3  # relative, Frobenius: weights and output are rounded to bfloat16, 1.7e-3 each
SCALE = 0.05


class Problem:
    """Sequences over shuffled pages. Whatever no query may see is NaN: foreign pages, the rest of a last page, the table's rest."""

    def __init__(self, lengths, tokens, heads, rank=256, rope=64, page=64, width=None, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths, self.tokens = np.array(lengths, np.int32), tokens
        needed = [-(-length // page) for length in lengths]
        width = width or max(max(needed), 1)
        self.table = np.full((len(lengths), width), sum(needed), np.int32)  # the last page is nobody's
        order = rng.permutation(sum(needed)).astype(np.int32)
        pool = np.full((sum(needed) + 1, page, rank + rope), np.nan, np.float32)
        self.q = as_bf16(rng.normal(size=(len(lengths), tokens, heads, rank + rope)) * 2.0 ** rng.integers(-1, 2, (1, 1, heads, 1)))
        for row, (length, pages) in enumerate(zip(lengths, needed, strict=True)):
            self.table[row, :pages], order = order[:pages], order[pages:]
            latent = rng.normal(size=(length, rank + rope))
            latent[rng.random(latent.shape) < 1e-3] *= 30
            for i in range(pages):
                part = latent[i * page : (i + 1) * page]
                pool[self.table[row, i], : len(part)] = part
        self.c_kv, self.k_r = as_bf16(pool[..., :rank]), as_bf16(pool[..., rank:])

    @property
    def operands(self):
        return self.q, self.c_kv, self.k_r, jnp.asarray(self.table), jnp.asarray(self.lengths)

    def expected(self):
        q, c_kv, k_r = (np.asarray(x, np.float64) for x in (self.q, self.c_kv, self.k_r))
        out = np.zeros((*q.shape[:3], c_kv.shape[-1]))
        for row, length in enumerate(self.lengths):
            latent, rope = (x[self.table[row]].reshape(-1, x.shape[-1]) for x in (c_kv, k_r))
            for token in range(self.tokens):
                seen = max(int(length) - self.tokens + 1 + token, 0)
                if seen:
                    scores = SCALE * q[row, token] @ np.concatenate([latent[:seen], rope[:seen]], -1).T
                    weights = np.exp(scores - scores.max(-1, keepdims=True))
                    out[row, token] = weights @ latent[:seen] / weights.sum(-1, keepdims=True)
        return np.float32(out)


def as_bf16(x):
    return jnp.asarray(np.float32(x), jnp.bfloat16)


class DecodeCases:
    """Subclasses say how the operation runs, and on which problems."""

    problems = {  # noqa: RUF012 (cases, not state)
        "lengths around a block and a page": dict(lengths=[0, 1, 63, 64, 65, 130], tokens=1, heads=7),
        "more pages in the table than a sequence has": dict(lengths=[70, 3], tokens=1, heads=16, width=5),
        "two tiles of queries, three tokens": dict(lengths=[3, 128], tokens=3, heads=24),
        "fewer positions than tokens": dict(lengths=[2, 0], tokens=4, heads=5),
        "all columns": dict(lengths=[100], tokens=2, heads=8, rank=512, page=128),
    }

    def run(self, problem):
        raise NotImplementedError

    @pytest.mark.parametrize("name", [*problems])
    def test_decode(self, name):
        problem = Problem(**self.problems[name])
        out = self.run(problem)
        assert out.dtype == jnp.bfloat16
        assert_near(out, problem.expected(), ERROR)
        assert not np.asarray(out, np.float32)[problem.lengths == 0].any()
