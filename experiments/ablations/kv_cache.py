"""What a token keeps for decoding, and what it costs in loss: MLA against MHA, GQA and MQA (V2, 2405.04434, sec. 2.1.4, app. D).

    uv run -m experiments.ablations.kv_cache --config=configs/study_cpu.py --workdir=runs/kv_cache
    uv run -m experiments.ablations.kv_cache --config=configs/study_120m.py --steps=1000 --workdir=runs/kv_cache-gpu
    uv run -m experiments.ablations.kv_cache --config=configs/v3_671b.py --groups=8 --steps=0 --workdir=runs/kv_cache-v3

The first table counts the cache of the configuration with the same heads, from shapes. The second trains models of equal size
from --seeds seeds: as many heads, and these as wide as makes their parameters nearest to MLA's. --steps=0 only counts.
Published: MLA keeps as much as GQA with 2.25 groups; at equal size it does better than MHA, which does better than GQA and MQA.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from matplotlib.axes import Axes

from dsv3_jax.config import Config, ConfigError, ModelConfig
from dsv3_jax.training.accounting import cache_bytes_per_token, count_parameters, mha_bytes_per_token
from experiments import cli
from experiments.ablations import study
from experiments.ablations.grouped_attention import GroupedConfig, grouped
from experiments.output import gib, panels

CONFIG = cli.define_config()
STEPS, WORKDIR = study.define_flags(steps=150, least=0)
SEEDS = study.define_seeds()
GROUPS = flags.DEFINE_integer("groups", 2, "Key-value heads of GQA; must divide the heads of the model.", lower_bound=1)
PUBLISHED = 2.25  # groups


def main() -> int:
    config = study.read_config(CONFIG, STEPS.value)
    heads, workdir = config.model.num_attention_heads, Path(WORKDIR.value)
    if heads % GROUPS.value:
        raise ConfigError("--groups", GROUPS.value, f"must divide model.num_attention_heads = {heads}")
    key_values, sizes = _key_values(heads, GROUPS.value), cache_sizes(config.model, GROUPS.value)
    figure, axes = panels("What a token keeps", 1 + bool(STEPS.value))
    _draw_sizes(axes[0], config.model, sizes)
    tables, verdict = [_sizes_table(config.model, sizes)], _sizes_verdict(sizes)
    result: dict[str, Any] = {"bytes_per_token": sizes, "equal_groups": sizes["MLA"] / sizes["MQA"]}
    if STEPS.value:
        models = {name: grouped(config.model, groups) for name, groups in key_values.items()} | {"MLA": config.model}
        losses = _losses(config, models, workdir)
        _draw_losses(axes[1], models, losses)
        tables.append(_losses_table(models, losses))
        verdict, result = f"{verdict} {_losses_verdict(losses)}", result | {"val_loss": losses}
    study.finish(workdir, figure, "\n\n".join(tables), verdict, result)
    return 0


_Sizes = Mapping[str, int]  # bytes a token, bf16, by attention
_Losses = Mapping[str, np.ndarray]  # one value a seed
_Models = Mapping[str, ModelConfig]


def cache_sizes(model: ModelConfig, groups: int) -> dict[str, int]:
    """Bytes a token of a bf16 cache over all layers, with the heads of the model; `groups`: key-value heads of GQA."""
    heads = model.num_attention_heads
    of_group = mha_bytes_per_token(model) // heads
    return {name: of_group * count for name, count in _key_values(heads, groups).items()} | {"MLA": cache_bytes_per_token(model)}


def _key_values(heads: int, groups: int) -> dict[str, int]:
    """Key-value heads by attention."""
    return {"MHA": heads, f"GQA-{groups}": groups, "MQA": 1}


def _draw_sizes(ax: Axes, model: ModelConfig, sizes: _Sizes) -> None:
    longest = model.max_position_embeddings
    lengths = [length for length in (2**i for i in range(30)) if 64 <= length < longest] + [longest]
    for name, size in sizes.items():
        ax.loglog(lengths, [size * length / 2**30 for length in lengths], "o-", label=f"{name}, same heads", base=2)
    ax.set(xlabel="tokens of a sequence", ylabel="cache in bf16, GiB")
    ax.legend()


def _sizes_table(model: ModelConfig, sizes: _Sizes) -> str:
    longest, layers = model.max_position_embeddings, 2 * model.num_hidden_layers
    header = ["same heads", "numbers a token and layer", "bytes a token", f"cache of {longest} tokens", "over MLA"]
    rows = [[name, f"{size // layers:,}", f"{size:,}", gib(size * longest), f"{size / sizes['MLA']:.2f}"] for name, size in sizes.items()]
    return study.markdown(header, rows)


def _sizes_verdict(sizes: _Sizes) -> str:
    return (
        f"MLA keeps as much as GQA with {sizes['MLA'] / sizes['MQA']:.2f} groups would, 1/{sizes['MHA'] / sizes['MLA']:.1f} of MHA. "
        f"Published: as GQA with {PUBLISHED} groups, for V2."
    )


def _losses(config: Config, models: _Models, workdir: Path) -> dict[str, np.ndarray]:
    """Validation losses of every seed."""
    variants = {name: dataclasses.replace(config, model=model) for name, model in models.items()}
    curves = study.train_seeds(variants, SEEDS.value, workdir)
    return {name: np.array([run.val_loss for run in runs]) for name, runs in curves.items()}


def _numbers(model: ModelConfig) -> int:
    """What a token keeps in a layer."""
    if isinstance(model, GroupedConfig):
        return 2 * model.num_key_value_heads * model.v_head_dim
    return model.kv_lora_rank + model.qk_rope_head_dim


def _draw_losses(ax: Axes, models: _Models, losses: _Losses) -> None:
    for name, values in losses.items():
        label = f"{name}, equal parameters"
        ax.errorbar(_numbers(models[name]), values.mean(), yerr=study.deviation(values), fmt="o", capsize=3, label=label)
    ax.set(xlabel="numbers a token and layer", ylabel="validation loss, nats", xscale="log")
    ax.legend()


def _losses_table(models: _Models, losses: _Losses) -> str:
    header = ["equal parameters", "heads x width", "parameters", "numbers a token and layer", "validation loss", "against MHA"]
    rows = [
        [name, f"{model.num_attention_heads} x {model.v_head_dim}", f"{count_parameters(model).total:,}", f"{_numbers(model):,}",
         study.mean_std(losses[name]), "" if name == "MHA" else study.mean_std(losses[name] - losses["MHA"])]
        for name, model in models.items()
    ]  # fmt: skip
    return study.markdown(header, rows)


def _losses_verdict(losses: _Losses) -> str:
    others = [f"{name} {study.difference(values, losses['MHA'])}" for name, values in losses.items() if name != "MHA"]
    return (
        f"Loss against MHA at equal parameters, seed by seed: {'; '.join(others)}. "
        "Published, as scores of benchmarks and not as a loss: MLA above MHA, MHA above GQA and MQA."
    )


if __name__ == "__main__":
    cli.run(main)
