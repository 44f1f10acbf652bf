"""Bytes that a token of one MoE layer sends over `node` and over `gpu`, and the time they take. Nothing is sent or allocated.

    uv run -m experiments.bench.dispatch --config=configs/v3_671b.py --config.parallel.mesh.data=1 \\
        --config.parallel.mesh.node=8 --config.parallel.mesh.gpu=8 --config.train.micro_batch_size=64 --config.data.num_shards=64
    uv run -m experiments.bench.dispatch --config=configs/tiny.py --config.parallel.mesh.node=4 --config.parallel.mesh.gpu=2 \\
        --workdir=runs/tiny

The first table follows what routers pick through the plans of dispatch: rows that are needed. Routers are random, within
the node limit and without it, and with --workdir that of a run of the same routing, on its held-out text. The second is what
blocks of one size send, from the compiled program of the forward pass, beside what the plan foretells. A forward pass
is priced; its backward pass sends as much again, and rematerialisation dispatches once more.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.config import Config, ConfigError
from experiments import cli
from experiments.output import check_outputs, table

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run whose router is priced too.")
BOUND = cli.define_float("bound", 1.5, "parallel.dispatch_bound of the second table, beside None.", lower_bound=1.0)
FIGURE = flags.DEFINE_string("figure", None, "File to draw the first table to (.png or .svg).")
JSON = flags.DEFINE_string("json", None, "File to write all numbers to, unrounded.")

RATES = {"node": 50e9, "gpu": 160e9}  # bytes a second: InfiniBand and NVLink of V3's cluster (sec. 3.2.2)
MODES, PRECISIONS = ("direct", "two_hop"), ("bf16", "fp8")
ROUTING_FIELDS = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")


def main() -> int:
    config = cli.read_config(CONFIG)
    check_outputs(FIGURE, JSON)
    cli.fake_devices(config.parallel.mesh.devices, only_compile=True)
    from dsv3_jax.training.metrics import write_json

    report = measure(config, Path(WORKDIR.value) if WORKDIR.value else None, BOUND.value)
    if JSON.value:
        write_json(Path(JSON.value), report)
    if FIGURE.value:
        draw(report).savefig(FIGURE.value, dpi=160)
    print(render(report))
    return 0


def measure(config: Config, workdir: Path | None, bound: float) -> dict[str, Any]:
    """All numbers: rows and bytes a token, seconds a layer's forward pass of a device's tokens."""
    from experiments.bench import traffic

    mesh, train = config.parallel.mesh, config.train
    tokens = train.micro_batch_size * train.sequence_length // mesh.batch_devices
    if mesh.expert_devices == 1:
        raise ConfigError("config.parallel.mesh", 1, "nothing is sent on one device; set node or gpu")
    return {
        "nodes": mesh.node, "gpus": mesh.gpu, "tokens": tokens, "dtype": train.compute_dtype,
        "routers": {name: _price(config, picks, tokens) for name, picks in _routers(config, workdir)},
        "compiled": [{"dispatch": mode, "precision": precision, "bound": limit}
                     | traffic.compiled_bytes(config, mode, precision == "fp8", limit, tokens)
                     for mode in MODES for precision in PRECISIONS for limit in (None, bound)],
    }  # fmt: skip


def _routers(config: Config, workdir: Path | None) -> Iterator[tuple[str, Any]]:
    """Picks [devices, n, k] by the name of what picked them."""
    import jax
    import numpy as np

    from experiments.bench.traffic import MOST_SENDERS, random_picks

    m, mesh = config.model, config.parallel.mesh
    senders = min(mesh.expert_devices, MOST_SENDERS)
    for name, model in (("random", m), ("random, any node", dataclasses.replace(m, n_group=1, topk_group=1))):
        picks = np.asarray(random_picks(jax.random.key(0), senders * 1024, model))
        yield name, picks.reshape(senders, -1, m.num_experts_per_tok)
    if workdir:
        for layer, picks in enumerate(_trained(config, workdir)):
            whole = len(picks) // senders * senders
            yield f"trained, MoE layer {layer}", picks[:whole].reshape(senders, -1, m.num_experts_per_tok)


def _trained(config: Config, workdir: Path) -> Any:
    """Picks [layers, n, k] of a run's model, computed in float32, on rows of its held-out text.

    Raises ConfigError where it routes otherwise than `config`.
    """
    import jax
    import numpy as np

    from dsv3_jax.model.picks import picked_experts
    from dsv3_jax.training.corpus import open_corpus
    from dsv3_jax.training.data import validation_rows
    from dsv3_jax.training.run import load_run

    run = load_run(workdir, ema=False)
    for field in ROUTING_FIELDS:
        ours, theirs = getattr(config.model, field), getattr(run.config.model, field)
        if ours != theirs:
            raise ConfigError(f"config.model.{field}", ours, f"the run in {workdir} has {theirs}; name the config that it was trained with")
    execution = dataclasses.replace(
        run.execution, dtype="float32"
    )  # programs of this process are not to be run in bf16, see `fake_devices`
    rows = validation_rows(open_corpus(run.config.data).valid, run.tokenizer, run.vocabulary, run.config.train.sequence_length, 16)
    return np.asarray(
        jax.jit(lambda p, b, tokens: picked_experts(p, b, tokens, run.config.model, execution))(run.params, run.router_bias, rows[:, :-1])
    )


def _price(config: Config, picks: Any, tokens: int) -> dict[str, Any]:
    from dsv3_jax.parallel.expert import make_hops
    from experiments.bench.traffic import nodes_a_token, row_bytes, rows_sent

    m, mesh = config.model, config.parallel.mesh
    nodes = nodes_a_token(picks, m.n_routed_experts, mesh.node)
    result: dict[str, Any] = {"nodes_a_token": nodes, "experts_a_node": m.num_experts_per_tok / nodes, "sent": []}
    for mode in MODES:
        rows = rows_sent(picks, m.n_routed_experts, make_hops(mode, mesh, m), mesh)
        for precision in PRECISIONS:
            there, back = row_bytes(m.hidden_size, m.num_experts_per_tok, config.train.compute_dtype, precision == "fp8")
            sent = {axis: count * (there + back) for axis, count in rows.items()}
            seconds = {axis: tokens * size / RATES[axis] for axis, size in sent.items()}
            dispatched = {axis: count * there for axis, count in rows.items()}
            result["sent"].append({"dispatch": mode, "precision": precision, "rows": rows, "dispatch_bytes": dispatched,
                                   "combine_bytes": {axis: count * back for axis, count in rows.items()}, "seconds": seconds})  # fmt: skip
    return result


def render(report: dict[str, Any]) -> str:
    """Both tables as text, and the paper's figures."""
    return "\n\n".join([_needed(report), _paper(report), _padded(report)])


