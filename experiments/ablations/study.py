"""What the ablations share: training variants of one configuration on the same text, from several seeds, and showing the result.

A workdir holds one JSON file a variant and seed, `result.json`, `table.md` and the plots. What is done is not trained again. Beside what
else is kept, as the tokenizer, a file NAME.made_from.json says what it was made from.
A seed sets the initial weights and the order of the text, alike for every variant, so variants can be compared seed by seed.
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
from jaxtyping import Array, Float, Int, UInt32
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import config_flags
from tqdm import trange

from dsv3_jax.config import Config, ConfigError, DataConfig, MeshConfig, PrecisionConfig, to_dict, validate
from dsv3_jax.model.transformer import Execution
from dsv3_jax.parallel.mesh import make_mesh, replicated
from dsv3_jax.training.corpus import open_corpus
from dsv3_jax.training.data import TrainLoader, validation_rows
from dsv3_jax.training.evaluate import EvalStep, evaluate
from dsv3_jax.training.metrics import write_json
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import plan_step
from dsv3_jax.training.state import TrainState, create_state
from dsv3_jax.training.step import Rates, TrainStep, jit_train_step, make_eval_step, make_train_step
from dsv3_jax.training.tokenizer import Vocabulary, load_or_train_tokenizer
from dsv3_jax.training.workdir import TOKENIZER_FILE, make_folder
from experiments import cli

flags.disclaim_key_flags()
_PLAIN = dataclasses.asdict(PrecisionConfig())
_STEPS = "Training steps of every variant, in the place of train.steps, which may not be set beside it."


class Curve(NamedTuple):
    """Training of one variant."""

    loss: Float[np.ndarray, " steps"]  # of the main head, nats a token
    val_loss: float
    measured: Mapping[str, np.ndarray]  # what a Watch measured, by name, its times first; empty without one


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, as a key of what is made from it once
class Text:
    """The text that all variants of a study see, in the same order."""

    corpus: Any
    tokenizer: Any
    vocabulary: Vocabulary


class Watch(NamedTuple):
    """What to measure of a state in training, `times` times evenly over the run and at last after its last step."""

    measure: Callable[[Config, TrainState, Text], Mapping[str, Any]]  # numbers and arrays, of one shape every time
    times: int = 1
    settings: Mapping[str, Any] = {}  # flags that `measure` follows, for JSON: what was measured with others is refused

    def steps(self, total: int) -> list[int]:
        """The numbers of the steps, from 1, that are measured after; fewer than `times` in a short run."""
        return sorted({max(1, round(total * i / self.times)) for i in range(1, self.times + 1)})


def define_flags(steps: int, least: int = 1, text: str = _STEPS) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """--steps, `least` or more, and --workdir."""
    return (
        flags.DEFINE_integer("steps", steps, text, lower_bound=least),
        flags.DEFINE_string("workdir", None, "Folder for results; made if it does not exist.", required=True),
    )


def define_seeds() -> flags.FlagHolder:
    """--seeds."""
    return flags.DEFINE_integer("seeds", 3, "Runs of every variant, from train.seed and data.seed on.", lower_bound=1)


def read_config(holder: flags.FlagHolder, steps: int) -> Config:
    """The configuration with that many steps, 0: with its own; set before it is frozen, because schedules follow the number of steps.

    Raises ConfigError where the command line sets them in the configuration too.
    """
    overrides = config_flags.get_override_values(flags.FLAGS[holder.name])
    if "train.steps" in overrides:
        raise ConfigError("config.train.steps", overrides["train.steps"], "a study trains for --steps; set that instead")
    if steps:
        holder.value.train.steps = steps
    return cli.read_config(holder)


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The configuration with some fields of its sections replaced, and checked again."""
    parts = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    result = dataclasses.replace(config, **parts)
    validate(result)
    return result


def open_text(config: Config, workdir: Path) -> Text:
    """Corpus and tokenizer; the tokenizer is trained once for a workdir. Raises ConfigError where it was trained for other settings."""
    make_folder(workdir)
    corpus = open_corpus(config.data)
    settings = {f"config.data.{field}": getattr(config.data, field) for field in ("tokenizer", "source", "held_out")}
    check_made_from(workdir / TOKENIZER_FILE, settings | {"config.model.vocab_size": config.model.vocab_size})
    tokenizer = load_or_train_tokenizer(workdir, config.data, config.model.vocab_size, corpus.train)
    return Text(corpus, tokenizer, Vocabulary.from_tokenizer(tokenizer, config.data))


