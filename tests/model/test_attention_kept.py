"""What fused attention keeps for its backward pass, with the reference of the kernels in their place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import attention
from dsv3_jax.model.attention import attend
from dsv3_jax.model.transformer import rematerialised
from dsv3_jax.precision.linear import linear
from dsv3_jax.precision.policy import AFTER_ATTENTION, BF16, Recipe
from pallas_kernels.attention import reference

B, T, H = 2, 32, 4
QUERY, CONTENT, ROTATED, VALUE, OUT = 48, 32, 16, 40, 24  # columns; a query's last are not read
FP8 = Recipe(fp8=True, impl="reference")


@functools.partial(jax.jit, static_argnums=5)
def _forward(*operands):
    return reference.attention(*operands)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(attention, "unsupported", lambda *operands: None)
    monkeypatch.setattr(attention, "attention", lambda *operands: _forward(*operands[:-1]))
    monkeypatch.setattr(attention, "attention_backward", lambda *operands: reference.attention_backward(*operands[:-1]))


def _operands(dtype="float32"):
    """q, k, v, the rotated parts, and the kernel of the Linear after attention."""
    of_heads = [(B, T, H, columns) for columns in (QUERY, CONTENT, VALUE, ROTATED)]
    shapes = [*of_heads, (B, T, ROTATED), (H * VALUE, OUT)]
    return tuple(jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))


IDS = jnp.arange(T)[None].repeat(B, 0) // 11


def _layer(impl, recipe, segment_ids=None, in_parts=True):
    """Attention and the Linear after it, of queries, keys and values that are computed again."""

    def layer(*operands):
        q, k, v, q_r, k_r = map(jnp.sin, operands[:-1])
        rotated = (q_r, k_r) if in_parts else None
        out, prepared = attend(q, k, v, rotated=rotated, segment_ids=segment_ids, scale=0.3, impl=impl, recipe=recipe)
        return linear(out.reshape(*out.shape[:2], -1), operands[-1], recipe, AFTER_ATTENTION, prepared)

    return layer


def _gradients(layer, of=range(6)):
    return jax.grad(lambda *x: (layer(*x).astype(jnp.float32) ** 2).sum(), argnums=of)


@pytest.mark.parametrize(
    ("segment_ids", "in_parts", "remat"),
    [(None, True, "none"), (None, True, "selective"), (None, True, "full"), (IDS, True, "selective"), (None, False, "selective")],
)
@pytest.mark.parametrize(("recipe", "tolerance"), [(BF16, 1e-5), (FP8, 0.01)])
def test_gradients_are_those_of_the_reference(recipe, tolerance, segment_ids, in_parts, remat):
    def gradients(impl):
        layer = rematerialised(_layer(impl, recipe, segment_ids, in_parts), remat)
        return jax.jit(_gradients(layer, range(6) if in_parts else (0, 1, 2, 5)))(*_operands())

    for got, expected in zip(gradients("pallas"), gradients("reference"), strict=True):
        assert np.linalg.norm(got - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("selective", 1), ("full", 2)])
@pytest.mark.parametrize("recipe", [BF16, FP8])
def test_the_forward_kernel_is_not_run_again_where_its_results_are_kept(recipe, remat, times):
    layer = rematerialised(_layer("pallas", recipe), remat)
    jaxpr = jax.make_jaxpr(_gradients(layer))(*_operands())
    assert str(jaxpr).count("name=_forward") == times


@pytest.mark.parametrize(("recipe", "dtype"), [(BF16, "bfloat16"), (FP8, "float16")])
def test_the_output_is_kept_once(recipe, dtype):
    layer = rematerialised(_layer("pallas", recipe), "selective")
    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(layer, *x)[1], *_operands("bfloat16")))
    sizes = [leaf.dtype.name for leaf in kept if leaf.size == B * T * H * VALUE]
    assert sizes == ["bfloat16", dtype]  # values, which are an argument, and the output
    assert [leaf.shape for leaf in kept if leaf.shape == (B, H, T)] == [(B, H, T)]
