"""Pre-trains a model from text and leaves checkpoints, metrics and a report in a workdir.

    uv run -m experiments.pretrain --config=configs/tiny.py --workdir=runs/tiny

Runs until train.steps; the same command continues an interrupted run from its newest checkpoint.
SIGTERM or Ctrl-C saves and ends the run. A larger --config.train.steps goes on from a finished one.
--host_devices=8 makes eight devices of a CPU, to try a mesh: --config.parallel.mesh.node=2 --config.parallel.mesh.gpu=4.
Several processes train together with --distributed, or with --coordinator, --num_processes and --process_id.
"""

from pathlib import Path

from absl import flags

from experiments import cli, cluster

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it does not exist.", required=True)
HOST_DEVICES = flags.DEFINE_integer("host_devices", None, "Train on this CPU as if it were so many devices.", lower_bound=1)
CLUSTER = cluster.define_flags()


def main() -> int:
    config = cli.read_config(CONFIG)  # before JAX is loaded: a mistake shows at once
    if HOST_DEVICES.value:
        cli.fake_devices(HOST_DEVICES.value)
    with CLUSTER.joined():
        from dsv3_jax.training.loop import pretrain

        return pretrain(config, Path(WORKDIR.value), cli.command_line())


if __name__ == "__main__":
    cli.run(main)
