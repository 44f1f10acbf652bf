"""Places redundant experts by measured loads, and compares the balance before and after. Nothing is run on a device.

    uv run -m experiments.placement --loads=loads.npy --replicas=288 --groups=8 --nodes=4 --gpus=32 --json=placement.json
    uv run -m experiments.placement --loads=loads.npy --replicas=320 --groups=8 --nodes=40 --gpus=320 --shared
    uv run -m experiments.placement --loads=new.npy --replicas=288 --groups=8 --nodes=4 --gpus=32 --current=placement.json --threshold=0.05
    uv run -m experiments.placement --loads=loads.npy --replicas=288 --groups=8 --nodes=4 --gpus=32 --hosted=16

The first is the paper's prefill unit: 32 GPUs with 8 + 1 experts each. The second is its decode unit: one expert a GPU, and the
shared expert is one more that every token picks. The third keeps a layer as it is unless its imbalance falls by a twentieth or a
group of it spans nodes. The fourth compares dynamic redundancy: 16 hosted, 288 / 32 = 9 active. LOADS is an array [layers, experts]
in any unit, saved by numpy.save, or the expert_load.jsonl of a run, of which the last ten reports count. Imbalance is the load of
the busiest GPU over the mean. The JSON has physical_to_logical (the expert of each slot, GPU by GPU), logical_to_physical (the
slots of each expert, then -1) and replica_count, each with one list a layer.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.config import ConfigError
from experiments import cli
from experiments.output import check_output, check_outputs, rendered, table

LOADS = flags.DEFINE_string("loads", None, "Measured loads: .npy, or the expert_load.jsonl of a run.", required=True)
REPLICAS = flags.DEFINE_integer("replicas", 288, "Slots for experts over all GPUs, redundant ones included.", lower_bound=1)
GROUPS = flags.DEFINE_integer("groups", 8, "Groups of the router; whole ones stay on a node where they divide by the nodes.", lower_bound=1)
NODES = flags.DEFINE_integer("nodes", 4, "Nodes of the deployment unit.", lower_bound=1)
GPUS = flags.DEFINE_integer("gpus", 32, "GPUs of the deployment unit, over all nodes.", lower_bound=1)
SHARED = flags.DEFINE_bool("shared", False, "Count the shared expert as one more routed expert, which every token picks.")
PER_TOKEN = flags.DEFINE_integer("experts_per_token", 8, "Routed experts that a token picks: for --shared and --hosted.", lower_bound=1)
CURRENT = flags.DEFINE_string("current", None, "JSON of an earlier placement, to move away from as little as possible.")
THRESHOLD = cli.define_float("threshold", 0.05, "With --current: a layer moves when its imbalance falls by more than this share.")
HOSTED = flags.DEFINE_integer("hosted", None, "Compare dynamic redundancy with so many hosted experts a GPU.")
STEPS = flags.DEFINE_integer("steps", 8, "Steps to compare it on.", lower_bound=1)
STEP_TOKENS = flags.DEFINE_integer("step_tokens", 8192, "Tokens of a step, over all GPUs.", lower_bound=1)
SPREAD = cli.define_float(
    "spread", 0.5, "How far the loads of a step stray: deviation of their logarithm.", lower_bound=0.0, upper_bound=10.0
)
SEED = cli.define_seed("Of the steps that are drawn.")
JSON = flags.DEFINE_string("json", None, "File to write the placement to.")
FIGURE = flags.DEFINE_string("figure", "placement", "Path of the picture, without .png and .svg.")

JSONL_REPORTS = 10  # of a run's expert_load.jsonl, the last ones
BEFORE, AFTER, INK = "#C98500", "#0072B2", "#111827"  # Okabe and Ito's


def main() -> int:
    from dsv3_jax.inference.placement import imbalance, moved_slots, place_experts, plain_imbalance, replace_experts
    from dsv3_jax.training.metrics import write_atomically, write_json

    for ending in (".png", ".svg"):
        check_output("--figure", FIGURE.value + ending)
    check_outputs(JSON)
    load, unit = _read_loads(Path(LOADS.value)), (GROUPS.value, NODES.value, GPUS.value)
    if SHARED.value:
        load = _with_shared(load)
    groups = _groups(load.shape[1])
    placed = place_experts(load, REPLICAS.value, groups, *unit[1:])
    columns = {"experts once": plain_imbalance(load, groups, *unit[1:]), "placed": imbalance(load, placed.physical_to_logical, GPUS.value)}
    if CURRENT.value:
        current = _read_current(Path(CURRENT.value), (len(load), REPLICAS.value))
        placed = replace_experts(load, current, groups, *unit[1:], THRESHOLD.value)
        columns |= {
            "as it was": imbalance(load, current, GPUS.value),
            "moving little": imbalance(load, placed.physical_to_logical, GPUS.value),
            "moved slots": moved_slots(current, placed.physical_to_logical),
        }
    if HOSTED.value is not None:
        columns |= dynamic_columns(load, groups)
    headline = describe_unit(load.shape[1], REPLICAS.value, groups, *unit[1:])
    figure = draw(load, placed.physical_to_logical, groups, *unit[1:], headline)
    for ending in ("png", "svg"):
        write_atomically(Path(f"{FIGURE.value}.{ending}"), rendered(figure, ending))
    if JSON.value:
        write_json(Path(JSON.value), {name: value.tolist() for name, value in placed._asdict().items()})
    print(headline + "\n\n" + _table(columns))
    return 0


def dynamic_columns(load: Any, groups: int) -> dict[str, Any]:
    """Mean imbalance over drawn steps: even division over the placement's replicas, planned division, planned choice of active experts.

    A layer without load counts as balanced.
    """
    import numpy as np

    from dsv3_jax.inference.dynamic_redundancy import host_experts, plan_step, share_tokens
    from dsv3_jax.inference.placement import busiest_over_mean, imbalance

    gpus, active, rng = GPUS.value, REPLICAS.value // GPUS.value, np.random.default_rng(SEED.value)
    hosted = host_experts(load, HOSTED.value, active, groups, NODES.value, gpus)
    figures = np.ones((3, len(load)))
    for layer, experts in enumerate(hosted):
        if not load[layer].any():
            continue
        static, steps = experts[:, :active], []
        for _ in range(STEPS.value):
            step = _drawn_step(load[layer], rng)
            planned = [share_tokens(step, static, np.ones(static.shape, bool)), plan_step(step, experts, active)]
            busiest = [busiest_over_mean(plan.sum(1)) for plan in planned]
            steps.append([imbalance(step[None], static.reshape(1, -1), gpus)[0], *busiest])
        figures[:, layer] = np.mean(steps, axis=0)
    names = ("steps: even", "planned", f"{active} of {HOSTED.value}")
    return dict(zip(names, figures, strict=True))


def _drawn_step(load: Any, rng: Any) -> Any:
    """Tokens of each expert in one step; `load` must not be all 0."""
    chance = load / load.max() * rng.lognormal(0.0, SPREAD.value, len(load))
    return rng.multinomial(STEP_TOKENS.value * PER_TOKEN.value, chance / chance.sum()).astype(float)


def draw(load: Any, physical_to_logical: Any, groups: int, nodes: int, gpus: int, title: str) -> Any:
    """Load of every GPU over the mean, busiest first, before and after, for the layer that was worst; and the imbalance of all layers."""
    import numpy as np
    from matplotlib.figure import Figure

    from dsv3_jax.inference.placement import gpu_loads, plain_loads

    pairs = [("experts once", BEFORE, plain_loads(load, groups, nodes, gpus)),
             ("placed", AFTER, gpu_loads(load, physical_to_logical, gpus))]  # fmt: skip
    mean = pairs[0][2].mean(1, keepdims=True)
    mean[mean == 0] = 1
    worst = int(np.argmax((pairs[0][2] / mean).max(1)))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    of_gpus, of_layers = figure.subplots(1, 2)
    for name, color, loads in pairs:
        relative = loads / mean
        of_gpus.step(np.arange(gpus), np.sort(relative[worst])[::-1], where="mid", color=color, label=name)
        of_layers.plot(relative.max(1), color=color, marker=".", label=name)
    of_gpus.set(xlabel=f"GPU, the busiest first (layer {worst})", ylabel="load / mean load", ylim=(0, None))
    of_layers.xaxis.get_major_locator().set_params(integer=True)
    of_layers.set(xlabel="layer", ylabel="busiest GPU / mean", ylim=(1 - 0.02, None))
    for ax in (of_gpus, of_layers):
        ax.axhline(1, color="#9ca3af", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
    figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def describe_unit(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> str:
    """What is placed where, in a line."""
    kind = "hierarchical" if groups % nodes == 0 else "global"
    return f"{experts} experts in {replicas} slots, {gpus} GPUs, {nodes} nodes: {kind}"


def _table(columns: dict[str, Any]) -> str:
    """A row for each layer, and their mean; imbalances with three digits."""
    layers = len(next(iter(columns.values())))
    rows = [("layer", *columns)]
    rows += [(str(layer), *(_number(values[layer]) for values in columns.values())) for layer in range(layers)]
    rows.append(("mean", *(_number(float(values.mean())) for values in columns.values())))
    return table(rows, ">" * len(rows[0]))


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _with_shared(load: Any) -> Any:
    """One column more: every token, which is the layer's load over the experts that a token picks."""
    import numpy as np

    return np.concatenate([load, load.sum(1, keepdims=True) / PER_TOKEN.value], axis=1)


