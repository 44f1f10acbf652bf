"""Fused attention against plain JAX on a Hopper GPU: output and gradients. tokamax at the widths of MLA, cuDNN at others too."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.model.attention import attention
from pallas_kernels.backend import is_hopper

pytestmark = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
needs_tokamax = pytest.mark.skipif(not importlib.util.find_spec("tokamax"), reason="needs tokamax")


def results(impl, operands):
    def both(q, k, v, dy):
        y, pull = jax.vjp(lambda *x: attention(*x, scale=q.shape[-1] ** -0.5, impl=impl), q, k, v)
        return y, *pull(dy)

    return jax.jit(both)(*operands)


@pytest.mark.parametrize(
    ("impl", "length", "widths"),
    [
        pytest.param("tokamax", 4096, (192, 128), marks=needs_tokamax),
        pytest.param("tokamax", 640, (192, 128), marks=needs_tokamax),
        ("cudnn", 4096, (192, 128)),
        ("cudnn", 640, (96, 64)),
        ("cudnn", 1000, (48, 32)),
    ],
)
def test_output_and_gradients(impl, length, widths):
    shapes = [(2, length, 4, width) for width in (widths[0], widths[0], widths[1], widths[1])]
    operands = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)]
    with jax.default_matmul_precision("highest"):
        exact = results("reference", [x.astype(jnp.float32) for x in operands])
    for got, right in zip(results(impl, operands), exact, strict=True):
        assert jnp.linalg.norm((got - right).ravel()) < 6e-3 * jnp.linalg.norm(right.ravel())
