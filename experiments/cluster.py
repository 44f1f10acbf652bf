"""Flags that make a command one of several processes, on one machine or on a cluster."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from absl import flags

from dsv3_jax.config import ConfigError

flags.disclaim_key_flags()  # the flags belong to the experiment that defines them, and show in its --help


class Cluster(NamedTuple):
    """The flags, to be read once they are parsed."""

    distributed: flags.FlagHolder
    coordinator: flags.FlagHolder
    num_processes: flags.FlagHolder
    process_id: flags.FlagHolder
    heartbeat_timeout: flags.FlagHolder

    def joined(self) -> AbstractContextManager[None]:
        """This process as the flags place it; nothing to do without them. Raises ConfigError, before JAX is loaded where it can."""
        address = self._address()
        if address is None and not self.distributed.value:
            return nullcontext()
        from dsv3_jax.parallel.processes import Address, joined

        return joined(Address(*address) if address else None, self.heartbeat_timeout.value)

    def _address(self) -> tuple[str, int, int] | None:
        three = (self.coordinator, self.num_processes, self.process_id)
        missing = " ".join(f"--{flag.name}" for flag in three if flag.value is None)
        given = [flag for flag in three if flag.value is not None]
        if not given:
            return None
        if self.distributed.value:
            raise ConfigError(f"--{given[0].name}", given[0].value, "give it or --distributed, which asks the cluster, not both")
        if missing:
            raise ConfigError(f"--{given[0].name}", given[0].value, f"needs {missing} too")
        coordinator, count, index = (flag.value for flag in three)
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError("--coordinator", coordinator, "must be HOST:PORT, where process 0 can be reached")
        if index >= count:
            raise ConfigError("--process_id", index, f"must be below --num_processes={count}; they count from 0")
        return coordinator, count, index


def define_flags() -> Cluster:
    """Defines --distributed, --coordinator, --num_processes, --process_id and --heartbeat_timeout."""
    return Cluster(
        flags.DEFINE_bool("distributed", False, "Be one of the processes of this SLURM, Open MPI or Kubernetes job."),
        flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, the same on all processes; without --distributed."),
        flags.DEFINE_integer("num_processes", None, "How many processes train together.", lower_bound=1),
        flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0),
        flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence after which a process counts as lost.", lower_bound=1),
    )
