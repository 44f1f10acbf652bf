"""The device mesh: four axes, always there, each of any size (V3 sec. 3.1-3.2).

    pipe   ranks of the pipeline, each with its own layers
    data   copies of the experts
    node   hosts that share the experts, joined by InfiniBand
    gpu    devices of such a host, joined by NVLink

A batch lies on data x node x gpu, the routed experts on node x gpu. `gpu` changes fastest from device to device, so
that the devices of a host, which JAX numbers one after another, are neighbours on it.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ConfigError, MeshConfig

AXES = ("pipe", "data", "node", "gpu")
PIPE_AXIS = "pipe"
BATCH_AXES = ("data", "node", "gpu")
EXPERT_AXES = ("node", "gpu")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first pipe x data x node x gpu devices. Raises ConfigError when there are not that many.

    With several processes every device has to be in it: each process trains on its own. `devices`: others than those that
    are here, to compile for.
    """
    devices = devices or jax.devices()
    wanted, there = config.devices, len(devices)
    if wanted > there or (jax.process_count() > 1 and wanted != there):
        sizes = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        remedy = f"{sizes} are {wanted} devices and there are {there} devices; change an axis (on a CPU, --host_devices fakes more)"
        raise ConfigError("config.parallel.mesh", wanted, remedy)
    shape = [getattr(config, axis) for axis in AXES]
    return Mesh(np.array(devices[:wanted]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows [micro, b, T + 1], the sequences b spread over data x node x gpu."""
    return NamedSharding(mesh, P(None, BATCH_AXES))
