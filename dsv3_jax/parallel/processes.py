"""Several processes that train one model, on JAX's own distributed runtime: how they start, agree, wait and end.

Each process owns some devices of the mesh and runs the same program. *Main* is process 0: it alone writes what is
written once, and it alone prints. What one process knows reaches the others in three ways:

    agreed, main_first   errors of a user, on the host: all processes go on, or all end with status 2
    collect              plain data for main, on the host: positions in the text
    any_process          a flag, on the devices, beside a step: all see it at the same step

A process that is lost ends the others: a collective fails, or JAX misses its heartbeats and aborts them.
With one process all of this does nothing.
"""

import itertools
import json
import logging
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed  # the runtime's keys and barriers, which orbax uses too; jax.distributed has no name for them yet
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, PyTree

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.mesh import replicated

# No process waits longer for another that is alive. Reading a large checkpoint to check it can take main hours.
_PATIENCE_MS = 24 * 3600 * 1000
_meetings = itertools.count()
# What JAX's errors say where a collective or a barrier lost a process, on a CPU and on GPUs.
_SIGNS_OF_LOSS = ("Gloo", "NCCL", "heartbeat", "UNAVAILABLE", "DEADLINE_EXCEEDED")


class Address(NamedTuple):
    """Where process 0 listens, how many processes there are, and which one this is."""

    coordinator: str  # HOST:PORT
    num_processes: int
    process_id: int


@contextmanager
def joined(address: Address | None, heartbeat_timeout: int) -> Iterator[None]:
    """This process as one of several; `address` None: what SLURM, Open MPI or Kubernetes says. To be entered before JAX sees a device.

    A process that is silent for `heartbeat_timeout` seconds counts as lost. An error that is not the user's ends this
    process at once with status 1: to wait for the others, who may be waiting for it, would keep all of them.
    Raises ConfigError where there is no such cluster.
    """
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is the loop's: see `any_process`
    _initialize(address, heartbeat_timeout)
    if not is_main():
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is loaded, which is not yet
        logging.getLogger().setLevel(logging.WARNING)
    try:
        yield
    except (ConfigError, SystemExit):
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        _end(error)
    jax.distributed.shutdown()


def _initialize(address: Address | None, heartbeat_timeout: int) -> None:
    timeouts: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_timeout, "shutdown_timeout_seconds": _PATIENCE_MS // 1000}
    if address is not None:
        if address.process_id == 0:
            _check_port(address.coordinator)
        jax.distributed.initialize(*address, cluster_detection_method="deactivate", **timeouts)
        return
    try:
        jax.distributed.initialize(**timeouts)
    except ValueError as error:
        remedy = f"no SLURM, Open MPI or Kubernetes job was found ({error}); give --coordinator, --num_processes and --process_id"
        raise ConfigError("--distributed", True, remedy) from error


def _check_port(coordinator: str) -> None:
    """Raises ConfigError where something listens already: the runtime, which listens on all addresses, would crash."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(coordinator.rpartition(":")[2])))
    except OSError as error:
        raise ConfigError("--coordinator", coordinator, f"process 0 cannot listen on that port ({error.strerror}); give another") from error


def _end(error: BaseException) -> None:
    reason = str(error).partition("\n")[0]
    if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in reason for sign in _SIGNS_OF_LOSS):
        print(f"error: process {jax.process_index()} stops, another process ended or cannot be reached ({reason}). "
              "Start all of them again: the same command continues from the newest checkpoint", file=sys.stderr)  # fmt: skip
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # a normal exit would wait in the runtime's shutdown for processes that wait for this one


def is_main() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints, on main only."""
    if is_main():
        print(text, flush=True)


# --- On the host ---


def _meeting() -> tuple[Any, str]:
    """The runtime's client, and a folder for keys that no meeting before had: all processes meet in the same order."""
    return distributed.global_state.client, f"dsv3_jax/{next(_meetings)}/"


def exchange(value: str | None) -> dict[int, str]:
    """Waits for all processes; what each of them brought, by process, where that is not None."""
    if jax.process_count() == 1:
        return {} if value is None else {0: value}
    client, folder = _meeting()
    if value is not None:
        client.key_value_set(f"{folder}{jax.process_index()}", value)
    client.wait_at_barrier(f"{folder}met", _PATIENCE_MS)
    brought = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(folder)}
    client.wait_at_barrier(f"{folder}read", _PATIENCE_MS)
    if is_main():
        client.key_value_delete(folder)
    return brought


