"""The device mesh, and how a batch lies on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ConfigError, MeshConfig


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh over the first `data` devices. Raises ConfigError when there are not that many."""
    devices = jax.devices()
    if config.data > len(devices):
        raise ConfigError("config.parallel.mesh.data", config.data, f"there are {len(devices)} devices; use at most that many")
    return Mesh(np.array(devices[: config.data]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows [micro, b, T + 1], the sequences b spread over the devices."""
    return NamedSharding(mesh, P(None, "data", None))
