"""Exponential moving average of the parameters, in host memory, updated beside the next step (V3 sec. 3.2.3)."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dsv3_jax.model.transformer import Params


def host_sharding() -> SingleDeviceSharding:
    """The host's own memory, beside whatever accelerator trains."""
    return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


class HostEMA:
    """`average += (1 - decay) (parameters - average)` after every step, in float32, by the host's CPU device.

    The update is dispatched and runs beside the next step. The copy from an accelerator is made before `submit` returns.
    """

    def __init__(self, params: Params, decay: float):
        self._blend = functools.partial(_blend, decay=decay)
        self.average: Params = _copy_to_host(params)

    def submit(self, params: Params) -> None:
        """Starts the update with these parameters; the caller may donate them at once."""
        jax.block_until_ready(self.average)  # at most one update waits, so a slow host cannot pile up copies
        self.average = self._blend(self.average, jax.device_put(params, host_sharding()))

    def load(self, average: Params) -> None:
        """Continues from a copy of these values."""
        self.average = _copy_to_host(average)


def _copy_to_host(params: Params) -> Params:
    return jax.tree.map(jnp.copy, jax.device_put(params, host_sharding()))


@functools.partial(jax.jit, donate_argnums=0)
def _blend(average: Params, params: Params, decay: float) -> Params:
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)
