"""Exponential moving average of the parameters, in host memory, updated beside the next step (V3 sec. 3.2.3)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, PyTree

from dsv3_jax.model.transformer import Params

Parts = tuple[Array, ...]  # of one parameter: those that this process's devices hold, each once


def host_sharding() -> SingleDeviceSharding:
    """The host's own memory, beside whatever accelerator trains."""
    return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


class HostEMA:
    """`average += (1 - decay) (parameters - average)` after every step, in float32, by the host's CPU device.

    The update is dispatched and runs beside the next step. The copy from an accelerator is made before `submit` returns.
    Each process averages the parts of parameters that its own devices hold.
    """

    def __init__(self, params: Params, decay: float):
        self._blend = functools.partial(_blend, decay=decay)
        self._like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
        self._parts: PyTree[Parts] = jax.tree.map(lambda p: tuple(map(jnp.copy, _parts_on_host(p))), params)

    def submit(self, params: Params) -> None:
        """Starts the update with these parameters; the caller may donate them at once."""
        jax.block_until_ready(self._parts)  # at most one update waits, so a slow host cannot pile up copies
        self._parts = self._blend(self._parts, jax.tree.map(_parts_on_host, params))

    @property
    def average(self) -> Params:
        """The average as whole arrays: in host memory, or with several processes on the devices, each its part."""
        join = _on_devices if jax.process_count() > 1 else _on_host
        return jax.tree.map(join, self._like, self._parts)

    def load(self, average: Params) -> None:
        """Continues from a copy of these values."""
        place = lambda like, leaf: tuple(map(jnp.copy, _parts_on_host(jax.device_put(leaf, like.sharding))))  # noqa: E731
        self._parts = jax.tree.map(place, self._like, average)


def _by_index(like: Any) -> dict[tuple[slice, ...], list[jax.Device]]:
    """The parts of an array that this process holds, in a fixed order, with the devices that hold each."""
    devices: dict[tuple[slice, ...], list[jax.Device]] = {}
    for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
        devices.setdefault(index, []).append(device)
    return devices


def _parts_on_host(array: Array) -> Parts:
    shards = {shard.index: shard.data for shard in array.addressable_shards}
    return tuple(jax.device_put(shards[index], host_sharding()) for index in _by_index(array))


def _on_host(like: jax.ShapeDtypeStruct, parts: Parts) -> Array:
    if len(parts) == 1:
        return parts[0]
    whole = np.empty(like.shape, like.dtype)
    for index, part in zip(_by_index(like), parts, strict=True):
        whole[index] = part
    return jax.device_put(whole, host_sharding())


def _on_devices(like: jax.ShapeDtypeStruct, parts: Parts) -> Array:
    arrays = [jax.device_put(part, device) for devices, part in zip(_by_index(like).values(), parts, strict=True) for device in devices]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _blend(average: PyTree[Parts], params: PyTree[Parts], decay: float | Array) -> PyTree[Parts]:
    return jax.tree.map(lambda a, p: a + (1.0 - decay) * (p - a), average, params)