def _groups(experts: int) -> int:
    """The flag; the shared expert is in no group, so that with it experts may lie anywhere."""
    if SHARED.value and GROUPS.value % NODES.value == 0:
        raise ConfigError("--shared", True, f"the shared expert is in no group; groups = {GROUPS.value} stay on nodes = {NODES.value}")
    return 1 if SHARED.value else GROUPS.value


def _read_loads(path: Path) -> Any:
    """float64 [layers, experts]. Raises ConfigError for a file that holds no loads."""
    import numpy as np

    if not path.is_file():
        raise ConfigError("--loads", str(path), "no such file; numpy.save an array [layers, experts] there")
    try:
        load = _mean_report(path) if path.suffix == ".jsonl" else np.load(path, allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError("--loads", str(path), f"cannot be read as loads: {' '.join(str(error).split())[:120]}") from error
    if load is None:
        raise ConfigError("--loads", str(path), "has no reports yet; wait until the run has written one")
    if not isinstance(load, np.ndarray) or load.ndim != 2 or load.dtype.kind not in "iuf" or not load.size:
        shape = f"{load.dtype} {list(load.shape)}" if isinstance(load, np.ndarray) else type(load).__name__
        raise ConfigError("--loads", str(path), f"holds {shape}; needs numbers [layers, experts]")
    if not np.isfinite(load).all() or load.min() < 0:
        raise ConfigError("--loads", str(path), "loads must be finite and not negative")
    return load.astype(np.float64)


def _mean_report(path: Path) -> Any:
    """Mean of the last reports of a run, None where there are none yet."""
    import numpy as np

    from dsv3_jax.training.metrics import read_jsonl

    reports = [row["load"] for row in read_jsonl(path)[-JSONL_REPORTS:]]
    return np.mean(np.array(reports, np.float64), axis=0) if reports else None


def _read_current(path: Path, shape: tuple[int, int]) -> Any:
    """physical_to_logical of an earlier --json. Raises ConfigError when it is none of this shape."""
    import numpy as np

    try:
        current = np.array(json.loads(path.read_text())["physical_to_logical"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"is no JSON of experiments.placement: {' '.join(str(error).split())[:120]}"
        raise ConfigError("--current", str(path), remedy) from error
    if current.shape != shape or current.dtype.kind != "i":
        raise ConfigError("--current", str(path), f"holds {current.dtype} {list(current.shape)}; needs slots {list(shape)}")
    return current


if __name__ == "__main__":
    cli.run(main)
