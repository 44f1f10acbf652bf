"""Which implementation of an operation runs: the reference, in plain JAX, or the kernel for NVIDIA Hopper GPUs."""

import functools
import logging

import jax

IMPLEMENTATIONS = ("reference", "pallas", "auto")
HOPPER = "9.0"  # compute capability of H100 and H200

log = logging.getLogger(__name__)


def use_pallas(impl: str) -> bool:
    """Whether `impl` means the kernel here. "auto": on a Hopper GPU; "pallas": always, so that a kernel can be lowered without one."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: has to be one of {', '.join(IMPLEMENTATIONS)}")
    return _auto() if impl == "auto" else impl == "pallas"


def is_hopper() -> bool:
    """Whether arrays live on a Hopper GPU when nothing else is said."""
    device = jax.devices()[0]
    return device.platform == "gpu" and getattr(device, "compute_capability", None) == HOPPER


def sm_count() -> int:
    """Streaming multiprocessors of the GPU. Without one there is no number to read: pass it to the kernel instead."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise RuntimeError(f"device {device}: has no streaming multiprocessors; run on a GPU, or pass their number")
    return device.core_count


@functools.cache
def _auto() -> bool:
    chosen = is_hopper()
    log.info("impl='auto' runs %s on %s", "the Pallas kernels" if chosen else "the reference", jax.devices()[0].device_kind)
    return chosen
