import functools

import jax
import pytest

from pallas_kernels import mla_decode as op
from pallas_kernels.backend import is_hopper
from pallas_kernels.mla_decode.sizes import TuningConfig
from tests.inference.test_paged_kernel import assert_same, decode
from tests.kernels.mla_decode_cases import SCALE, DecodeCases

pytestmark = pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")


class TestSmall(DecodeCases):
    def run(self, problem):
        return jax.jit(functools.partial(op.mla_decode, scale=SCALE, impl="pallas"))(*problem.operands)


class TestFull(TestSmall):
    """Sizes of deployment: all heads, long and short sequences together."""

    problems = {  # noqa: RUF012 (cases, not state)
        "one long sequence": dict(lengths=[20001], tokens=1, heads=128, rank=512),
        "a batch of odd lengths": dict(lengths=[*range(3, 4099, 129), 0], tokens=1, heads=128, rank=512),
        "speculation": dict(lengths=[2049, 5, 777], tokens=2, heads=128, rank=512),
        "heads that fill no tile": dict(lengths=[4095, 64, 1, 1000], tokens=3, heads=20, rank=512),
    }

    @pytest.mark.parametrize("name", [*problems])
    def test_decode(self, name):
        super().test_decode(name)


@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("config", [TuningConfig(), TuningConfig(64, 2, 1)])
class TestEveryTuning(TestSmall):
    @pytest.fixture(autouse=True)
    def tuning(self, splits, config):
        self.arguments = dict(splits=splits, config=config)

    def run(self, problem):
        return jax.jit(functools.partial(op.run, scale=SCALE, **self.arguments))(*problem.operands)


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_attention_over_pages(tokens):
    assert_same(decode("pallas", tokens), decode("reference", tokens))
