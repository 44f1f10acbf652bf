"""One training on several meshes of the devices here: the same losses, and speed, memory and collectives of each.

    uv run -m experiments.bench.meshes --config=configs/h200.py --config.model.num_hidden_layers=4 --steps=20 \\
        --variant='1 GPU' --variant='2 GPUs: parallel.mesh.gpu=2' --variant='ZeRO-1: parallel.mesh.data=2'

A variant is a name and the fields that it changes in the configuration. All train on the same rows of the text from the same
initial weights; the first is what the others are compared with. A micro-batch of a GPU's size is used best, so a variant on
more of them may take a larger train.micro_batch_size; train.batch_size should be equal. On GPUs the last two steps run under
the profiler, and --figures draws them.
"""

import ast
import dataclasses
import functools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.config import Config, ConfigError, check_override, from_dict, to_dict
from experiments import cli
from experiments.output import check_outputs, gib, table

CONFIG = cli.define_config()
VARIANTS = flags.DEFINE_multi_string("variant", None, "NAME, or 'NAME: FIELD=VALUE FIELD=VALUE'; again for every variant.", required=True)
STEPS = flags.DEFINE_integer("steps", 20, "Steps of each variant.", lower_bound=4)
HOST_DEVICES = flags.DEFINE_integer("host_devices", None, "Fake so many devices on this CPU.", lower_bound=1)
FIGURES = flags.DEFINE_string("figures", None, "Folder to draw the traces to, one .png a variant; made if it does not exist.")
JSON = flags.DEFINE_string("json", None, "File to write all numbers to, losses too.")
WARM = 2  # steps before the timed ones
TRACED = 2
KERNELS = 12  # of each variant, in the table


def main() -> int:
    config = cli.read_config(CONFIG)
    variants = dict(_variant(text, config) for text in VARIANTS.value)
    check_outputs(JSON)
    if HOST_DEVICES.value:
        cli.fake_devices(HOST_DEVICES.value)
    import jax

    from dsv3_jax.training.metrics import write_json

    report: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "variants": {}}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = ""
        for name, variant in variants.items():
            workdir = Path(folder) / name.replace("/", "-")
            data = dataclasses.replace(variant.data, tokenizer=variant.data.tokenizer or tokenizer)  # trained once
            report["variants"][name] = measure(name, dataclasses.replace(variant, data=data), STEPS.value, workdir)
            tokenizer = str(workdir / "tokenizer.json")
            print(f"{name}: done", flush=True)
            if JSON.value:  # after every variant: a long run that is cut short leaves what it has
                write_json(Path(JSON.value), report)
    print(render(report["variants"]))
    return 0


def _variant(text: str, config: Config) -> tuple[str, Config]:
    """Name and configuration of a --variant. Raises ConfigError."""
    name, _, fields = text.partition(":")
    changed = to_dict(config)
    for field in fields.split():
        path, equals, value = field.partition("=")
        if not equals:
            raise ConfigError("--variant", field, "must be FIELD=VALUE, e.g. parallel.mesh.gpu=2")
        check_override(path, value)
        *sections, last = path.split(".")
        functools.reduce(lambda node, section: node[section], sections, changed)[last] = _value(value)
    return name.strip(), from_dict(changed)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):  # a word
        return text


def measure(name: str, config: Config, steps: int, workdir: Path) -> dict[str, Any]:
    """Trains a variant for so many steps: losses, times, memory, and the collectives of its last steps."""
    import jax
    import numpy as np

    from dsv3_jax.training.trainer import Trainer
    from experiments.bench.collectives import collectives, totals
    from experiments.bench.hlo import parse
    from experiments.bench.trace import by_name, trace

    trainer = Trainer(config, workdir)
    trainer.compile()
    seconds, losses = [], []

    def advance() -> Any:
        metrics = trainer.advance().metrics
        losses.append(metrics.main.nll / metrics.main.tokens)
        return metrics

    for _ in range(steps - TRACED):
        started = time.perf_counter()
        jax.block_until_ready((advance(), trainer.state))
        seconds.append(time.perf_counter() - started)
    gpus = trace(lambda: [advance() for _ in range(TRACED)], workdir / "trace")
    if FIGURES.value and gpus:
        _draw(name, gpus, float(np.median(seconds[WARM:])))
    result = {
        "fields": {key: value for key, value in to_dict(config).items() if key in ("parallel", "precision")},
        "devices": config.parallel.mesh.devices,
        "losses": np.asarray(jax.device_get(losses), float).tolist(),
        "step_seconds": float(np.median(seconds[WARM:])),
        "tokens_per_second": config.train.batch_size * config.train.sequence_length / float(np.median(seconds[WARM:])),
        "compile_seconds": trainer.compile_seconds,
        "planned_bytes": _planned(trainer.train_step),
        "sent_bytes": totals(collectives(parse(trainer.train_step.as_text() or ""), dict(trainer.mesh.shape))),
        "trace": _traced(gpus),
        "kernels": {kind: ms / TRACED for kind, ms in by_name(gpus.values()).items()},
    }
    trainer.close()
    return result


