import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import quantize as ops
from pallas_kernels.backend import is_hopper
from tests.kernels.quantize_cases import QuantizeCases, by_columns, exact, on_cpu, opened

pytestmark = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")


class TestSmall(QuantizeCases):
    def run(self, name, *arguments):
        arguments = [jax.device_put(x, jax.devices()[0]) if isinstance(x, jax.Array) else x for x in arguments]
        return getattr(ops, name)(*arguments, impl="pallas")


class TestFull(TestSmall):
    """Sizes of training, and rows that do not fill their last tile."""

    rows, columns = 4100, 7168
    experts, kernel = 4, (2048, 7168)
    hidden = (4100, 4096)
    gathered = (4100, 17536, 2048)


def test_retile_of_quotients_next_to_a_bound():
    """Every pair of significands where 43 bits of the quotient do not settle its E4M3: x in one row of a tile, the largest in another."""
    x, scale = close_quotients()
    x, largest = x[kept := np.float32(448) * scale / np.float32(448) == scale], scale[kept]
    assert len(x) > 400
    values, scales = np.zeros((len(x), 128, 32), np.float32), np.ones((len(x), 128), np.float32)
    values[:, 0], values[:, 1] = 1, 448
    scales[:, 0], scales[:, 1] = x, largest
    values, scales = on_cpu(lambda: (jnp.asarray(values.reshape(-1, 32), jnp.float8_e4m3fn), jnp.asarray(scales.reshape(1, -1))))
    actual = ops.retile(*(jax.device_put(a, jax.devices()[0]) for a in (values, scales)), impl="pallas")
    exact(actual, on_cpu(lambda: by_columns(opened(values, scales))))


def close_quotients():
    """x and scale, integers of 24 bits, with x / scale next to a float32 that a tie of E4M3 decides about.

    Such a bound is an integer of 25 bits or so over a power of two. Where x / scale misses it by distance / (scale * 2^power),
    x * 2^power is bound * scale - distance, so the low bits of scale follow. At distances above 64 they differ by more than 2^-43.
    """
    pairs = set()
    for tie in range(16, 32):
        for bound in ((tie << 21) + 1, (tie << 21) - 1 if tie > 16 else (tie << 22) - 1):
            for power in (bound.bit_length() - 1, bound.bit_length()):
                inverse = pow(bound, -1, 1 << power)
                for distance in [*range(-64, 0), *range(1, 65)]:
                    scale = distance * inverse % (1 << power)
                    x = bound * scale - distance >> power
                    if min(x, scale) >= 1 << 23 and max(x, scale) < 1 << 24:
                        pairs.add((x, scale))
    return np.array(sorted(pairs), np.float32).T
