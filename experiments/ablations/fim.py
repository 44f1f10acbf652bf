"""Fill in the middle: infilling with and without it in the training text, and the next-token loss (V3 sec. 4.1, 2207.14255).

    uv run -m experiments.ablations.fim --config=configs/tiny.py --config.train.sequence_length=128 \\
        --config.model.num_nextn_predict_layers=0 --workdir=runs/fim
    uv run -m experiments.ablations.fim --config=configs/study_120m.py --steps=2000 --workdir=runs/fim-gpu

Trains with each rate of --rates on text cut into pieces that fit a row: a middle is only of use in one row with what surrounds it. Then
takes a line out of held-out pieces and scores it twice: with prefix and suffix in PSM order, and after the prefix alone, which is
all that a model without FIM can use. A line is right where each of its tokens has the highest score, as greedy decoding would give it.
Published: at a rate of 0.1 no harm to next-token prediction.
"""

import functools
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.training.state import TrainState
from experiments import cli
from experiments.ablations import study
from experiments.ablations.infill import Problems, make_problems
from experiments.ablations.scoring import score_tokens
from experiments.ablations.texts import characters_per_token, pieces, trained_on
from experiments.output import panels

CONFIG = cli.define_config()
STEPS, WORKDIR = study.define_flags(steps=150)
SEEDS = study.define_seeds()
RATES = flags.DEFINE_list(
    "rates", ["0", "0.1", "0.5"], "Shares of pieces in FIM order, one a variant; the first is what others compare with."
)
LINES = flags.DEFINE_integer("lines", 256, "Most held-out lines to fill in.", lower_bound=1)

FIGURES = ("tokens", "lines", "ends", "nll", "prefix_tokens", "prefix_lines", "prefix_nll")  # `prefix_`: after the prefix alone


def main() -> int:
    base, workdir = study.read_config(CONFIG, STEPS.value), Path(WORKDIR.value)
    variants = {f"rate-{rate}": study.changed(base, data={"fim_rate": rate}) for rate in _rates()}
    text = study.open_text(max(variants.values(), key=lambda config: config.data.fim_rate), workdir)
    size = int(base.train.sequence_length * characters_per_token(text))
    cut = trained_on(text, pieces(text.corpus.train, size))
    problems = make_problems(text, pieces(text.corpus.valid, size), base.train.sequence_length, LINES.value)
    watch = study.Watch(functools.partial(measure, problems), settings={"lines": LINES.value})
    curves = study.train_seeds(variants, SEEDS.value, workdir, watch, cut)
    losses = {name: np.array([curve.val_loss for curve in of_seeds]) for name, of_seeds in curves.items()}
    figures = {name: {key: np.array([c.measured[key][-1] for c in of_seeds]) for key in FIGURES} for name, of_seeds in curves.items()}
    lists = {name: {key: values.tolist() for key, values in of.items()} for name, of in figures.items()}
    result = {"val_loss": {name: values.tolist() for name, values in losses.items()}, "figures": lists, "problems": len(problems[0].rows)}
    study.finish(workdir, _plot(curves, figures), _table(losses, figures), _verdict(losses, figures), result)
    return 0


def _rates() -> list[float]:
    try:
        rates = [float(rate) for rate in RATES.value]
    except ValueError:
        rates = []
    if len(set(rates)) < 2:
        raise ConfigError(
            "--rates", ",".join(RATES.value), "must be at least two different numbers from 0 to below 1, with commas between them"
        )
    return rates


def measure(problems: tuple[Problems, Problems], config: Config, state: TrainState, text: study.Text) -> dict[str, float]:
    """`FIGURES` of a model: share of tokens, of whole lines and of ends of the middle that are right, nats a token."""
    figures: dict[str, float] = {}
    for prefix, (rows, at, counts, ends) in zip(("", "prefix_"), problems, strict=True):
        tokens = config.train.micro_batch_size * config.train.sequence_length
        nll, hit = score_tokens(config, state, rows, at, text.vocabulary.eos_id, tokens)
        figures[f"{prefix}tokens"] = hit[counts].mean()
        figures[f"{prefix}lines"] = (hit | ~counts).all(1).mean()
        figures[f"{prefix}nll"] = nll[counts].mean()
        figures[f"{prefix}ends"] = hit[np.arange(len(ends)), ends].mean()
    return {name: figures[name] for name in FIGURES}  # a text does not end after the prefix alone, so that end says nothing


def _table(losses: dict[str, np.ndarray], figures: dict[str, dict[str, np.ndarray]]) -> str:
    first = next(iter(losses))
    percent = lambda values: study.mean_std(100 * values, 1)  # noqa: E731
    rows = [
        [
            name.removeprefix("rate-"),
            study.mean_std(losses[name]),
            "" if name == first else study.difference(losses[name], losses[first]),
            *(percent(of[key]) for key in ("tokens", "prefix_tokens", "lines", "prefix_lines", "ends")),
            *(study.mean_std(of[key]) for key in ("nll", "prefix_nll")),
        ]
        for name, of in figures.items()
    ]
    header = ["FIM rate", "validation loss", f"minus that of {first.removeprefix('rate-')}", "tokens right, %", "prefix alone",
              "lines right, %", "prefix alone", "ends right, %", "nats a token", "prefix alone"]  # fmt: skip
    return study.markdown(header, rows)


def _plot(curves: dict[str, list[study.Curve]], figures: dict[str, dict[str, np.ndarray]]) -> Figure:
    figure, (losses, infill) = panels("Fill in the middle", 2)
    for name, of_seeds in curves.items():
        smooth = np.stack([study.smoothed(curve.loss) for curve in of_seeds])
        study.band(losses, np.arange(1, smooth.shape[1] + 1), smooth, name.replace("-", " "))
    losses.set(xlabel="step", ylabel="training loss, nats (EMA 0.9)")
    losses.legend()
    places, kinds = np.arange(len(figures)), (("tokens", "prefix, suffix"), ("prefix_tokens", "prefix alone"))
    for shift, (key, label) in zip((-0.2, 0.2), kinds, strict=True):
        values = 100 * np.stack([of[key] for of in figures.values()])
        infill.bar(places + shift, values.mean(1), 0.38, yerr=study.deviation(values, axis=1), label=label)
    infill.set_xticks(places, [name.replace("-", " ") for name in figures])
    infill.set(ylabel="tokens of a held-out line right, %")
    infill.legend()
    return figure


def _verdict(losses: dict[str, np.ndarray], figures: dict[str, dict[str, np.ndarray]]) -> str:
    without, *others = figures
    best = study.mean_std(100 * figures[without]["prefix_tokens"], 1)
    tokens = {name: study.mean_std(100 * figures[name]["tokens"], 1) for name in others}
    infilled = "; ".join(f"{name}: {tokens[name]} %, validation loss {study.difference(losses[name], losses[without])}" for name in others)
    return (
        f"Without FIM ({without}) {best} % of the tokens of a line are right after its prefix. With prefix and suffix, {infilled} against "
        f"{without}. Published: FIM at rate 0.1 does not harm next-token prediction."
    )


if __name__ == "__main__":
    cli.run(main)
