import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.precision.formats import FORMATS
from dsv3_jax.precision.quantize import dequantize, quantize, retile
from tests.precision import oracle

# Every case is compiled once and sees many draws: shape, tile, format, power_of_two.
CASES = [
    ((1, 1), (1, 128), "E4M3", False),
    ((3, 300), (1, 128), "E4M3", False),
    ((2, 5, 129), (1, 128), "E4M3", True),
    ((2, 2, 3, 256), (1, 128), "E5M6", True),
    ((7, 127), (1, 32), "E5M2", False),
    ((4, 96), (1, 32), "E4M3", True),
    ((300, 3), (128, 1), "E4M3", False),
    ((2, 130, 2), (128, 1), "E5M6", False),
    ((200, 260), (128, 128), "E4M3", False),
    ((2, 128, 129), (128, 128), "E4M3", True),
    ((3, 5, 7), (0, 0), "E4M3", False),
    ((1, 70), (0, 0), "E5M2", True),
]
KINDS = ["normal", "wild", "outliers", "ties", "tiny", "subnormal", "largest", "not finite", "all zero"]


def draw(kind, shape, rng):
    """Numbers of one kind, with some rows zero."""
    x = rng.normal(size=shape)
    if kind == "wild":
        x *= 2.0 ** rng.uniform(-120, 120, shape)
    elif kind == "outliers":
        x *= np.where(rng.uniform(size=shape) < 0.02, 1e4, 1)
    elif kind == "ties":
        x = rng.integers(-64, 65, shape) / 2.0  # times a power of two, that of the scale
        x[..., 0] = 448
    elif kind in ("tiny", "subnormal", "largest"):
        x *= {"tiny": 2.0**-120, "subnormal": 2.0**-127, "largest": 2.0**125}[kind]
    elif kind == "not finite":
        x[rng.uniform(size=shape) < 0.01] = rng.choice([np.nan, np.inf, -np.inf])
    elif kind == "all zero":
        x *= 0
    if shape[-2] > 1:
        x[..., rng.integers(shape[-2]), :] = 0
    return np.clip(x, -3.4e38, 3.4e38).astype(np.float32) if kind != "not finite" else x.astype(np.float32)


quantize_jit = jax.jit(lambda x, tile, name, power_of_two: quantize(x, tile, FORMATS[name], power_of_two), static_argnums=(1, 2, 3))
dequantize_jit = jax.jit(dequantize, static_argnums=1)


@pytest.mark.parametrize("case", CASES)
@settings(deadline=None, max_examples=20)
@given(st.sampled_from(KINDS), st.integers(0, 2**32 - 1))
def test_values_and_scales_are_those_of_the_oracle(case, kind, seed):
    shape, tile, name, power_of_two = case
    x = draw(kind, shape, np.random.default_rng(seed))
    q = quantize_jit(x, tile, name, power_of_two)
    values, scales = oracle.quantized(x, tile, name, power_of_two)
    assert q.values.dtype == FORMATS[name].dtype
    assert q.scales.dtype == jnp.float32
    # XLA's max on a CPU may or may not see a NaN, so the scale of its tile is not settled; it stays NaN itself.
    known = ~np.isnan(scales)
    np.testing.assert_array_equal(np.asarray(q.scales)[known], scales[known])
    each = oracle.over_elements(scales, tile, shape)
    known = ~np.isnan(each)
    np.testing.assert_array_equal(np.asarray(q.values, np.float64)[known], values[known])
    back = np.asarray(dequantize_jit(q))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(normal(back)[known], normal(np.float32(values) * each)[known])
    assert not np.isfinite(back[~np.isfinite(x)]).any()  # NaN and infinity cannot hide


def normal(x):
    """Subnormals, which a backend may flush, as zero."""
    return np.where(np.abs(x) < oracle.SMALLEST_NORMAL, 0, x)


@pytest.mark.parametrize("name", ["E4M3", "E5M6"])
@settings(deadline=None, max_examples=20)
@given(st.sampled_from(["normal", "wild", "outliers", "ties", "largest"]), st.integers(0, 2**32 - 1))
def test_with_power_of_two_scales_quantizing_again_changes_nothing(name, kind, seed):
    x = draw(kind, (6, 300), np.random.default_rng(seed))
    first = quantize_jit(x, (1, 128), name, True)
    whole = dequantize_jit(first)
    second = quantize_jit(whole, (1, 128), name, True)
    np.testing.assert_array_equal(dequantize_jit(second), whole)
    # A tile whose largest value came down to half the format's largest takes half the scale, and twice the values.
    largest = np.stack([np.abs(np.float32(first.values[:, i : i + 128])).max(-1) for i in (0, 128, 256)], -1)
    same = largest != FORMATS[name].max / 2
    np.testing.assert_array_equal(second.scales[same], first.scales[same])
    np.testing.assert_array_equal(second.scales[~same], first.scales[~same] / 2)


def test_power_of_two_scales_lose_nothing_when_tiles_turn():
    """Values of four bits near one another survive any power-of-two scale; other scales round them again."""
    x = jnp.asarray(np.random.default_rng(0).choice([-15, -12, -9, -8, 8, 10, 13, 14], (256, 256)) / 64.0, jnp.float32)
    q = quantize_jit(x * jnp.exp2(jnp.arange(256) % 3)[:, None], (1, 128), "E4M3", True)
    turned = jax.jit(functools.partial(retile, tile=(128, 1), power_of_two=True))(q)
    assert turned.values.shape == (256, 256)
    assert turned.scales.shape == (2, 256)
    np.testing.assert_array_equal(dequantize_jit(turned), dequantize_jit(q))
    assert (dequantize_jit(jax.jit(functools.partial(retile, tile=(128, 1)))(q)) != dequantize_jit(q)).any()


@pytest.mark.parametrize("power_of_two", [False, True])
def test_turning_tiles_rounds_each_element_at_most_once_more(power_of_two):
    x = np.random.default_rng(1).normal(size=(200, 300)).astype(np.float32)
    q = quantize_jit(x, (1, 128), "E4M3", power_of_two)
    turned = jax.jit(functools.partial(retile, tile=(128, 1), power_of_two=power_of_two))(q)
    before, after = np.asarray(dequantize_jit(q)), np.asarray(dequantize_jit(turned))
    subnormal = oracle.over_elements(np.asarray(turned.scales), (128, 1), x.shape) * 2.0**-10
    assert (np.abs(after - before) <= np.maximum(np.abs(before) * 2.0**-4, subnormal) * 1.0001).all()
    np.testing.assert_array_equal(after, np.float32(oracle.dequantized(before, (128, 1), "E4M3", power_of_two)))


@pytest.mark.parametrize("tile", [(1, 128), (128, 128), (0, 0)])
def test_transpose_rounds_nothing(tile):
    x = np.random.default_rng(2).normal(size=(2, 130, 200)).astype(np.float32)
    q = quantize_jit(x, tile, "E4M3", False)
    np.testing.assert_array_equal(dequantize_jit(q.transpose()), np.swapaxes(dequantize_jit(q), -1, -2))
    assert q.transpose().tile == tile[::-1]