def _needed(report: dict[str, Any]) -> str:
    rows = [
        (
            "a token, forward",
            "dispatch",
            "sent as",
            "rows: node",
            "gpu",
            "KiB there: node",
            "gpu",
            "and back: node",
            "gpu",
            "ms: node",
            "gpu",
        )
    ]
    for name, router in report["routers"].items():
        for one in router["sent"]:
            numbers = [f"{one['rows'][axis]:.2f}" for axis in RATES]
            numbers += [f"{one[field][axis] / 1024:.1f}" for field in ("dispatch_bytes", "combine_bytes") for axis in RATES]
            numbers += [f"{one['seconds'][axis] * 1e3:.2f}" for axis in RATES]
            rows.append((name, one["dispatch"], one["precision"], *numbers))
    return table(rows, "<<<" + ">" * 8)


def _paper(report: dict[str, Any]) -> str:
    equal = RATES["gpu"] / RATES["node"]
    rows = [("nodes and experts", "nodes a token", "experts a node")]
    rows += [(name, f"{r['nodes_a_token']:.2f}", f"{r['experts_a_node']:.2f}") for name, r in report["routers"].items()]
    rows.append(("paper, sec. 3.2.2", "at most 4", f"{equal:.1f} at equal cost, so {4 * equal:.0f} experts"))
    speeds = f"ms: of {report['tokens']} tokens a device, there and back, at {RATES['node'] / 1e9:.0f} GB/s of InfiniBand (node) and "
    return table(rows, "<><") + "\n" + speeds + f"{RATES['gpu'] / 1e9:.0f} GB/s of NVLink (gpu); the two run at the same time"


def _padded(report: dict[str, Any]) -> str:
    rows = [("blocks of one size", "sent as", "bound", "KiB a token: node", "gpu", "by the plan: node", "gpu")]
    for one in report["compiled"]:
        numbers = [f"{one[field][axis] / 1024:,.1f}" for field in ("compiled_bytes", "planned_bytes") for axis in RATES]
        rows.append((one["dispatch"], one["precision"], str(one["bound"]), *numbers))
    return table(rows, "<<<>>>>")


def draw(report: dict[str, Any]) -> Any:
    """The bytes of the first table as a matplotlib Figure: a bar for each axis."""
    from matplotlib.figure import Figure

    labels, sizes = [], []
    for name, router in report["routers"].items():
        for one in router["sent"]:
            labels.append(f"{name}, {one['dispatch']}, {one['precision']}")
            sizes.append({axis: (one["dispatch_bytes"][axis] + one["combine_bytes"][axis]) / 1024 for axis in RATES})
    figure = Figure(figsize=(8, 0.34 * len(labels) + 1.2), layout="constrained")
    ax = figure.subplots()
    for offset, (axis, color) in zip((-0.2, 0.2), (("node", "#0072B2"), ("gpu", "#C98500")), strict=True):
        positions = [i + offset for i in range(len(labels))]
        ax.barh(positions, [size[axis] for size in sizes], height=0.38, color=color, label=f"over {axis}")
    ax.set_yticks(range(len(labels)), labels, fontsize=8.5)
    ax.set(xlabel="KiB a token, dispatch and combine of one layer, forward", ylim=(len(labels) - 0.5, -0.5))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    cli.run(main)
