"""Which implementation of an operation runs: the reference, in plain JAX, or the kernel for NVIDIA Hopper GPUs."""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax

IMPLEMENTATIONS = ("reference", "pallas", "auto")
HOPPER = "9.0"  # compute capability of H100 and H200

log = logging.getLogger(__name__)

_described: contextvars.ContextVar[Any] = contextvars.ContextVar("described", default=None)


@contextlib.contextmanager
def compiling_for(described: Any) -> Iterator[None]:
    """Inside, implementations are chosen, and kernels cut to size, for a device that need not exist (`jax.experimental.topologies`)."""
    token = _described.set(described)
    try:
        yield
    finally:
        _described.reset(token)


def device() -> Any:
    """What arrays live on when nothing else is said, or what is compiled for."""
    return _described.get() or jax.devices()[0]


def platform() -> str:
    """Of `device`: cpu, gpu or tpu."""
    return device().platform


def use_pallas(impl: str) -> bool:
    """Whether `impl` means the kernel here. "auto": on a Hopper GPU; "pallas": always, so that a kernel can be lowered without one."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: has to be one of {', '.join(IMPLEMENTATIONS)}")
    return _auto(is_hopper(), device().device_kind) if impl == "auto" else impl == "pallas"


def is_hopper() -> bool:
    """Whether `device` is a Hopper GPU."""
    return platform() == "gpu" and getattr(device(), "compute_capability", None) == HOPPER


def sm_count() -> int:
    """Streaming multiprocessors of the GPU. Without one there is no number to read: pass it to the kernel instead."""
    if platform() != "gpu":
        raise RuntimeError(f"device {device()}: has no streaming multiprocessors; run on a GPU, or pass their number")
    return device().core_count


@functools.cache
def _auto(hopper: bool, kind: str) -> bool:
    """Says once for each kind of device what is chosen."""
    log.info("impl='auto' runs %s on %s", "the Pallas kernels" if hopper else "the reference", kind)
    return hopper