def main_says(fact: bool) -> bool:
    """What main knows, on all processes."""
    return 0 in exchange("yes" if fact and is_main() else None)


def collect(value: Any) -> list[Any]:
    """Plain JSON data of all processes, in their order, on main; [] on others, which need not hold all of it."""
    if jax.process_count() == 1:
        return [value]
    client, folder = _meeting()
    client.key_value_set(f"{folder}{jax.process_index():08d}", json.dumps(value))
    client.wait_at_barrier(f"{folder}met", _PATIENCE_MS)
    if not is_main():
        return []
    brought = sorted(client.key_value_dir_get(folder))
    client.key_value_delete(folder)
    return [json.loads(text) for _, text in brought]


@contextmanager
def agreed() -> Iterator[None]:
    """All processes leave this block together. After a ConfigError in some, the first of them raises it, the others leave with status 2.

    Nothing inside may wait for other processes.
    """
    error: ConfigError | None = None
    try:
        yield
    except ConfigError as own:
        error = own
    failed = exchange(None if error is None else "failed")
    if error is not None and min(failed) == jax.process_index():
        raise error
    if failed:
        raise SystemExit(2)


@contextmanager
def main_first() -> Iterator[None]:
    """Main runs the block, then the others do; errors as in `agreed`."""
    if is_main():
        with agreed():
            yield
        with agreed():
            pass
    else:
        with agreed():
            pass
        with agreed():
            yield


# --- On the devices ---


def feeding(mesh: Mesh) -> tuple[int, int]:
    """Which part of a batch this process feeds to its devices, and how many parts there are. Raises ConfigError: see `part_of`."""
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    return part_of(owners.reshape(mesh.shape["pipe"], -1), jax.process_index())


def part_of(owners: Int[np.ndarray, "pipe rows"], process: int) -> tuple[int, int]:
    """The part, and the number of parts, of a batch that lies over data x node x gpu on devices of these processes.

    Processes whose devices hold the same rows, on stages of a pipeline, feed the same part. Raises ConfigError where the
    devices of the processes do not hold whole, equal parts.
    """
    held = {owner: np.unique(np.nonzero(owners == owner)[1]) for owner in np.unique(owners).tolist()}
    size, total = len(held[process]), owners.shape[1]
    equal = all(len(rows) == size and rows[0] % size == 0 and rows[-1] == rows[0] + size - 1 for rows in held.values())
    if not equal or total % size:
        remedy = f"data x node x gpu are {total} devices, of which each process must hold an equal part in one piece; change a size"
        raise ConfigError("config.parallel.mesh", total, remedy)
    return int(held[process][0]) // size, total // size


def put(tree: PyTree, sharding: PyTree) -> PyTree[Array]:
    """Values that all processes have, on the devices; one sharding, or a tree of them. Each process gives its devices their part."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    shardings = jax.tree.map(lambda _: sharding, tree) if isinstance(sharding, jax.sharding.Sharding) else sharding
    return jax.tree.map(lambda x, at: jax.make_array_from_callback(np.shape(x), at, lambda index: np.asarray(x)[index]), tree, shardings)


def fits_one_device(tree: PyTree[Array], mesh: Mesh) -> bool:
    """Whether whole arrays that lie on a mesh take at most half of a device's memory; a CPU's is not known, and suffices."""
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    return mesh.size == 1 or limit is None or 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) <= limit


def whole_on_main(tree: PyTree[Array], mesh: Mesh) -> PyTree[Array] | None:
    """Whole arrays on main's first device; None on other processes. One array at a time is whole on all devices meanwhile."""
    if jax.process_count() == 1:
        return jax.device_put(tree, jax.local_devices()[0])
    gather = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    if is_main():
        return jax.tree.map(lambda x: gather(x).addressable_data(0), tree)
    jax.tree.map(lambda x: jax.block_until_ready(gather(x)) is None, tree)
    return None


def any_process(flag: bool, mesh: Mesh) -> bool | Bool[Array, ""]:
    """Whether any process says so; it takes its turn on the devices, so to read it waits for the steps before it."""
    if jax.process_count() == 1:
        return flag
    mine = np.full(mesh.local_mesh.devices.size, flag)
    spread = jax.make_array_from_process_local_data(NamedSharding(mesh, P(mesh.axis_names)), mine, (mesh.size,))
    return _any(mesh)(spread)


def _any(mesh: Mesh) -> Any:
    return jax.jit(jax.numpy.any, out_shardings=replicated(mesh))
