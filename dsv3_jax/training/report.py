"""The picture of a run: figures and one self-contained `report.html` from the files in its workdir.

Everything is read back from those files, so the report of a run in progress, of a finished run and of one
copied from another machine is made the same way. Parts whose data is not there are left out and named in a
note. Pages need no script and no network; colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import base64
import io
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from dsv3_jax.config import ConfigError
from dsv3_jax.training.metrics import LOAD_FILE, METRICS_FILE, read_jsonl, write_atomically

BLUE, VERMILION, GREEN, ORANGE, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#6b7280"
MAX_POINTS = 4000  # of a plotted line: more than its pixels
MAX_LOAD_COLUMNS = 256  # of a heat map
MAX_LOAD_PANELS = 12  # evenly spaced layers are shown beyond this


@dataclass(frozen=True)
class _Run:
    """The files of a workdir; what a run in progress has not written yet is empty."""

    config: dict[str, Any]
    summary: dict[str, Any]
    samples: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    loads: list[dict[str, Any]]

    def series(self, key: str) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """(tokens, value) of the steps that report `key`; null becomes NaN."""
        pairs = [(row["tokens"], row[key]) for row in self.rows if key in row]
        table = np.array(pairs, dtype=float).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def has(self, key: str) -> bool:
        return any(row.get(key) is not None for row in self.rows)

    def has_load(self) -> bool:
        return bool(self.loads) and bool(self.loads[-1]["layers"])

    def last(self, key: str) -> Any:
        """The newest reported value of `key`, None if there is none."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)


def write_report(workdir: Path) -> Path:
    """Writes `report/*.png` and `report.html` into the workdir and returns the page's path. Raises `ConfigError` for a damaged file."""
    run = _read(workdir)
    images = {name: (figure.get_suptitle(), _png(figure)) for name, figure in _figures(run).items()}
    (workdir / "report").mkdir(exist_ok=True)
    for name, (_, data) in images.items():
        write_atomically(workdir / "report" / f"{name}.png", data)
    page = workdir / "report.html"
    write_atomically(page, _render(workdir, run, images))
    return page


def figures(workdir: Path) -> dict[str, Figure]:
    """The report's figures by name, for a notebook; only those that the run has data for."""
    return _figures(_read(workdir))


def _read(workdir: Path) -> _Run:
    rows = read_jsonl(workdir / METRICS_FILE)
    summary = _read_json(workdir / "summary.json", {})
    if rows and summary.get("steps") != rows[-1]["step"]:
        summary = {}  # of an earlier, shorter run of this workdir that has been continued since
    samples = _read_json(workdir / "samples.json", [])
    return _Run(_read_json(workdir / "config.json", {}), summary, samples, rows, read_jsonl(workdir / LOAD_FILE))


def _read_json(path: Path, missing: Any) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.exists() else missing
    except ValueError as error:
        raise ConfigError(str(path), str(error), "is not JSON; repair or delete that file") from error


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


# Figures


def _figures(run: _Run) -> dict[str, Figure]:
    drawn: dict[str, tuple[bool, Callable[[_Run], Figure]]] = {
        "loss": (bool(run.rows), _loss),
        "validation": (run.has("val_bits_per_byte"), _validation),
        "schedule": (run.has("learning_rate"), _schedule),
        "expert_load": (run.has_load(), _expert_load),
        "max_vio": (run.has("max_vio"), _max_vio),
        "speed": (run.has("tokens_per_second"), _speed),
    }
    return {name: draw(run) for name, (available, draw) in drawn.items() if available}


def _titled(title: str, good: str, height: float) -> Figure:
    """An empty figure, `height` inches high, under a title and a line that says what good looks like."""
    figure = Figure(figsize=(6.4, height), layout="constrained")
    figure.suptitle(title, x=0.015, y=1 - 0.08 / height, ha="left", va="top", fontsize=13, fontweight="bold")
    figure.text(0.015, 1 - 0.34 / height, good, ha="left", va="top", fontsize=9.5, color=GREY)
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.58 / height))  # type: ignore[union-attr, call-arg]
    return figure


