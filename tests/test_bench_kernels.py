"""The benchmark of products: what it says of their error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import kernels, kernels_error
from pallas_kernels import gemm, grouped_gemm

OWNERS = jnp.array([1, 2], jnp.int32)  # of 256 rows
FIRST_TILE = jnp.array([0, 1, 3], jnp.int32)  # of two groups
F8, F32, BF16 = jnp.float8_e4m3fn, jnp.float32, jnp.bfloat16


def draw(seed, shape, dtype):
    normal = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(np.abs(normal) + 0.5 if dtype == F32 else normal, F32).astype(dtype)


def cases():
    e, scales_e = ((3, 40, 200), F8), ((3, 1, 2), F32)
    turned = [((3, 24, 128), F8), ((3, 24), F32), ((3, 40, 128), F8), ((3, 40), F32)]
    one, each = gemm.wgrad, lambda a, sa, b, sb, *addend: grouped_gemm.grouped_wgrad(a, sa, b, sb, FIRST_TILE, *addend)
    grouped = lambda a, sa, b, sb, owner: grouped_gemm.grouped_gemm(a, sa, b, sb, owner, 1)  # noqa: E731
    half = lambda a, b, owner: grouped_gemm.grouped_gemm_bf16(a, b, owner, 1)  # noqa: E731
    lie = lambda a, b: a @ b[0]  # noqa: E731
    first = functools.partial(kernels_error.columns, steps=1)
    yield "gemm", kernels_error.blocks, gemm.gemm, [((50, 200), F8), ((2, 128), F32), ((40, 200), F8), ((1, 2), F32)], None
    yield "grouped", kernels_error.blocks, grouped, [((256, 200), F8), ((2, 256), F32), e, scales_e], OWNERS
    shapes = [((3, 16, 200), F8), ((3, 2, 128), F32), e, scales_e]
    yield "masked", kernels_error.first_expert, lambda *x: grouped_gemm.masked_gemm(*x, jnp.array([16, 9, 0])), shapes, None
    masked = lambda a, b: grouped_gemm.masked_gemm_bf16(a, b, jnp.array([16, 0]))  # noqa: E731
    yield "masked bfloat16", kernels_error.first_lies, masked, [((2, 16, 48), BF16), ((2, 48, 40), BF16)], None
    yield "bfloat16", kernels_error.plain, lambda a, b: a @ b.T, [((300, 48), BF16), ((40, 48), BF16)], None
    yield "grouped bfloat16", kernels_error.plain, half, [((256, 64), BF16), ((3, 40, 64), BF16)], OWNERS
    yield "weights as they lie", kernels_error.weights_lie, lie, [((128, 48), BF16), ((2, 48, 40), BF16)], None
    yield "wgrad", kernels_error.columns, one, turned, None
    yield "wgrad, accumulated", kernels_error.columns, one, [*turned, ((24, 40), F32)], None
    yield "grouped wgrad", first, each, turned, None
    yield "grouped wgrad, accumulated", first, each, [*turned, ((2, 24, 40), F32)], None


@pytest.mark.parametrize(("error", "run", "shapes", "owners"), [pytest.param(*rest, id=name) for name, *rest in cases()])
def test_the_error_of_a_product_is_that_of_its_first_rows(error, run, shapes, owners):
    operands = [draw(i, *shape) for i, shape in enumerate(shapes)] + ([] if owners is None else [owners])
    out = run(*operands)
    assert float(error(out, *operands)) < 2.5e-3
    first = (0,) * out.ndim
    assert float(error(out.at[first].add(jnp.linalg.norm(out.astype(F32)).astype(out.dtype)), *operands)) > 0.1


def test_every_row_of_the_table_has_an_error(monkeypatch):
    monkeypatch.setattr(kernels_error, "_error", kernels_error._error.__wrapped__)  # what has options of its own cannot be traced
    for row in kernels.rows():
        operands = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in row.shapes] + ([] if row.owners is None else [row.owners])
        assert jax.eval_shape(row.error, jax.eval_shape(row.run, *operands), *operands).shape == (), row.name