def _planned(step: Any) -> int:
    plan = step.memory_analysis()
    return plan.temp_size_in_bytes + plan.argument_size_in_bytes


def _traced(gpus: Any) -> dict[str, float] | None:
    """Milliseconds of one step."""
    from experiments.bench.trace import overlap

    return {key: value / TRACED for key, value in overlap(gpus.values())._asdict().items()} if gpus else None


def _draw(name: str, gpus: Any, step_seconds: float) -> None:
    from experiments.bench.trace import draw

    folder = Path(FIGURES.value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '_').replace('/', '-')}.png"
    draw(gpus, f"{name}: the last step", step_seconds * 1e3).savefig(path, dpi=130)


def render(variants: dict[str, dict[str, Any]]) -> str:
    """Losses beside the first variant's, and speed."""
    return "\n\n".join("\n".join(part) for part in (_speed(variants), _collectives(variants), _kernels(variants)))


def _speed(variants: dict[str, dict[str, Any]]) -> Iterator[str]:
    first = next(iter(variants.values()))
    rows = [
        ("variant", "first loss", "last loss", "mean difference", "largest", "step", "tokens/s", "of linear", "plan a device", "compiled")
    ]
    for name, one in variants.items():
        apart = [abs(a - b) for a, b in zip(one["losses"], first["losses"], strict=True)]
        share = one["tokens_per_second"] / first["tokens_per_second"] * first["devices"] / one["devices"]
        rows.append((
            name, f"{one['losses'][0]:.5f}", f"{one['losses'][-1]:.5f}", f"{sum(apart) / len(apart):.5f}", f"{max(apart):.5f}",
            f"{one['step_seconds'] * 1e3:,.1f} ms", f"{one['tokens_per_second']:,.0f}", f"{share:.1%}", gib(one["planned_bytes"]),
            f"{one['compile_seconds']:.0f} s",
        ))  # fmt: skip
    yield table(rows, "<" + ">" * 9)
    yield "Losses in nats a token; differences from the first variant, over all steps. Of linear: tokens/s a device beside its."


def _collectives(variants: dict[str, dict[str, Any]]) -> Iterator[str]:
    header = ("a step, a device", "all-to-all sends", "takes", "rate", "hidden", "all collectives", "hidden", "any kernel")
    rows: list[Sequence[str]] = [header]
    for name, one in variants.items():
        sent, traced = sum(one["sent_bytes"].get("all-to-all", {}).values()), one["trace"]
        if traced is None:
            rows.append((name, gib(sent), *["-"] * 6))
            continue
        rate = f"{sent / traced['all_to_all'] / 1e6:.0f} GB/s" if sent else ""
        rows.append((
            name, gib(sent), f"{traced['all_to_all']:.1f} ms", rate, _share(traced["all_to_all_hidden"], traced["all_to_all"]),
            f"{traced['collectives']:.1f} ms", _share(traced["hidden"], traced["collectives"]), f"{traced['busy']:.1f} ms",
        ))  # fmt: skip
    yield table(rows, "<" + ">" * 7)
    yield "Times by the profiler, waiting for the other device included. Hidden: the share with another kernel beside it."


def _kernels(variants: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What the longest kernels of any variant take in all of them."""
    longest = sorted({kind for one in variants.values() for kind in list(one["kernels"])[:KERNELS]})
    order = sorted(longest, key=lambda kind: -max(one["kernels"].get(kind, 0.0) for one in variants.values()))
    if order:
        rows = [("ms a step", *variants)]
        rows += [(kind[:50], *(f"{one['kernels'].get(kind, 0.0):.1f}" for one in variants.values())) for kind in order]
        rest = [sum(ms for kind, ms in one["kernels"].items() if kind not in order) for one in variants.values()]
        yield table([*rows, ("the rest", *(f"{ms:.1f}" for ms in rest))], "<" + ">" * len(variants))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else ""


if __name__ == "__main__":
    cli.run(main, keeps_programs=False)
