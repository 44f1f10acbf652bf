"""Implementations are chosen for the device at hand, or for one that is compiled for."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.model.attention import attend
from pallas_kernels import backend

HOPPER = SimpleNamespace(platform="gpu", device_kind="one with few multiprocessors", compute_capability="9.0", core_count=78)
AMPERE = SimpleNamespace(platform="gpu", device_kind="an older one", compute_capability="8.0", core_count=108)


def test_what_is_compiled_for_need_not_exist():
    with backend.compiling_for(HOPPER):
        assert backend.is_hopper() and backend.use_pallas("auto") and backend.sm_count() == 78
        with backend.compiling_for(AMPERE):
            assert not backend.is_hopper() and not backend.use_pallas("auto") and backend.sm_count() == 108
        assert backend.is_hopper()
    assert backend.platform() == jax.default_backend()


def test_attention_is_that_of_the_device():
    x = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16)
    run = lambda *x: attend(*x, scale=1.0).out  # noqa: E731
    with backend.compiling_for(HOPPER):
        assert "_by_kernels" in str(jax.make_jaxpr(run)(x, x, x))
    assert backend.is_hopper() or "_by_kernels" not in str(jax.make_jaxpr(lambda *x: run(*x))(x, x, x))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU has some")
def test_a_cpu_has_no_multiprocessors():
    with pytest.raises(RuntimeError, match="streaming multiprocessors"):
        backend.sm_count()
