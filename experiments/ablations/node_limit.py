"""What a limit of nodes a token costs in loss, and what it saves in traffic: M = 1, 2, 4 and all (V3 sec. 2.1.2, 3.2.2).

    uv run -m experiments.ablations.node_limit --config=configs/study_cpu.py --config.model.n_routed_experts=64 \\
        --config.model.num_experts_per_tok=8 --workdir=runs/node_limit
    uv run -m experiments.ablations.node_limit --config=configs/study_120m.py --config.model.n_routed_experts=64 \\
        --config.model.num_experts_per_tok=8 --config.model.n_group=8 --config.model.moe_intermediate_size=128 --steps=1000 \\
        --workdir=runs/node_limit-gpu

Groups of experts stand for nodes; nothing is spread. On held-out text: the nodes that a token's experts lie on, and the bytes that
it sends over InfiniBand in a layer's forward pass, once to each node but its own, as FP8, and back from it as bf16. Its own
node may be any. M below K, the experts of a token: the best K lie in the K groups with the best of them anyhow. Published: M = 4 of
8 nodes; its loss is not compared with others.
"""

from pathlib import Path

import numpy as np
from absl import flags

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.model.transformer import Execution
from dsv3_jax.training.state import TrainState
from experiments import cli
from experiments.ablations import study
from experiments.ablations.routing import check_routed, picks_of
from experiments.bench.traffic import nodes_a_token, row_bytes
from experiments.output import panels

CONFIG = cli.define_config()
STEPS, WORKDIR = study.define_flags(steps=150)
SEEDS = study.define_seeds()
LIMITS = flags.DEFINE_list("limits", ["1", "2", "4"], "Values of M = model.topk_group; all = model.n_group is added.")
ALL = "all"


def main() -> int:
    config = study.read_config(CONFIG, STEPS.value)
    check_routed(config.model)
    curves = study.train_seeds(_variants(config), SEEDS.value, Path(WORKDIR.value), study.Watch(measure))
    losses = {name: np.array([run.val_loss for run in runs]) for name, runs in curves.items()}
    nodes = {name: np.array([run.measured["nodes"][-1].mean() for run in runs]) for name, runs in curves.items()}
    sent = {name: _bytes_a_token(config, values) for name, values in nodes.items()}
    figure, (ax,) = panels("Loss against traffic, by the most nodes a token")
    for name, values in losses.items():
        x, y = sent[name], values
        bars = {f"{axis}err": study.deviation(seeds) for axis, seeds in (("x", x), ("y", y))}
        ax.errorbar(x.mean(), y.mean(), **bars, fmt="o", capsize=3, label=f"M = {name}")
    ax.set(xlabel="bytes a token over InfiniBand, one layer, forward", ylabel="validation loss, nats", xlim=(0, None))
    ax.legend()
    rows = [
        [name, study.mean_std(losses[name]), "" if name == ALL else study.mean_std(losses[name] - losses[ALL]),
         study.mean_std(nodes[name], 2), study.mean_std(sent[name], 0), f"{(sent[name] / sent[ALL]).mean():.2f}"]
        for name in losses
    ]  # fmt: skip
    table = study.markdown(["M", "validation loss", "against all", "nodes a token", "bytes a token", "of all"], rows)
    result = {"val_loss": losses, "nodes_a_token": nodes, "bytes_a_token": sent, "nodes": config.model.n_group}
    study.finish(Path(WORKDIR.value), figure, table, _verdict(losses, sent), result)
    return 0


def _variants(config: Config) -> dict[str, Config]:
    """By M. Raises ConfigError for one that is no number or that limits nothing."""
    m = config.model
    most = min(m.n_group, m.num_experts_per_tok) - 1
    if most < 1:
        raise ConfigError("config.model.n_group", m.n_group, "and config.model.num_experts_per_tok must both be at least 2 to limit nodes")
    if not LIMITS.value or not all(limit.isdecimal() and 0 < int(limit) <= most for limit in LIMITS.value):
        below = f"model.n_group = {m.n_group} and model.num_experts_per_tok = {m.num_experts_per_tok}"
        raise ConfigError("--limits", ",".join(LIMITS.value), f"name numbers from 1 to {most}, below {below}, or raise these")
    limits = {limit: int(limit) for limit in LIMITS.value} | {ALL: config.model.n_group}
    return {name: study.changed(config, model={"topk_group": limit}) for name, limit in limits.items()}


def measure(config: Config, state: TrainState, text: study.Text) -> dict[str, np.ndarray]:
    """`nodes` [layers] that a held-out token's experts lie on, on average."""
    m, execution = config.model, Execution.of(config, text.vocabulary.eos_id)
    picks = picks_of(state, m, execution, study.held_out_rows(config, text), config.train.micro_batch_size)
    return {"nodes": np.array([nodes_a_token(layer, m.n_routed_experts, m.n_group) for layer in picks])}


def _bytes_a_token(config: Config, nodes: np.ndarray) -> np.ndarray:
    """Over InfiniBand, there and back. One of n_group nodes is the token's own, so that it sends 1 / n_group less than it has nodes."""
    m = config.model
    return nodes * (1 - 1 / m.n_group) * sum(row_bytes(m.hidden_size, m.num_experts_per_tok, "bfloat16", fp8=True))


def _verdict(losses: dict[str, np.ndarray], sent: dict[str, np.ndarray]) -> str:
    costs = [
        f"M = {name} at {(sent[name] / sent[ALL]).mean():.2f} of the traffic {study.difference(losses[name], losses[ALL])}"
        for name in losses
        if name != ALL
    ]
    return (
        f"Loss against no limit, seed by seed: {'; '.join(costs)}. "
        "Published: DeepSeek-V3 sends a token to at most 4 of 8 nodes; no loss without the limit is given."
    )


if __name__ == "__main__":
    cli.run(main)