def check_made_from(path: Path, settings: Mapping[str, Any]) -> None:
    """For what a workdir keeps from before the first result: notes beside it what it is made from, by flag, to be called before it is made.

    Raises ConfigError where `path` exists and was made from anything else.
    """
    note = path.with_name(f"{path.stem}.made_from.json")
    if not path.exists():
        write_json(note, settings)
        return
    if not note.exists():
        raise ConfigError("--workdir", str(path.parent), f"{path.name} does not say what it was made from; give a new --workdir")
    kept = json.loads(note.read_text())
    for field, value in settings.items():
        if kept.get(field) != value:
            raise ConfigError(field, value, f"{path} was made from {kept.get(field)!r}; give that value or a new --workdir")


def with_seed(config: Config, number: int) -> Config:
    """The configuration of the `number`th seed, from 0: other initial weights, and the text in another order."""
    return changed(config, train={"seed": config.train.seed + number}, data={"seed": config.data.seed + number})


def train_seeds(
    variants: Mapping[str, Config], seeds: int, workdir: Path, watch: Watch | None = None, text: Text | None = None
) -> dict[str, list[Curve]]:
    """Trains each variant from each of so many seeds; returns the curves of every seed by name. Seeds share compiled programs.

    text: what to train on; None: what the configuration names.
    """
    runs = {f"{name}-seed{number}": with_seed(config, number) for name, config in variants.items() for number in range(seeds)}
    curves = train_variants(runs, workdir, watch, text)
    return {name: [curves[f"{name}-seed{number}"] for number in range(seeds)] for name in variants}


def train_variants(variants: Mapping[str, Config], workdir: Path, watch: Watch | None = None, text: Text | None = None) -> dict[str, Curve]:
    """Trains each variant from its seed, on text in the order that its seed gives; returns the curves by name."""
    kept = check_kept(variants, workdir, watch)
    text = text or open_text(next(iter(variants.values())), workdir)
    return {name: kept.get(name) or train_variant(name, config, text, workdir, watch)[0] for name, config in variants.items()}


def check_kept(variants: Mapping[str, Config], workdir: Path, watch: Watch | None = None) -> dict[str, Curve]:
    """The curves that the workdir has, by name. Raises ConfigError if one of them is of another configuration."""
    paths = {name: workdir / f"{name}.json" for name in variants}
    return {name: _kept(variants[name], path, watch) for name, path in paths.items() if path.exists()}


def _kept(config: Config, path: Path, watch: Watch | None) -> Curve:
    kept = json.loads(path.read_text())
    if kept["config"] != to_dict(config):
        raise ConfigError("--workdir", str(path.parent), f"{path.name} is of another configuration; give a new --workdir")
    if kept.get("watch") != _watched(watch):
        remedy = f"{path.name} was measured with {kept.get('watch')}, not {_watched(watch)}; give a new --workdir"
        raise ConfigError("--workdir", str(path.parent), remedy)
    return Curve(np.array(kept["loss"]), kept["val_loss"], {key: np.array(value, np.float64) for key, value in kept["measured"].items()})


def _watched(watch: Watch | None) -> dict[str, Any] | None:
    return watch and {"times": watch.times, **watch.settings}


def train_variant(name: str, config: Config, text: Text, workdir: Path, watch: Watch | None = None) -> tuple[Curve, TrainState]:
    """Trains one variant, whether it is done or not, for a study that needs its weights too."""
    state, losses, measured = train(config, text, name, watch)
    curve = Curve(losses, evaluate_state(state, config, text), measured)
    write_json(workdir / f"{name}.json", {"config": to_dict(config), "watch": _watched(watch), **curve._asdict()})
    return curve, state


def train(
    config: Config, text: Text, name: str, watch: Watch | None = None, start: TrainState | None = None
) -> tuple[TrainState, Float[np.ndarray, " steps"], dict[str, np.ndarray]]:
    """Trains from `start`, None: from `train.seed`; returns the state, the loss of every step, and what was measured, with its `step`."""
    run, plain = config.train, changed(config, precision=_PLAIN)
    # Steps take what they are given, so they get a copy of `start`.
    state = _creator(_compiled_for(plain))(np.uint32(run.seed)) if start is None else jax.tree.map(jnp.copy, start)
    step = _train_step(_compiled_for(config), text.vocabulary.eos_id)
    loader = TrainLoader(text.corpus.train, text.tokenizer, text.vocabulary, config.data, run.sequence_length)
    most, tokens, losses = run.batch_size // run.micro_batch_size, 0, []
    watched, seen = watch.steps(run.steps) if watch else [], []
    for number in trange(1, run.steps + 1, desc=name, unit="step", disable=None):
        plan = plan_step(tokens, config)
        used, tokens = plan.batch_size // run.micro_batch_size, plan.tokens
        rows = loader.next_micro_batches(used, run.micro_batch_size, most)
        rates = Rates(*(jnp.float32(x) for x in (plan.learning_rate, plan.bias_update_speed, plan.mtp_loss_weight)))
        state, metrics = step(state, jnp.asarray(rows), jnp.int32(used), rates)
        losses.append(metrics.main.nll / metrics.main.tokens)  # stays on the device: the host does not wait for the step
        if watch and number in watched:
            seen.append({"step": number, **jax.device_get(watch.measure(config, state, text))})  # the next step takes the state
    loader.close()
    measured = {key: np.array([one[key] for one in seen], np.float64) for key in (seen[0] if seen else ())}
    return state, np.asarray(jax.device_get(losses), np.float64), measured


