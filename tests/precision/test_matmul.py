import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.matmul import quantized_matmul, simulated_dot
from dsv3_jax.precision.quantize import quantize
from tests.precision import oracle


def random(shape, seed):
    """Normal numbers whose size differs by row and by column, so that every scale counts."""
    rng = np.random.default_rng(seed)
    return np.float32(rng.normal(size=shape) * 2.0 ** rng.integers(-6, 7, (*shape[:-1], 1)) * 2.0 ** rng.integers(-3, 4, shape[-1]))


@pytest.mark.parametrize(
    ("batch", "m", "k", "n", "tile_a", "tile_b"),
    [
        ((), 5, 300, 130, (1, 128), (128, 128)),
        ((), 130, 257, 7, (1, 128), (128, 1)),
        ((2, 3), 4, 140, 9, (1, 128), (128, 128)),
        ((), 1, 384, 1, (1, 128), (128, 1)),
        ((), 6, 40, 5, (1, 128), (128, 128)),
        ((2,), 150, 200, 3, (128, 128), (0, 0)),
        ((), 3, 260, 150, (0, 0), (128, 128)),
        ((), 3, 520, 4, (1, 256), (128, 1)),  # a tile may hold two groups
        ((), 3, 60, 4, (1, 64), (0, 1)),  # or all of k
        ((), 2, 300, 2, (1, 0), (0, 1)),
    ],
)
def test_equals_the_exact_product(batch, m, k, n, tile_a, tile_b):
    a, b = random((*batch, m, k), 0), random((*batch, k, n), 1)
    got = jax.jit(lambda a, b: quantized_matmul(quantize(a, tile_a), quantize(b, tile_b)))(a, b)
    exact_a, exact_b = oracle.dequantized(a, tile_a), oracle.dequantized(b, tile_b)
    assert got.dtype == jnp.float32
    assert got.shape == (*batch, m, n)
    assert (np.abs(got - exact_a @ exact_b) <= 5e-7 * (np.abs(exact_a) @ np.abs(exact_b))).all()


def test_one_side_may_have_a_batch():
    a, b = random((3, 4, 200), 0), random((200, 6), 1)
    got = jax.jit(lambda a, b: quantized_matmul(quantize(a, (1, 128)), quantize(b, (128, 128))))(a, b)
    exact_a, exact_b = oracle.dequantized(a, (1, 128)), oracle.dequantized(b, (128, 128))
    assert (np.abs(got - exact_a @ exact_b) <= 5e-7 * (np.abs(exact_a) @ np.abs(exact_b))).all()


@pytest.mark.parametrize(("tile_a", "tile_b"), [((1, 64), (128, 128)), ((1, 128), (96, 128)), ((1, 128), (192, 1))])
def test_a_tile_that_ends_within_a_group_is_refused(tile_a, tile_b):
    with pytest.raises(ValueError, match="multiple of 128"):
        jax.eval_shape(lambda a, b: quantized_matmul(quantize(a, tile_a), quantize(b, tile_b)), jnp.ones((2, 256)), jnp.ones((256, 2)))


def by_hand(a, b, bits, promote_every):
    """One output of the modelled instruction."""
    promoted = running = 0.0
    for start in range(0, len(a), 32):
        terms = [running, *(a[start : start + 32] * b[start : start + 32])]
        largest = max(abs(t) for t in terms)
        quantum = 2.0 ** (np.frexp(largest)[1] - bits) if largest else 1.0
        running = sum(int(t / quantum) * quantum for t in terms)
        if promote_every and (start + 32) % promote_every == 0:
            promoted, running = np.float32(promoted + running), 0.0
    return np.float32(promoted + running)


@pytest.mark.parametrize("promote_every", [None, 32, 96, 128])
@pytest.mark.parametrize("k", [20, 200])
def test_short_sums_are_those_worked_out_by_hand(k, promote_every):
    rng = np.random.default_rng(k)
    a, b = (np.float32(oracle.rounded(np.float32(rng.normal(size=k)), "E4M3")) for _ in range(2))
    got = jax.jit(simulated_dot, static_argnums=(2, 3))(a[None], b[:, None], 14, promote_every)
    assert got[0, 0] == by_hand(np.float64(a), np.float64(b), 14, promote_every)


def test_a_sum_that_fits_is_exact():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (5, 1000)).astype(np.float32), rng.integers(-8, 9, (1000, 6)).astype(np.float32)
    np.testing.assert_array_equal(simulated_dot(jnp.asarray(a), jnp.asarray(b), 24, None), a @ b)


def test_leaving_the_tensor_core_every_128_elements_saves_the_sum():
    rng = np.random.default_rng(0)
    a, b = (np.float32(oracle.rounded(np.float32(rng.uniform(size=s)), "E4M3")) for s in ((8, 4096), (4096, 8)))
    exact = np.float64(a) @ np.float64(b)
    dot = jax.jit(simulated_dot, static_argnums=(2, 3))
    worst = {every: np.abs(dot(a, b, 14, every) / exact - 1).max() for every in (None, 128)}
    assert 0.01 < worst[None] < 0.1  # percents, as V3 sec. 3.5.2 saw; numbers of one sign, so every cut-off bit counts
    assert worst[128] < worst[None] / 20


@pytest.mark.parametrize("promote_every", [1, 48, 100])
def test_promotion_within_an_instruction_is_refused(promote_every):
    with pytest.raises(ValueError, match="multiple of 32"):
        simulated_dot(jnp.ones((1, 256)), jnp.ones((256, 1)), 14, promote_every)
