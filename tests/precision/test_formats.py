import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.precision.formats import E4M3, E5M2, FORMATS, exponent, power_of_two, round_up_to_power_of_two
from tests.precision import oracle

NAMES = ["E4M3", "E5M2", "E5M6"]


def rounded(x, name):
    return np.asarray(jax.jit(FORMATS[name].round)(jnp.asarray(x, jnp.float32)), np.float64)


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_every_code_of_eight_bits_rounds_to_itself(format):
    codes = np.arange(256, dtype=np.uint8).view(format.dtype).astype(np.float64)
    np.testing.assert_array_equal(rounded(codes, format.name), codes)
    finite = codes[np.isfinite(codes)]
    np.testing.assert_array_equal(np.unique(np.abs(finite)), oracle.table(format.name))  # the oracle knows the format


def test_e5m6_is_float16_with_four_bits_less():
    halves = np.arange(0, 0x7C00, 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    np.testing.assert_array_equal(halves, oracle.table("E5M6"))
    np.testing.assert_array_equal(rounded(halves, "E5M6"), halves)
    np.testing.assert_array_equal(rounded(-halves, "E5M6"), -halves)


@pytest.mark.parametrize("name", NAMES)
def test_midpoints_go_to_even_and_what_lies_beside_them_to_the_nearest(name):
    values = oracle.table(name)  # subnormals and zero among them
    low, high = values[:-1], values[1:]
    middle = np.float32((low + high) / 2)  # exact
    even = np.where(np.arange(len(low)) % 2 == 0, low, high)
    for sign in (1, -1):
        np.testing.assert_array_equal(rounded(sign * middle, name), sign * even)
        np.testing.assert_array_equal(rounded(sign * np.nextafter(middle, np.float32(0)), name), sign * low)
        np.testing.assert_array_equal(rounded(sign * np.nextafter(middle, np.float32(np.inf)), name), sign * high)


@pytest.mark.parametrize("name", NAMES)
def test_too_large_saturates_and_what_is_not_finite_stays_visible(name):
    largest = {"E4M3": 448, "E5M2": 57344, "E5M6": 65024}[name]
    assert FORMATS[name].max == largest
    np.testing.assert_array_equal(rounded([largest * 1.04, -largest * 1.2, 3e38, -3e38], name), [largest, -largest, largest, -largest])
    infinity = np.nan if name == "E4M3" else np.inf
    np.testing.assert_array_equal(rounded([np.inf, -np.inf, np.nan], name), [infinity, -infinity, np.nan])


@pytest.mark.parametrize("name", NAMES)
def test_zero_of_either_sign_and_float32_subnormals_are_zero(name):
    np.testing.assert_array_equal(rounded([0.0, -0.0, 1e-40, -1e-45, 2.0**-126], name), np.zeros(5))


@settings(deadline=None, max_examples=15)
@given(st.sampled_from(NAMES), st.integers(0, 2**32 - 1), st.integers(-30, 20))
def test_random_numbers_round_as_in_the_oracle(name, seed, power):
    rng = np.random.default_rng(seed)
    x = np.float32(rng.normal(size=1000) * 2.0**power)
    np.testing.assert_array_equal(rounded(x, name), oracle.rounded(x, name))
    any_bits = rng.integers(0, 2**32, 1000, dtype=np.uint32).view(np.float32)
    np.testing.assert_array_equal(rounded(any_bits, name), oracle.rounded(any_bits, name))


def test_exponents_and_powers_of_two():
    powers = np.arange(-126, 128)
    exact = np.ldexp(np.float32(1), powers)
    np.testing.assert_array_equal(power_of_two(jnp.asarray(powers)), exact)
    np.testing.assert_array_equal(round_up_to_power_of_two(jnp.asarray(exact)), exact)
    x = np.concatenate([exact, np.nextafter(exact[1:], np.float32(0)), np.nextafter(exact, np.float32(np.inf))])
    x = x[x >= oracle.SMALLEST_NORMAL]
    power = np.frexp(x)[1]  # x = fraction * 2^power, fraction in [0.5, 1)
    np.testing.assert_array_equal(exponent(jnp.asarray(x)), power - 1)
    np.testing.assert_array_equal(exponent(jnp.asarray(-x)), power - 1)
    assert exponent(jnp.zeros(())) == -127
    below = x[x <= 2.0**127]
    up = np.exp2(np.ceil(np.log2(np.float64(below))))
    np.testing.assert_array_equal(round_up_to_power_of_two(jnp.asarray(below)), up)
    np.testing.assert_array_equal(round_up_to_power_of_two(jnp.array([np.inf, np.nan])), [np.inf, np.nan])
