"""What the ablations share: training variants of one configuration on the same text, and showing the result.

A workdir holds one JSON file a variant, `result.json`, `table.md` and the plots. A variant that is done is not trained again.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import trange

from dsv3_jax.config import Config, ConfigError, PrecisionConfig, to_dict, validate
from dsv3_jax.model.transformer import Execution
from dsv3_jax.training.corpus import open_corpus
from dsv3_jax.training.data import TrainLoader, validation_rows
from dsv3_jax.training.evaluate import EvalStep, evaluate
from dsv3_jax.training.metrics import write_json
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import plan_step
from dsv3_jax.training.state import TrainState, create_state
from dsv3_jax.training.step import Rates, make_eval_step, make_train_step
from dsv3_jax.training.tokenizer import Vocabulary, load_or_train_tokenizer
from experiments import cli

flags.disclaim_key_flags()
_PLAIN = dataclasses.asdict(PrecisionConfig())


class Curve(NamedTuple):
    """Training of one variant."""

    loss: Float[np.ndarray, " steps"]  # of the main head, nats a token
    val_loss: float


class Text(NamedTuple):
    """The text that all variants of a study see, in the same order."""

    corpus: Any
    tokenizer: Any
    vocabulary: Vocabulary


def define_flags(steps: int) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """--steps and --workdir."""
    return flags.DEFINE_integer("steps", steps, "Training steps of every variant.", lower_bound=1), define_workdir()


def define_workdir() -> flags.FlagHolder:
    """--workdir."""
    return flags.DEFINE_string("workdir", None, "Folder for results; made if it does not exist.", required=True)


def read_config(holder: flags.FlagHolder, steps: int) -> Config:
    """The configuration with that many steps; set before it is frozen, because schedules follow the number of steps."""
    holder.value.train.steps = steps
    return cli.read_config(holder)


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The configuration with some fields of its sections replaced, and checked again."""
    parts = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    result = dataclasses.replace(config, **parts)
    validate(result)
    return result


def open_text(config: Config, workdir: Path) -> Text:
    """Corpus and tokenizer; the tokenizer is trained once for a workdir."""
    workdir.mkdir(parents=True, exist_ok=True)
    corpus = open_corpus(config.data)
    tokenizer = load_or_train_tokenizer(workdir, config.data, config.model.vocab_size, corpus.train)
    return Text(corpus, tokenizer, Vocabulary.from_tokenizer(tokenizer, config.data))


def train_variants(variants: Mapping[str, Config], workdir: Path) -> dict[str, Curve]:
    """Trains each variant from the same seed on the same rows; returns the curves by name."""
    text = open_text(next(iter(variants.values())), workdir)
    return {
        name: _done(config, workdir / f"{name}.json") or train_variant(name, config, text, workdir)[0] for name, config in variants.items()
    }


def _done(config: Config, path: Path) -> Curve | None:
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    if kept["config"] != to_dict(config):
        raise ConfigError("--workdir", str(path.parent), f"{path.name} is of another configuration; give a new --workdir")
    return Curve(np.array(kept["loss"]), kept["val_loss"])


def train_variant(name: str, config: Config, text: Text, workdir: Path) -> tuple[Curve, TrainState]:
    """Trains one variant, whether it is done or not, for a study that needs its weights too."""
    state, losses = train(config, text, name)
    result = evaluate_state(state, config, text)
    write_json(workdir / f"{name}.json", {"config": to_dict(config), "loss": losses.tolist(), "val_loss": result})
    return Curve(losses, result), state


def train(config: Config, text: Text, name: str) -> tuple[TrainState, Float[np.ndarray, " steps"]]:
    """Trains from `train.seed`; returns the state and the loss of every step."""
    run, optimizer = config.train, make_optimizer(config.optimizer)
    state = _creator(changed(config, precision=_PLAIN))()
    step = jax.jit(make_train_step(config, Execution.of(config, text.vocabulary.eos_id), optimizer), donate_argnums=0)
    loader = TrainLoader(text.corpus.train, text.tokenizer, text.vocabulary, config.data, run.sequence_length)
    most, tokens, losses = run.batch_size // run.micro_batch_size, 0, []
    for _ in trange(run.steps, desc=name, unit="step", disable=None):
        plan = plan_step(tokens, config)
        used, tokens = plan.batch_size // run.micro_batch_size, plan.tokens
        rows = loader.next_micro_batches(used, run.micro_batch_size, most)
        rates = Rates(*(jnp.float32(x) for x in (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight)))
        state, metrics = step(state, jnp.asarray(rows), jnp.int32(used), rates)
        losses.append(metrics.main.nll / metrics.main.tokens)  # stays on the device: the host does not wait for the step
    loader.close()
    return state, np.asarray(jax.device_get(losses), np.float64)


def evaluate_state(state: TrainState, config: Config, text: Text) -> float:
    """Validation loss, nats a token, computed without FP8 for every variant alike."""
    plain = changed(config, precision=_PLAIN)
    rows = validation_rows(text.corpus.valid, text.tokenizer, text.vocabulary, config.train.sequence_length, config.train.eval_sequences)
    return evaluate(
        _eval_step(plain, text.vocabulary.eos_id),
        state.params,
        state.router_bias,
        rows,
        config.train.micro_batch_size,
        text.vocabulary.byte_lengths,
    ).loss


@functools.cache  # variants share what FP8 does not change, so that it is compiled once
def _creator(config: Config) -> Callable[[], TrainState]:
    return jax.jit(lambda: create_state(config, make_optimizer(config.optimizer)))


@functools.cache
def _eval_step(config: Config, eos_id: int) -> EvalStep:
    return jax.jit(make_eval_step(config, Execution.of(config, eos_id)))


def smoothed(values: Float[np.ndarray, " n"], decay: float = 0.9) -> Float[np.ndarray, " n"]:
    """Exponential moving average, as in the report's loss curves (V3 appendix B.1), corrected for its start."""
    out, average = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        average = decay * average + (1 - decay) * value
        out[i] = average / (1 - decay ** (i + 1))
    return out


def panels(title: str, count: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty plot with `count` panels below each other."""
    figure = Figure(figsize=(8, 3.4 * count), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    axes = figure.subplots(count, squeeze=False)[:, 0]
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def finish(workdir: Path, figure: Figure, table: str, verdict: str, result: Mapping[str, Any]) -> None:
    """Prints table and verdict, and leaves them in the workdir with the plot."""
    workdir.mkdir(parents=True, exist_ok=True)
    figure.savefig(workdir / "plot.png", dpi=130)
    (workdir / "table.md").write_text(f"{table}\n\n{verdict}\n")
    write_json(workdir / "result.json", {**result, "verdict": verdict})
    print(f"{table}\n\n{verdict}\n{workdir / 'plot.png'}")
