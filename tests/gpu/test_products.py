import jax
import pytest

from pallas_kernels import gemm, grouped_gemm
from pallas_kernels.backend import is_hopper
from tests.kernels.product_cases import ProductCases

pytestmark = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")


class TestSmall(ProductCases):
    def run(self, name, *arguments, **settings):
        operation = getattr(gemm, name, None) or getattr(grouped_gemm, name)
        return jax.jit(lambda *operands: operation(*operands, impl="pallas", **settings))(*arguments)


class TestFull(TestSmall):
    """Sizes of training; n and k are no multiples of a tile."""

    dense = [(4100, 2112, 7168), (64, 7168, 2048), (1000, 4096, 7184), (64, 4304, 8192), (100, 4304, 9216)]  # noqa: RUF012
    wgrads = [(2048, 7168, 4096), (2064, 1040, 1024)]  # noqa: RUF012
    pieced = (2048, 576, 32768)
    width, depth = 2064, 7184
    wgrad_shape = (2048, 1152)
    owners = ([0, 0, 1, 63], [])
