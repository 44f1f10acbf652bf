"""Dispatch and combine of one MoE layer on the GPUs here, beside plain collectives of the same bytes.

    uv run -m experiments.bench.transports --config=configs/h200.py --config.parallel.mesh.gpu=2

A random router, and the tokens that the configuration gives a device. GB/s count the bytes that one device sends to others: for
plain collectives and for dispatch as it pads its blocks, and in the last column only the rows that are needed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import flags

from dsv3_jax.config import Config, ConfigError
from experiments import cli
from experiments.output import table

CONFIG = cli.define_config()
BOUND = cli.define_float("bound", 1.5, "parallel.dispatch_bound beside None.", lower_bound=1.0)
HOST_DEVICES = flags.DEFINE_integer("host_devices", None, "Fake so many devices on this CPU.", lower_bound=1)


class Timed(NamedTuple):
    """One way of sending."""

    name: str
    sent: float  # bytes that a device sends to others, padding included
    needed: float  # of these, rows that hold a token
    seconds: float


class Load(NamedTuple):
    """Tokens of all devices, and where they go, the same for every way of sending them."""

    operands: tuple[Any, Any, Any]  # rows, experts and gates, on the devices
    hops: tuple[Any, ...]
    needed: float  # rows a token that have to be sent


def main() -> int:
    config = cli.read_config(CONFIG)
    if config.parallel.mesh.expert_devices == 1:
        raise ConfigError("config.parallel.mesh", 1, "nothing is sent on one device; set node or gpu")
    if HOST_DEVICES.value:
        cli.fake_devices(HOST_DEVICES.value)
    print(render(list(measure(config, BOUND.value))))
    return 0


def measure(config: Config, bound: float) -> Iterator[Timed]:
    """Plain collectives first, then dispatch and combine in every mode."""
    from dsv3_jax.parallel.mesh import make_mesh

    mesh = make_mesh(config.parallel.mesh)
    tokens = config.train.micro_batch_size * config.train.sequence_length // config.parallel.mesh.batch_devices
    yield from _plain(config, mesh, tokens)
    load = _load(config, mesh, tokens)
    for fp8 in (False, True):
        for limit in (None, bound):
            yield from _layer(config, mesh, tokens, load, limit, fp8)


def _plain(config: Config, mesh: Any, tokens: int) -> Iterator[Timed]:
    """One block of `tokens` rows to every device."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from dsv3_jax.parallel.mesh import BATCH_AXES, EXPERT_AXES
    from experiments.bench.timing import draw, median_seconds

    devices, width = config.parallel.mesh.expert_devices, config.model.hidden_size

    def ragged(x: Any) -> Any:
        sizes = jnp.full(devices, tokens, jnp.int32)
        here = jax.lax.axis_index(EXPERT_AXES)
        starts = jnp.arange(devices, dtype=jnp.int32) * tokens
        return jax.lax.ragged_all_to_all(
            x, jnp.zeros_like(x), starts, sizes, jnp.full(devices, here * tokens, jnp.int32), sizes, axis_name=EXPERT_AXES
        )

    ways = {"all_to_all": lambda x: jax.lax.all_to_all(x, EXPERT_AXES, 0, 0, tiled=True)}
    if jax.default_backend() != "cpu":
        ways["ragged_all_to_all"] = ragged
    for dtype in ("bfloat16", "float8_e4m3fn"):
        x = jax.device_put(draw(0, (mesh.devices.size * devices * tokens, width), dtype), jax.NamedSharding(mesh, P(BATCH_AXES)))
        sent = float((devices - 1) * tokens * width * x.dtype.itemsize)
        for name, way in ways.items():
            run = jax.jit(jax.shard_map(way, mesh=mesh, in_specs=P(BATCH_AXES), out_specs=P(BATCH_AXES), check_vma=False))
            yield Timed(f"lax.{name}, {dtype}", sent, sent, median_seconds(run, x))


def _load(config: Config, mesh: Any, tokens: int) -> Load:
    """What a random router gives the layer to send."""
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from dsv3_jax.parallel.expert import make_hops
    from dsv3_jax.parallel.mesh import BATCH_AXES
    from experiments.bench.timing import draw
    from experiments.bench.traffic import random_picks, rows_sent

    m, sizes, k, count = config.model, config.parallel.mesh, config.model.num_experts_per_tok, tokens * mesh.devices.size
    picks, hops = random_picks(jax.random.key(0), count, m), make_hops(config.parallel.dispatch, sizes, m)
    operands = draw(1, (count, m.hidden_size), config.train.compute_dtype), picks, draw(2, (count, k), "float32")
    needed = sum(rows_sent(np.asarray(picks).reshape(mesh.devices.size, tokens, k), m.n_routed_experts, hops, sizes).values())
    return Load(jax.device_put(operands, jax.NamedSharding(mesh, P(BATCH_AXES))), hops, needed)


def _layer(config: Config, mesh: Any, tokens: int, load: Load, bound: float | None, fp8: bool) -> Iterator[Timed]:
    """Dispatch, plans included, and combine."""
    import jax
    from jax.sharding import PartitionSpec as P

    from dsv3_jax.parallel.expert import Arrived, Placement, combine_tokens, dispatch_tokens
    from dsv3_jax.parallel.mesh import BATCH_AXES
    from experiments.bench.timing import median_seconds
    from experiments.bench.traffic import padded_rows, row_bytes

    m, k = config.model, config.model.num_experts_per_tok
    placement, on = Placement(BATCH_AXES, load.hops, bound), P(BATCH_AXES)

    def dispatch(x: Any, experts: Any, gates: Any) -> tuple[Any, ...]:
        arrived: Arrived = dispatch_tokens(x, experts, gates, m.n_routed_experts, placement, fp8)
        return arrived.x, arrived.gates, arrived.experts, arrived.plans

    spread = {"mesh": mesh, "check_vma": False}
    send = jax.jit(jax.shard_map(dispatch, in_specs=on, out_specs=on, **spread))
    back = jax.jit(jax.shard_map(lambda y, plans: combine_tokens(y, plans, placement), in_specs=on, out_specs=on, **spread))
    y, _, _, plans = send(*load.operands)
    sent = tokens * sum(padded_rows(tokens, k, placement, config.parallel.mesh).values())
    needed, kind = tokens * load.needed, f"{'fp8' if fp8 else 'bf16'}, bound {bound}"
    there, here = row_bytes(m.hidden_size, k, config.train.compute_dtype, fp8)
    yield Timed(f"dispatch, {kind}", sent * there, needed * there, median_seconds(send, *load.operands))
    if not fp8:
        yield Timed(f"combine, {kind}", sent * here, needed * here, median_seconds(back, y, plans))


def render(timed: list[Timed]) -> str:
    """A row for each way."""
    rows: list[tuple[str, ...]] = [("one layer, a device", "sends", "needs", "time", "rate", "rate of what is needed")]
    for one in timed:
        rates = (f"{size / one.seconds / 1e9:,.1f} GB/s" for size in (one.sent, one.needed))
        rows.append((one.name, f"{one.sent / 1e6:,.1f} MB", f"{one.needed / 1e6:,.1f} MB", f"{one.seconds * 1e3:,.3f} ms", *rates))
    return table(rows, "<>>>>>")


if __name__ == "__main__":
    cli.run(main)
