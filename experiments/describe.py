"""Prints what a configuration costs: parameters, memory, FLOPs, cache and H800 hours. Allocates none of it.

    uv run -m experiments.describe --config=configs/v3_671b.py
    uv run -m experiments.describe --config=configs/h200.py --config.train.remat=full --json=h200.json

Parameters are counted from the model's own initialisation. Memory is an estimate for training on
the mesh that the configuration asks for. FLOPs are model FLOPs: nothing is added for recomputation.
"""

import logging
import math
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.config import Config, ConfigError, to_dict
from experiments import cli
from experiments.output import check_outputs, gib, table

CONFIG = cli.define_config()
TOKENS = cli.define_float("tokens", None, "Tokens to train on. Without it: those of train.steps.")
UTILISATION = cli.define_float("utilisation", None, "Share of the H800's BF16 peak that training reaches, above 0 and at most 1. "
                                 "Without it: what V3's published hours imply.")  # fmt: skip
BATCH = flags.DEFINE_integer("batch", 1, "Sequences in the latent cache.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", None, "Tokens of each of them. Without it: model.max_position_embeddings.", lower_bound=1)
JSON = flags.DEFINE_string("json", None, "File to write all numbers to, unrounded.")

_SECTION_TITLES = {"embed": "", "dense": "dense layers", "moe": "MoE layers", "norm": "", "lm_head": "", "mtp": "MTP modules"}


def main() -> int:
    from dsv3_jax.training.metrics import write_json

    _check_flags()
    logging.getLogger("dsv3_jax").setLevel(logging.WARNING)  # layers log what they pick, and here nothing runs
    config = cli.read_config(CONFIG)
    report = describe(config, TOKENS.value, UTILISATION.value, BATCH.value, LENGTH.value)
    if JSON.value:
        write_json(Path(JSON.value), report)
    print(render(report))
    return 0


def _check_flags() -> None:
    tokens, utilisation = TOKENS.value, UTILISATION.value
    if tokens is not None and tokens <= 0:
        raise ConfigError("--tokens", tokens, "must be above 0")
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ConfigError("--utilisation", utilisation, "must be above 0 and at most 1")
    check_outputs(JSON)


def describe(
    config: Config, tokens: float | None = None, utilisation: float | None = None, batch: int = 1, length: int | None = None
) -> dict[str, Any]:
    """All numbers, as JSON holds them: counts, bytes, FLOPs and hours without a prefix. None: see the flags."""
    from dsv3_jax.training import accounting

    run_tokens = accounting.tokens_of_run(config.train)
    tokens, utilisation = tokens or run_tokens, utilisation or accounting.published_utilisation()
    flops = accounting.training_flops(config.model, config.train.sequence_length)
    cache = accounting.cache_bytes_per_token(config.model)
    length = length or config.model.max_position_embeddings
    hours = accounting.h800_hours(tokens, flops.total, utilisation)
    memory = accounting.device_memory(config)
    return {
        "config": to_dict(config),
        "parameters": accounting.count_parameters(config.model)._asdict()
        | {"parts": [part._asdict() for part in accounting.parameter_parts(config.model)]},
        "memory_bytes_per_device": {item.kind: item.per_device for item in memory} | {"cache": batch * length * cache},
        "memory": [item._asdict() for item in memory],
        "training_bytes_per_device": sum(item.per_device for item in memory),
        "activation_bytes_by_remat": {
            policy: sum(accounting.activation_bytes(config, policy).values()) for policy in ("none", "selective", "full")
        },
        "host_ema_bytes": accounting.ema_bytes(config),
        "flops_per_token": flops._asdict() | {"total": flops.total},
        "cache": {
            "batch": batch,
            "length": length,
            "bytes_per_token": cache,
            "mha_bytes_per_token": accounting.mha_bytes_per_token(config.model),
        },
        "run": {"steps": config.train.steps, "tokens": run_tokens},
        "h800": {
            "tokens": tokens,
            "utilisation": utilisation,
            "published_utilisation": accounting.published_utilisation(),
            "hours": hours,
            "hours_per_trillion_tokens": hours / tokens * 1e12,
        },
    }


