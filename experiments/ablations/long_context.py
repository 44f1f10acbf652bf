"""Longer contexts after training on short ones: YaRN in two phases, and linear interpolation (V3 sec. 4.3).

    uv run -m experiments.ablations.long_context --config=configs/study_needles.py --workdir=runs/long_context
    uv run -m experiments.ablations.long_context --config=configs/study_120m.py --steps=2000 --extension_steps=200 \\
        --config.train.sequence_length=256 --config.train.batch_size=32 --config.train.batch_size_start=32 \\
        --config.train.micro_batch_size=32 --config.data.fim_rate=0 --workdir=runs/long_context-gpu

Trains on rows of train.sequence_length, then on rows 8 and 32 times as long with YaRN of that factor, as V3 went from 4K to 32K
and 128K; and, from the same weights, on rows 4 times as long with positions interpolated linearly, as DeepSeek did before. The test is
a needle in a haystack: the word of a line that stands at some depth of a text. At this size a model learns such a look-up only from a
synthetic task mixed into its text (`needles.py`). Published: V3 finds the needle at every depth up to 128K tokens.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.training.state import TrainState
from experiments import cli
from experiments.ablations import study
from experiments.ablations.extension import extended
from experiments.ablations.needles import WithNeedles, choose_words, make_haystacks
from experiments.ablations.scoring import score_tokens
from experiments.ablations.texts import characters_per_token, pieces, trained_on

CONFIG = cli.define_config()
STEPS, WORKDIR = study.define_flags(steps=1000)
SEEDS = study.define_seeds()
EXTENSION = flags.DEFINE_integer("extension_steps", 60, "Training steps of each phase of an extension.", lower_bound=1)
LENGTHS = flags.DEFINE_list("lengths", ["1", "4", "8", "32"], "Lengths of haystacks, in multiples of train.sequence_length.")
TRIALS = flags.DEFINE_integer("trials", 16, "Haystacks of each length and depth, for every seed.", lower_bound=1)

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
Haystacks = Int[np.ndarray, "n t"]  # of one length
BEFORE, LINEAR, PHASE_1, PHASE_2 = MODELS = ("before", "linear x4", "YaRN x8", "YaRN x32")


class Task(NamedTuple):
    """What is the same for all models: words of the needles, and how many characters a token has."""

    words: list[str]
    characters: float

    def text(self, text: study.Text, length: int) -> study.Text:
        """The training text with needles, in pieces of twice `length` tokens: most rows lie in one, and can repeat from end to end."""
        return trained_on(text, WithNeedles(pieces(text.corpus.train, int(2 * length * self.characters)), self.words))


def main() -> int:
    config, workdir = study.read_config(CONFIG, STEPS.value), Path(WORKDIR.value)
    multiples, short = _multiples(), config.train.sequence_length
    lengths, text = [multiple * short for multiple in multiples], study.open_text(config, workdir)
    task = Task(choose_words(text.tokenizer), characters_per_token(text))
    haystacks = [make_haystacks(text, task.words, multiple, short, DEPTHS, TRIALS.value) for multiple in multiples]
    settings = {"lengths": lengths, "trials": TRIALS.value, "extension_steps": EXTENSION.value}
    watch = study.Watch(functools.partial(measure, text, task, haystacks), settings=settings)
    curves = study.train_seeds({"short": config}, SEEDS.value, workdir, watch, task.text(text, short))["short"]
    found = {name: np.stack([curve.measured[name][-1] for curve in curves]) for name in MODELS}
    header = ["model", *(f"{length} tokens" for length in lengths)]
    rows = [[name, *(study.mean_std(100 * cell, 0) for cell in grids.mean(2).T)] for name, grids in found.items()]
    result = {"found": {name: grids.tolist() for name, grids in found.items()}, "depths": DEPTHS, "lengths": lengths}
    figure = _heat_maps(found, lengths)
    study.finish(workdir, figure, study.markdown(header, rows), _verdict(found, short, lengths), result)
    return 0


def _multiples() -> list[int]:
    if not LENGTHS.value or not all(multiple.isdecimal() and int(multiple) for multiple in LENGTHS.value):
        raise ConfigError("--lengths", ",".join(LENGTHS.value), "must be whole numbers from 1, with commas between them")
    return [int(multiple) for multiple in LENGTHS.value]


def measure(
    text: study.Text, task: Task, haystacks: list[Haystacks], config: Config, state: TrainState, _: study.Text
) -> dict[str, Float[np.ndarray, "lengths depths"]]:
    """Extends a trained model each way; the share of needles that each model finds."""
    grids = {BEFORE: find(text, haystacks, config, state)}

    def extend(name: str, start: TrainState, kind: str, factor: int) -> TrainState:
        longer = extended(config, kind, factor, EXTENSION.value)
        made = study.train(longer, task.text(text, longer.train.sequence_length), name, start=start)[0]
        grids[name] = find(text, haystacks, longer, made)
        return made

    extend(LINEAR, state, "linear", 4)
    extend(PHASE_2, extend(PHASE_1, state, "yarn", 8), "yarn", 32)
    return {name: grids[name] for name in MODELS}


def find(text: study.Text, haystacks: list[Haystacks], config: Config, state: TrainState) -> Float[np.ndarray, "lengths depths"]:
    """Share of haystacks whose needle's word has the highest score of all tokens, for each length and depth."""
    shares = []
    for rows in haystacks:
        at = np.full((len(rows), 1), rows.shape[1] - 1)
        hits = score_tokens(config, state, rows, at, text.vocabulary.eos_id, config.train.batch_size * config.train.sequence_length).hit
        shares.append(hits.reshape(len(DEPTHS), TRIALS.value).mean(1))
    return np.array(shares)


def _heat_maps(found: dict[str, np.ndarray], lengths: list[int]) -> Figure:
    """A map for each model: depth down, length across, the mean over seeds."""
    figure = Figure(figsize=(3.4 * len(found), 3.2), layout="constrained")
    figure.suptitle("Needles found, %", x=0.01, ha="left", fontweight="bold")
    for ax, (name, grids) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        values = 100 * grids.mean(0).T
        ax.imshow(values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
        for row, column in np.ndindex(*values.shape):
            ax.text(column, row, f"{values[row, column]:.0f}", ha="center", va="center", fontsize=7)
        ax.set_title(name)
        ax.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
        ax.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
        ax.set_xlabel("tokens")
    return figure


def _verdict(found: dict[str, np.ndarray], trained: int, lengths: list[int]) -> str:
    longest = {BEFORE: 1, LINEAR: 4, PHASE_1: 8, PHASE_2: 32}

    def upto(name: str, multiple: int) -> str:
        inside = [i for i, length in enumerate(lengths) if length <= multiple * trained]
        return f"{found[name][:, inside].mean():.0%}" if inside else "none tried"

    own = ", ".join(f"{name} {upto(name, longest[name])}" for name in MODELS)
    return (
        f"Found within the length that each was trained on: {own}; without extension {found[BEFORE].mean():.0%} over all lengths up to "
        f"{max(lengths)} tokens. Published: V3 finds needles at every depth up to 128K tokens, after two phases of YaRN."
    )


if __name__ == "__main__":
    cli.run(main)