def _over_tokens(title: str, good: str, panels: int = 1, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Panels above one another that share an axis of tokens seen."""
    figure = _titled(title, good, height)
    axes = list(figure.subplots(panels, sharex=True, squeeze=False)[:, 0])
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#d1d5db", linewidth=0.6)
    axes[-1].set_xlabel("tokens seen")
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    axes[-1].xaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _smooth(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Exponential moving average over a sixtieth of the run, at most 50 steps, unbiased at its start; NaN is passed over."""
    decay = 1 - 1 / min(50.0, max(1.0, len(values) / 60))
    total, weight, smoothed = 0.0, 0.0, np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if not np.isnan(value):
            total, weight = decay * total + value, decay * weight + 1
            smoothed[i] = total / weight
    return smoothed


def _line(ax: Axes, x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], color: str, **style: Any) -> None:
    step = 1 + len(x) // MAX_POINTS
    marker = "o" if np.isfinite(y).sum() < 3 else ""
    ax.plot(x[::step], y[::step], color=color, marker=marker, **style)


def _curve(ax: Axes, run: _Run, key: str, color: str, label: str) -> None:
    """Each step faintly, the moving average over it."""
    x, y = run.series(key)
    _line(ax, x, y, color, linewidth=0.8, alpha=0.35)
    _line(ax, x, _smooth(y), color, linewidth=1.9, label=label)


def _points(ax: Axes, run: _Run, key: str, color: str, label: str, unit: Callable[[float], str]) -> None:
    """A value of each evaluation, the last one in figures."""
    x, y = run.series(key)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    ax.plot(x, y, color=color, marker="o", markersize=5, linewidth=1.4)
    ax.annotate(unit(y[-1]), (x[-1], y[-1]), (9, 0), textcoords="offset points", va="center", fontweight="bold", color=color)
    ax.set_ylabel(label)
    ax.set_xlim(0, x[-1] * 1.13)
    ax.margins(y=0.2)


def _loss(run: _Run) -> Figure:
    figure, (ax,) = _over_tokens("Loss", "good: falls steeply, then slowly; validation stays on the training curve", height=4.2)
    _curve(ax, run, "loss", BLUE, "main, next token")
    if run.has("mtp_loss"):
        _curve(ax, run, "mtp_loss", VERMILION, "MTP, the token after it")
    if run.has("val_loss"):
        ax.plot(*run.series("val_loss"), "D", color="black", markersize=5, label="validation, next token", zorder=5)
    skipped = [row["tokens"] for row in run.rows if row.get("skipped")]
    if skipped:
        ax.plot(skipped, [0.02] * len(skipped), "x", color=GREY, transform=ax.get_xaxis_transform(), label="skipped step (not finite)")
    vocabulary = run.config.get("model", {}).get("vocab_size")
    if vocabulary:
        ax.axhline(np.log(vocabulary), color=GREY, linestyle=":", label=f"uniform guess, log({vocabulary})")
    ax.set_ylabel("cross-entropy (nats a token)")
    ax.legend(frameon=False, fontsize=9.5)
    return figure


def _validation(run: _Run) -> Figure:
    panels = 2 if run.has("val_mtp_accuracy") else 1
    figure, axes = _over_tokens("Held-out text", "good: bits fall to the last evaluation; accuracy rises", panels, 2.4 + 1.4 * panels)
    _points(axes[0], run, "val_bits_per_byte", BLUE, "bits per byte", lambda value: f"{value:.3f}")
    if panels == 2:
        _points(axes[1], run, "val_mtp_accuracy", VERMILION, "second tokens\nthat MTP gets right", lambda value: f"{value:.1%}")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def _schedule(run: _Run) -> Figure:
    figure, (ax,) = _over_tokens("Schedule", "as configured: warm-up, constant, cosine, tail; the batch ramps up and stays")
    _line(ax, *run.series("learning_rate"), BLUE, linewidth=1.9)
    ax.set_ylabel("learning rate", color=BLUE)
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=True)
    if run.has("batch_size"):
        right = ax.twinx()
        right.spines[["top"]].set_visible(False)
        _line(right, *run.series("batch_size"), VERMILION, linewidth=1.9, linestyle="--", drawstyle="steps-post")
        right.set_ylabel("batch size (sequences)", color=VERMILION)
        right.set_ylim(0, 1.25 * (run.last("batch_size") or 1))
        right.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def _max_vio(run: _Run) -> Figure:
    figure, (ax,) = _over_tokens(
        "MaxVio, the imbalance of experts", "good: falls towards 0; at 1 the busiest expert gets twice its fair share"
    )
    _curve(ax, run, "max_vio", GREEN, "mean over MoE layers")
    ax.set_ylabel("max load / mean load - 1")
    ax.set_ylim(bottom=0)
    return figure


