"""Step time and bytes sent of one configuration on 1, 2, 4 and 8 devices: the same batch, spread further and further.

    uv run -m experiments.bench.scaling --config=configs/tiny.py --host_devices=8
    uv run -m experiments.bench.scaling --config=configs/h200.py --axis=data

Meshes grow along --axis, or along gpu and then node. Bytes are counted in the compiled step, by kind of collective and by mesh axis;
a byte counts for the outermost axis that its sender and its receiver differ in.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.config import Config, MeshConfig
from experiments import cli
from experiments.output import check_outputs, gib, table

CONFIG = cli.define_config()
HOST_DEVICES = flags.DEFINE_integer("host_devices", None, "Fake so many devices on this CPU.", lower_bound=1)
AXIS = flags.DEFINE_enum("axis", None, ["data", "node", "gpu"], "Mesh axis that grows. Without it: gpu to 4, then node.")
STEPS = flags.DEFINE_integer("steps", 5, "Timed steps; the median counts.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "File to write all numbers to, unrounded.")

SIZES = (1, 2, 4, 8)
SHARED = "Fake devices share the cores of one CPU: their times are no figure of scaling. A CPU also sends bf16 as float32."


def main() -> int:
    config = cli.read_config(CONFIG)
    check_outputs(JSON)
    if HOST_DEVICES.value:
        cli.fake_devices(HOST_DEVICES.value)
    import jax

    from dsv3_jax.training.metrics import write_json

    report = [measure(spread(config, n, AXIS.value), STEPS.value) for n in SIZES if n <= jax.device_count()]
    if JSON.value:
        write_json(Path(JSON.value), {"device": jax.devices()[0].device_kind, "meshes": report})
    print(render(report) + (f"\n\n{SHARED}" if jax.default_backend() == "cpu" else ""))
    return 0


def spread(config: Config, devices: int, axis: str | None) -> Config:
    """The configuration on so many devices. Raises ConfigError where they do not divide its batch or its experts."""
    from dsv3_jax.config_checks import validate

    sizes = {axis: devices} if axis else {"gpu": min(devices, 4), "node": max(devices // 4, 1)}
    spread_config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, mesh=MeshConfig(**sizes)))
    validate(spread_config)
    return spread_config


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Compiles and times the step on random tokens, one micro-batch each; what its collectives send."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.parallel.mesh import batch_sharding, make_mesh, replicated
    from dsv3_jax.parallel.sharding import state_shardings
    from dsv3_jax.training.lowered import lower_train_step
    from dsv3_jax.training.optimizer import make_optimizer
    from dsv3_jax.training.state import create_state
    from dsv3_jax.training.step import Rates
    from experiments.bench.collectives import collectives, totals
    from experiments.bench.hlo import parse

    config = dataclasses.replace(config, train=one_micro_batch(config.train))
    mesh, train = make_mesh(config.parallel.mesh), config.train
    step = lower_train_step(config, mesh).compile()
    create = functools.partial(create_state, config, make_optimizer(config.optimizer), mesh)
    state = jax.jit(create, out_shardings=state_shardings(jax.eval_shape(create), mesh))()
    shape = (1, train.micro_batch_size, train.sequence_length + 1)
    rows = jax.device_put(jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size), batch_sharding(mesh))
    rest = jax.device_put((np.int32(1), Rates(jnp.float32(1e-4), jnp.float32(1e-3), jnp.float32(0.3))), replicated(mesh))
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, rows, *rest))
        seconds.append(time.perf_counter() - started)
    return {
        "mesh": dict(mesh.shape),
        "devices": mesh.devices.size,
        "step_seconds": float(np.median(seconds[1:])),
        "nll": float(metrics.main.nll),
        "sent_bytes": totals(collectives(parse(step.as_text() or ""), dict(mesh.shape))),
    }


def one_micro_batch(train: Any) -> Any:
    """A step without accumulation, so that what its program sends is what a micro-batch sends."""
    return dataclasses.replace(train, batch_size=train.micro_batch_size, batch_size_start=train.micro_batch_size)


def render(report: list[dict[str, Any]]) -> str:
    """A row for each mesh: a step's time, and what a device sends by kind and axis."""
    columns = sorted({(kind, axis) for one in report for kind, by_axis in one["sent_bytes"].items() for axis in by_axis})
    rows = [("devices", "data x node x gpu", "step", *(f"{kind}, {axis}" for kind, axis in columns))]
    for one in report:
        mesh, sent = one["mesh"], one["sent_bytes"]
        sizes = f"{mesh['data']} x {mesh['node']} x {mesh['gpu']}"
        rows.append((str(one["devices"]), sizes, f"{one['step_seconds'] * 1e3:,.1f} ms",
                     *(gib(sent.get(kind, {}).get(axis, 0.0)) for kind, axis in columns)))  # fmt: skip
    return table(rows, ">>>" + ">" * len(columns)) + "\n\nBytes are those that a device sends in a step of one micro-batch."


if __name__ == "__main__":
    cli.run(main)
