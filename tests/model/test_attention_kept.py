"""What fused attention keeps for its backward pass, by a kernel in plain JAX that is called as tokamax's is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import attention
from dsv3_jax.model.attention import attend
from dsv3_jax.model.transformer import rematerialised
from dsv3_jax.precision.linear import linear
from dsv3_jax.precision.policy import AFTER_ATTENTION, BF16, Recipe

SHAPE, WIDTH, OUT = (2, 32, 4, 48), 64, 24  # values are 32 wide
FP8 = Recipe(fp8=True, impl="reference")


class Kernel:
    def __call__(self, q, k, v, *, logits_scale, is_causal, return_residuals=False):
        out, *sums = jax.jit(_forward, static_argnums=3)(q, k, v, logits_scale)
        return (out, tuple(sums)) if return_residuals else out


def _scores(q, k, scale):
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)


def _forward(q, k, v, scale):
    scores = _scores(q, k, scale)
    largest = scores.max(-1)
    p = jnp.exp(scores - largest[..., None])
    return jnp.einsum("bhts,bshv->bthv", p / p.sum(-1, keepdims=True), v).astype(q.dtype), largest, p.sum(-1)


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    monkeypatch.setattr(attention, "tokamax_kernel", Kernel)


def _operands(dtype="float32"):
    shapes = [SHAPE, SHAPE, (*SHAPE[:3], WIDTH // 2), (SHAPE[2] * WIDTH // 2, OUT)]
    return tuple(jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))


def _layer(impl, recipe):
    """Attention and the Linear after it, of queries, keys and values that are computed again."""

    def layer(q, k, v, w):
        out, prepared = attend(jnp.sin(q), jnp.sin(k), jnp.sin(v), scale=0.3, impl=impl, recipe=recipe)
        return linear(out.reshape(*out.shape[:2], -1), w, recipe, AFTER_ATTENTION, prepared)

    return layer


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize(("recipe", "tolerance"), [(BF16, 1e-5), (FP8, 0.01)])
def test_gradients_are_those_of_the_reference(recipe, tolerance, remat):
    def gradients(impl):
        layer = rematerialised(_layer(impl, recipe), remat)
        return jax.jit(jax.grad(lambda *x: (layer(*x).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2, 3)))(*_operands())

    for got, expected in zip(gradients("tokamax"), gradients("reference"), strict=True):
        assert np.linalg.norm(got - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("selective", 1), ("full", 2)])
@pytest.mark.parametrize("recipe", [BF16, FP8])
def test_the_forward_kernel_is_not_run_again_where_its_results_are_kept(recipe, remat, times):
    layer = rematerialised(_layer("tokamax", recipe), remat)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *x: layer(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3)))(*_operands())
    assert str(jaxpr).count("name=_forward") == times


@pytest.mark.parametrize(("recipe", "dtype"), [(BF16, "bfloat16"), (FP8, "float16")])
def test_the_output_is_kept_once(recipe, dtype):
    layer = rematerialised(_layer("tokamax", recipe), "selective")
    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(layer, *x)[1], *_operands("bfloat16")))
    b, t, h, _ = SHAPE
    size = b * t * h * WIDTH // 2
    assert [leaf.dtype.name for leaf in kept if leaf.size == size] == ["bfloat16", dtype]  # values, which are an argument, and the output
    assert [leaf.shape for leaf in kept if leaf.shape == (b, h, t)] == [(b, h, t)]
