"""GPUs that are described instead of present, to compile for."""

import logging
import os
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError
from experiments import cli


def read_target(name: str) -> str:
    """The description in a file. Raises ConfigError where there is none."""
    if not Path(name).is_file():
        raise ConfigError("--target", name, "no such file")
    return Path(name).read_text()


def prepare(name: str | None, devices: int) -> str | None:
    """Makes JAX, which must not be loaded yet, ready to compile only: for GPUs described in a file, whose text it returns, or for CPUs."""
    target = read_target(name) if name else None
    if target is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:
        cli.fake_devices(devices, only_compile=True)
    logging.getLogger("dsv3_jax").setLevel(logging.WARNING)  # layers log what they pick, and here nothing runs
    return target


def gpu_devices(description: str, devices: int = 1, a_host: int = 1) -> list[Any]:
    """GPUs of a description (GpuTargetConfigProto as text), `a_host` of them a host. Raises ConfigError without the gpu extra."""
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology=f"1x{devices // a_host}x{a_host}")
    except NotImplementedError as error:
        raise ConfigError("--target", "cuda", f"JAX has no CUDA plugin here ({error}); install the gpu extra") from error
    return topology.devices
