import jax
import pytest

from pallas_kernels import quantize as ops
from pallas_kernels.backend import is_hopper
from tests.kernels.quantize_cases import QuantizeCases

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