def evaluate_state(state: TrainState, config: Config, text: Text) -> float:
    """Validation loss, nats a token, computed without FP8 for every variant alike."""
    plain = _compiled_for(changed(config, precision=_PLAIN))
    return evaluate(
        _eval_step(plain, text.vocabulary.eos_id),
        state.params,
        state.router_bias,
        held_out_rows(config, text),
        config.train.micro_batch_size,
        text.vocabulary.byte_lengths,
    ).loss


def held_out_rows(config: Config, text: Text) -> Int[np.ndarray, "n row"]:
    """The rows that a validation loss is of, the same for every seed."""
    return _held_out_rows(text, config.train.sequence_length, config.train.eval_sequences)


@functools.cache
def _held_out_rows(text: Text, sequence_length: int, most: int) -> np.ndarray:
    return validation_rows(text.corpus.valid, text.tokenizer, text.vocabulary, sequence_length, most)


def _compiled_for(config: Config) -> Config:
    """The configuration without what enters a program as a value or not at all, so that runs which share a program find it again."""
    train = dataclasses.replace(config.train, seed=0)
    return dataclasses.replace(config, train=train, data=DataConfig(document_mask=config.data.document_mask))


@functools.cache
def _creator(config: Config) -> Callable[[np.uint32], TrainState]:
    def create(seed: UInt32[Array, ""]) -> TrainState:
        return create_state(config, make_optimizer(config.optimizer), seed=seed)

    return jax.jit(create, out_shardings=replicated(make_mesh(MeshConfig())))  # as the step leaves it: else the second step compiles anew


@functools.cache
def _train_step(config: Config, eos_id: int) -> TrainStep:
    step = make_train_step(config, Execution.of(config, eos_id), make_optimizer(config.optimizer))
    return jit_train_step(step, replicated(make_mesh(MeshConfig())))


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


def deviation(values: Sequence[float] | np.ndarray, axis: int = 0) -> np.ndarray:
    """Standard deviation over seeds, which lie along `axis`; 0 for one seed."""
    return np.std(values, axis, ddof=min(1, np.shape(values)[axis] - 1))


def mean_std(values: Sequence[float] | Float[np.ndarray, " seeds"], digits: int = 4) -> str:
    """Mean ± standard deviation over seeds, as a cell of a table; the value itself for one seed."""
    spread = f" ± {deviation(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def difference(ours: Float[np.ndarray, " seeds"], theirs: Float[np.ndarray, " seeds"]) -> str:
    """Of two variants, seed by seed: the mean, and in how many seeds ours is lower. Sharing text, they share much of the noise."""
    return f"{mean_std(ours - theirs)} (lower in {int((ours < theirs).sum())} of {len(ours)} seeds)"


def band(ax: Axes, x: Sequence[float] | np.ndarray, curves: Float[np.ndarray, "seeds n"], label: str, **style: Any) -> None:
    """Draws the mean of the curves, in a shade of one standard deviation over seeds to each side."""
    mean, spread = curves.mean(0), deviation(curves)
    (line,) = ax.plot(x, mean, label=label, linewidth=1.2, **style)
    ax.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def finish(workdir: Path, figure: Figure, table: str, verdict: str, result: Mapping[str, Any]) -> None:
    """Prints table and verdict, and leaves them in the workdir with the plot."""
    make_folder(workdir)
    figure.savefig(workdir / "plot.png", dpi=130)
    (workdir / "table.md").write_text(f"{table}\n\n{verdict}\n")
    write_json(workdir / "result.json", {**result, "verdict": verdict})
    print(f"{table}\n\n{verdict}\n{workdir / 'plot.png'}")