def render(report: dict[str, Any]) -> str:
    """The report as text, one table a topic."""
    return "\n\n".join([_parameters(report), _memory(report), _flops(report), _cache(report), _hours(report)])


def _parameters(report: dict[str, Any]) -> str:
    counts = report["parameters"]
    rows = [("parameters", "", "layers", "all", "activated")]
    for part in counts["parts"]:
        title = _SECTION_TITLES[part["section"]]
        name = "final norm" if part["section"] == "norm" else part["name"]
        left = (title, name) if title else (name, "")
        rows.append((*left, str(part["layers"]) if title else "", scaled(part["parameters"]), scaled(part["activated"])))
    rows.append(("main model", "", "", scaled(counts["total"]), scaled(counts["activated"])))
    rows.append(("MTP without what it shares", "", "", scaled(counts["mtp"]), ""))
    return table(rows, "<<>>>")


def _memory(report: dict[str, Any]) -> str:
    config, cache, per_device = report["config"], report["cache"], report["memory_bytes_per_device"]
    train, devices, average = config["train"], math.prod(config["parallel"]["mesh"].values()), report["host_ema_bytes"]
    trained_on = f"at its peak, in micro-batches of {train['micro_batch_size']} x {train['sequence_length']} tokens"
    rows = [(f"memory per device, {devices} in all", "bytes", "of", "")]
    rows += [(item["kind"], gib(item["per_device"]), gib(item["whole"]), item["note"]) for item in report["memory"]]
    rows += [
        ("training", gib(report["training_bytes_per_device"]), "", trained_on),
        ("cache", gib(per_device["cache"]), "", f"bf16 latents for decoding, {cache['batch']} x {cache['length']} tokens"),
        ("host: moving average", gib(average), "", "float32" if average else "train.ema_decay is 0"),
    ]
    for policy, size in report["activation_bytes_by_remat"].items():
        rows.append((f"activations, remat {policy}", gib(size * config["parallel"]["mesh"]["pipe"] / devices), "", ""))
    return table(rows, "<>><")


def _flops(report: dict[str, Any]) -> str:
    flops = report["flops_per_token"]
    titles = {
        "products": "products with parameters",
        "attention": "attention, causal",
        "mtp_products": "MTP, products",
        "mtp_attention": "MTP, attention",
        "total": "total",
    }
    rows = [("training FLOPs a token", "")] + [(title, scaled(flops[name], giga="G")) for name, title in titles.items()]
    return table(rows, "<>")


def _cache(report: dict[str, Any]) -> str:
    cache, layers = report["cache"], report["config"]["model"]["num_hidden_layers"]
    rows = [("cache a token, bf16", "bytes", "numbers a layer")]
    for title, size in (("MLA latents", cache["bytes_per_token"]), ("MHA of the same heads", cache["mha_bytes_per_token"])):
        rows.append((title, f"{size:,}", f"{size // (2 * layers):,}"))
    rows.append(("ratio", f"{cache['mha_bytes_per_token'] / cache['bytes_per_token']:.1f}", ""))
    return table(rows, "<>>")


def _hours(report: dict[str, Any]) -> str:
    h800, run = report["h800"], report["run"]
    published = h800["published_utilisation"]
    rows = [
        ("training on H800", "", ""),
        ("tokens", scaled(h800["tokens"]), f"the run's {run['steps']:,} steps have {scaled(run['tokens'])}"),
        ("utilisation of BF16 peak", f"{h800['utilisation']:.1%}", f"V3's 180K hours a trillion tokens are {published:.1%}, or "
                                                                   f"{published / 2:.1%} of the FP8 peak"),
        ("GPU hours", f"{h800['hours']:,.1f}", f"{h800['hours_per_trillion_tokens']:,.0f} a trillion tokens"),
    ]  # fmt: skip
    return table(rows, "<><")


def scaled(count: float, giga: str = "B") -> str:
    """A count with the prefix that leaves one to three digits before the point: 671.03B."""
    for limit, suffix in ((1e12, "T"), (1e9, giga), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.2f}{suffix}"
    return f"{count:.0f}"


if __name__ == "__main__":
    cli.run(main)
