"""GPUs that are described instead of present, to compile for."""

from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError


def read_target(name: str) -> str:
    """The description in a file. Raises ConfigError where there is none."""
    if not Path(name).is_file():
        raise ConfigError("--target", name, "no such file")
    return Path(name).read_text()


def described_gpus(target: str, topology: str) -> list[Any]:
    """Devices of a description (XLA's GpuTargetConfigProto as text), arranged as e.g. "1x8x8". Raises ConfigError without the gpu extra."""
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="cuda", target_config=target, topology=topology).devices
    except NotImplementedError as error:
        raise ConfigError("--target", topology, f"JAX has no CUDA plugin here ({error}); install the gpu extra") from error
