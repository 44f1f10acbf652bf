"""Do experts specialise? Their load by domain of text, with loss-free balancing and with a pure auxiliary loss (V3 sec. 4.5.3).

    uv run -m experiments.ablations.specialization --config=configs/study_cpu.py --workdir=runs/specialization
    uv run -m experiments.ablations.specialization --config=configs/study_120m.py --steps=1000 --domain_kib=8192 \\
        --workdir=runs/specialization-gpu

Trains on code, prose, markup and data found on the machine (data.source is not read), and counts what experts get of held-out
text of each domain. Heat maps of the first seed: load over mean load. Mutual information of domain and expert, in bits, for
domains of equal weight: 0 where every domain loads experts alike, 2 where each has experts of its own. Published: loss-free
shows greater specialisation than the auxiliary loss.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Float
from matplotlib.figure import Figure

from dsv3_jax.config import Config
from dsv3_jax.model.transformer import Execution
from dsv3_jax.training.corpus import Subset
from dsv3_jax.training.data import validation_rows
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.workdir import make_folder
from experiments import cli
from experiments.ablations import study
from experiments.ablations.domains import ENDINGS, python_folders, text_source, write_domains
from experiments.ablations.routing import check_routed, loads_of, mutual_information, picks_of

CONFIG = cli.define_config()
STEPS, WORKDIR = study.define_flags(steps=150)
SEEDS = study.define_seeds()
ALPHA = cli.define_float("alpha", 0.01, "model.aux_loss_alpha of the auxiliary loss.", lower_bound=0.0)
DOMAIN_KIB = flags.DEFINE_integer("domain_kib", 320, "Most KiB of text of a domain.", lower_bound=1)
FOLDERS = flags.DEFINE_list("folders", [], "Folders to find text in, beside Python's own.")

DOMAINS = tuple(ENDINGS)
HELD_OUT = 0.2  # of the pieces, so that the smallest domain has some


def main() -> int:
    config = study.read_config(CONFIG, STEPS.value)
    check_routed(config.model)
    workdir = Path(WORKDIR.value)
    make_folder(workdir)
    folders = [Path(folder).resolve() for folder in FOLDERS.value]
    settings = {"domain_kib": DOMAIN_KIB.value, "folders": [str(folder) for folder in folders]}
    study.check_made_from(workdir / "text", {f"--{flag}": value for flag, value in settings.items()})
    sizes = write_domains(workdir / "text", [*python_folders(), *folders], DOMAIN_KIB.value * 1024)
    config = study.changed(config, data={"source": text_source(workdir / "text"), "held_out": HELD_OUT})
    variants = {
        "auxiliary": study.changed(config, train={"balance": "auxiliary"}, model={"aux_loss_alpha": ALPHA.value}),
        "loss_free": study.changed(config, train={"balance": "loss_free"}),
    }
    curves = study.train_seeds(variants, SEEDS.value, workdir, study.Watch(measure, settings=settings))
    loads = {name: np.array([run.measured["load"][-1] for run in runs]) for name, runs in curves.items()}
    bits = {name: np.array([mutual_information(load) for load in values]) for name, values in loads.items()}
    losses = {name: np.array([run.val_loss for run in runs]) for name, runs in curves.items()}
    result = {"text_bytes": sizes, "bits": bits, "val_loss": losses, "loads": loads}
    study.finish(workdir, _figure(loads, bits), _table(bits, losses), _verdict(bits), result)
    return 0


def measure(config: Config, state: TrainState, text: study.Text) -> dict[str, np.ndarray]:
    """`load` [domains, layers, e]: share of a domain's held-out tokens' choices that each expert gets."""
    return {"load": np.stack([_load(config, state, text, domain) for domain in DOMAINS])}


def _load(config: Config, state: TrainState, text: study.Text, domain: str) -> Float[np.ndarray, "layers e"]:
    valid = text.corpus.valid
    documents = Subset(valid.source, np.array([i for i in valid.indices if valid.source.name(int(i)).startswith(f"{domain}/")], np.int64))
    train = config.train
    rows = validation_rows(documents, text.tokenizer, text.vocabulary, train.sequence_length, train.eval_sequences)
    picks = picks_of(state, config.model, Execution.of(config, text.vocabulary.eos_id), rows, train.micro_batch_size)
    counts = loads_of(picks, config.model.n_routed_experts).sum(1)
    return counts / counts.sum(-1, keepdims=True)


_Values = Mapping[str, np.ndarray]  # by strategy, seeds first


def _figure(loads: _Values, bits: _Values) -> Figure:
    """A heat map a layer and strategy, and the mutual information by layer below."""
    layers = next(iter(bits.values())).shape[1]
    figure = Figure(figsize=(10, 3 + 1.1 * layers), layout="constrained")
    figure.suptitle("Load of experts by domain, over the mean", x=0.01, ha="left", fontweight="bold")
    grid = figure.add_gridspec(layers + 1, len(loads), height_ratios=[1] * layers + [2])
    for column, (name, values) in enumerate(loads.items()):
        for layer in range(layers):
            ax = figure.add_subplot(grid[layer, column])
            relative = values[0, :, layer] * values.shape[-1]
            image = ax.imshow(relative, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
            ax.set_yticks(range(len(DOMAINS)), DOMAINS, fontsize=7)
            ax.set_xticks([])
            ax.set_title(f"{name}, MoE layer {layer}", fontsize=8)
    figure.colorbar(image, ax=figure.axes, shrink=0.5)
    ax = figure.add_subplot(grid[layers, :])
    for name, values in bits.items():
        study.band(ax, np.arange(layers), values, name, marker="o")
    ax.set(xlabel="MoE layer", ylabel="mutual information, bits", ylim=(0, None))
    ax.set_xticks(range(layers))
    ax.legend()
    return figure


def _table(bits: _Values, losses: _Values) -> str:
    layers = next(iter(bits.values())).shape[1]
    header = ["balance", "validation loss", *(f"layer {layer}, bits" for layer in range(layers)), "mean, bits"]
    rows = [
        [name, study.mean_std(losses[name]), *(study.mean_std(v[:, layer]) for layer in range(layers)), study.mean_std(v.mean(1))]
        for name, v in bits.items()
    ]
    return study.markdown(header, rows)


def _verdict(bits: _Values) -> str:
    free, auxiliary = bits["loss_free"].mean(1), bits["auxiliary"].mean(1)
    return (
        f"Mutual information of domain and expert: {study.mean_std(free)} bits loss-free, {study.mean_std(auxiliary)} auxiliary; "
        f"auxiliary against loss-free, seed by seed: {study.difference(auxiliary, free)}. "
        "Published: greater specialisation with loss-free balancing."
    )


if __name__ == "__main__":
    cli.run(main)