def _speed(run: _Run) -> Figure:
    figure, axes = _over_tokens("Throughput and gradient norm", "good: tokens/s stay level; the norm settles", 2, 4.6)
    _curve(axes[0], run, "tokens_per_second", BLUE, "")
    axes[0].set_ylabel("tokens / s")
    axes[0].set_ylim(bottom=0)
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
    _curve(axes[1], run, "grad_norm", VERMILION, "")
    axes[1].set_ylabel("global gradient norm\nbefore clipping")
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes[1].yaxis.set_minor_formatter(NullFormatter())
    clip = run.config.get("optimizer", {}).get("clip_norm")
    if clip:
        axes[1].axhline(clip, color=GREY, linestyle=":", label=f"clipped above {clip:g}")
        axes[1].legend(frameon=False, fontsize=9.5)
    return figure


def _spread(count: int, most: int) -> list[int]:
    """At most `most` indices of range(count), evenly spaced, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _expert_load(run: _Run) -> Figure:
    loads = [run.loads[i] for i in _spread(len(run.loads), MAX_LOAD_COLUMNS)]
    names = loads[-1]["layers"]
    shown = _spread(len(names), MAX_LOAD_PANELS)
    load_slt = np.array([row["load"] for row in loads], dtype=float)
    relative = load_slt * load_slt.shape[-1]  # 1: a fair share
    rows = -(-len(shown) // 2)
    some = "" if len(shown) == len(names) else f" ({len(shown)} of {len(names)} layers)"
    figure = _titled(f"Load of each expert{some}", "good: fades to no colour; blue experts are starved, red overloaded", 1.6 + 2.1 * rows)
    panels = figure.subplots(rows, min(2, len(shown)), sharex=True, sharey=True, squeeze=False)
    edges = _edges(np.array([row["step"] for row in loads], dtype=float))
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=2.0)
    for ax, index in zip(panels.flat, shown, strict=False):
        heat = ax.pcolorfast(edges, np.arange(relative.shape[-1] + 1) - 0.5, relative[:, index].T, cmap="RdBu_r", norm=norm)
        ax.set_title(names[index], loc="left", fontsize=10)
    for ax in panels.flat[len(shown) :]:
        ax.set_axis_off()
    _label_load_panels(figure, panels, heat)
    return figure


def _label_load_panels(figure: Figure, panels: np.ndarray, heat: Any) -> None:
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("expert", fontsize=10)
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[0, 0].yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar = figure.colorbar(heat, ax=panels, location="top", extend="max", aspect=45, pad=0.02)
    bar.set_label("load / fair share", fontsize=9.5)


def _edges(centres: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n+1"]:
    """Cell borders halfway between the centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


# Page


def si(value: float | int) -> str:
    """A count with three digits and k, M, B or T: 655360 -> '655k'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _mebibytes(count: float | int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float | int) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _headline(run: _Run) -> dict[str, Any]:
    """The summary, or what is known of it so far."""
    speeds = [row["tokens_per_second"] for row in run.rows if row.get("tokens_per_second") is not None]
    so_far = {
        "val_loss": run.last("val_loss"),
        "val_bits_per_byte": run.last("val_bits_per_byte"),
        "mtp_accuracy": run.last("val_mtp_accuracy"),
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "steps": run.last("step") or 0,
        "tokens": run.last("tokens") or 0,
        "skipped": sum(bool(row.get("skipped")) for row in run.rows),
        "peak_memory_bytes": None,
        "parameters": None,
        "seconds": None,
        "compile_seconds": None,
        "command": None,
        "continue_command": None,
    }
    return so_far | run.summary


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value)


def _render(workdir: Path, run: _Run, images: dict[str, tuple[str, bytes]]) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(si=si, size=_mebibytes, duration=_duration)
    template = resources.files("dsv3_jax.training").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        name=workdir.resolve().name,
        workdir=str(workdir),
        run=run,
        headline=_headline(run),
        figures=[(title, base64.b64encode(data).decode()) for title, data in images.values()],
        config={name: list(_flat(value if isinstance(value, dict) else {name: value})) for name, value in run.config.items()},
        present={path.name for path in workdir.iterdir()},
    )
