"""Plays pipeline schedules: draws one as a Gantt chart, and prints what all of them cost. Nothing is run on a device.

    uv run -m experiments.pipeline --P=8 --M=20
    uv run -m experiments.pipeline --P=4 --M=12 --schedule=zb1p --F=1 --B=2.2 --W=0.9 --figure=zb1p --json=zb1p.json

P ranks and M micro-batches, both even, M at least 2 P. Costs are in one unit of time; B is the full backward pass,
W the part of it that makes weight gradients. The figure becomes FIGURE.png and FIGURE.svg. The JSON holds for each
rank its operations in order: F0.3 is the forward pass of micro-batch 3 of direction 0 (rank 0 to rank P-1),
B a backward pass, I one for the input only, W one for the weights only, FB(F0.7,B1.3) two at the same time.
"""

from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.parallel.schedules import GENERATORS, Schedule, make_schedule
from dsv3_jax.parallel.simulate import Costs, Span, Timeline, simulate
from experiments import cli
from experiments.output import check_output, check_outputs, rendered, table

P = flags.DEFINE_integer("P", 8, "Pipeline ranks.")
M = flags.DEFINE_integer("M", 20, "Micro-batches of a step.")
SCHEDULE = flags.DEFINE_string("schedule", "dualpipe", f"The one to draw and to write: {', '.join(GENERATORS)}.")
COSTS = {
    "F": cli.define_float("F", 1.0, "Cost of a forward pass."),
    "B": cli.define_float("B", 2.0, "Cost of a full backward pass."),
    "W": cli.define_float("W", 1.0, "Cost of its weight part."),
    "FB": cli.define_float("FB", None, "Cost of a forward and a backward pass overlapped. Without it: F + B."),
    "communication": cli.define_float("communication", 0.0, "Time until a neighbour has what a rank computed."),
}
FIGURE = flags.DEFINE_string("figure", "pipeline", "Path of the picture, without .png and .svg.")
JSON = flags.DEFINE_string("json", None, "File to write the ranks' operations to.")

# Of each kind: its name, and its colours in direction 0 and direction 1 (Okabe and Ito's, and tints of them).
KINDS = {
    "F": ("forward", ("#0072B2", "#A6D3EE")),
    "B": ("backward", ("#00805D", "#9FDCC8")),
    "I": ("backward for input", ("#C98500", "#F8DC9C")),
    "W": ("backward for weights", ("#6b7280", "#D3D6DC")),
}
TITLES = {"gpipe": "GPipe", "1f1b": "1F1B", "zb1p": "ZB1P", "dualpipe": "DualPipe", "dualpipe_v": "DualPipeV"}
INK, IDLE = "#111827", "#f6f6f7"
MAX_WIDTH = 40.0  # inches of a figure
SIZES = (2, 4, 8, 16)  # ranks of the second table


def main() -> int:
    from dsv3_jax.training.metrics import write_atomically, write_json

    values = {name: flag.value for name, flag in COSTS.items()}
    costs = Costs(**values | {"FB": values["F"] + values["B"] if values["FB"] is None else values["FB"]})
    drawn = simulate(make_schedule(SCHEDULE.value, P.value, M.value), costs)
    for ending in (".png", ".svg"):
        check_output("--figure", FIGURE.value + ending)
    check_outputs(JSON)
    figure = draw(drawn)
    for ending in ("png", "svg"):
        write_atomically(Path(f"{FIGURE.value}.{ending}"), rendered(figure, ending))
    if JSON.value:
        write_json(Path(JSON.value), as_json(drawn.schedule))
    print(compare(P.value, M.value, costs) + "\n\n" + _over_sizes(costs))
    return 0


def as_json(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON holds it; `ranks` has one list of operations a rank."""
    return {
        "schedule": schedule.name,
        "P": schedule.n_ranks,
        "M": schedule.n_micro_batches,
        "ranks": [[str(operation) for operation in operations] for operations in schedule.ranks],
    }


def compare(ranks: int, micro_batches: int, costs: Costs) -> str:
    """A table of all schedules at one size. Raises ConfigError for a size that they cannot have."""
    rows = [(f"P = {ranks}, M = {micro_batches}", "time", "bubble", "share", "stages a rank", "activations")]
    for name in GENERATORS:
        schedule = make_schedule(name, ranks, micro_batches)
        timeline, scale = simulate(schedule, costs), schedule.n_stages // schedule.n_ranks
        # A stage of `v` is half of one of the others: it takes half the time, and holds half as much.
        time, bubble, peak = timeline.makespan / scale, max(timeline.bubbles) / scale, max(timeline.peak_activations) / scale
        rows.append((name, f"{time:g}", f"{bubble:g}", f"{timeline.bubble_share:.1%}", str(len(schedule.directions)), f"{peak:g}"))
    return table(rows, "<>>>>>")


def _over_sizes(costs: Costs) -> str:
    rows = [("share of idle time", "M", *GENERATORS)]
    for ranks in SIZES:
        for times in (2, 4, 8):
            shares = [simulate(make_schedule(name, ranks, times * ranks), costs).bubble_share for name in GENERATORS]
            rows.append((f"P = {ranks}" if times == 2 else "", str(times * ranks), *(f"{share:.1%}" for share in shares)))
    return table(rows, "<>" + ">" * len(GENERATORS))


def draw(timeline: Timeline) -> Any:
    """The timeline as a matplotlib Figure: a row for each rank, a box for each operation, with its micro-batch in it."""
    from matplotlib.figure import Figure

    schedule = timeline.schedule
    shortest = min(span.end - span.start for spans in timeline.ranks for span in spans if span.end > span.start)
    width = min(max(8.0, 0.225 * timeline.makespan / shortest + 1.0), MAX_WIDTH)
    figure = Figure(figsize=(width, 0.34 * schedule.n_ranks + 1.35), layout="constrained")
    ax = figure.subplots()
    narrowest = 0.1 * timeline.makespan / width  # that a number fits into
    for rank, spans in enumerate(timeline.ranks):
        ax.barh(rank, timeline.makespan, height=0.9, color=IDLE, zorder=0)  # what stays visible of it is the bubble
        for span in spans:
            _draw_span(ax, rank, span, numbered=span.end - span.start > narrowest)
    ax.set(xlim=(0, timeline.makespan), ylim=(schedule.n_ranks - 0.5, -0.5), xlabel="time")
    ax.set_yticks(range(schedule.n_ranks), [f"rank {rank}" for rank in range(schedule.n_ranks)])
    ax.tick_params(left=False, labelsize=8.5)
    ax.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(_title(timeline), x=0.008, ha="left", fontsize=12, fontweight="bold", color=INK)
    _legend(figure, timeline)
    return figure


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    size = f"{schedule.n_ranks} ranks, {schedule.n_micro_batches} micro-batches"
    return f"{TITLES[schedule.name]}: {size}, {timeline.bubble_share:.1%} idle"


def _draw_span(ax: Any, rank: int, span: Span, numbered: bool) -> None:
    """A box; of an overlapped pair the forward pass is its upper half and the backward pass its lower one."""
    passes, width = span.operation.passes, span.end - span.start
    height = 0.9 / len(passes)
    for i, one in enumerate(passes):
        middle = rank - 0.45 + height * (i + 0.5)
        color, ink = KINDS[one.kind][1][one.direction], ("white", INK)[one.direction]
        ax.barh(middle, width, left=span.start, height=height, color=color, edgecolor="white", linewidth=0.6, zorder=2)
        if numbered:
            size = 7.0 if len(passes) == 1 else 6.0
            ax.text(span.start + width / 2, middle, str(one.micro_batch), ha="center", va="center_baseline", fontsize=size, color=ink)


def _legend(figure: Any, timeline: Timeline) -> None:
    from matplotlib.patches import Patch

    used = {one.kind for spans in timeline.ranks for span in spans for one in span.operation.passes}
    directions = timeline.schedule.directions
    arrows = ("↓", "↑")  # ranks are drawn from the top
    patches = [
        Patch(facecolor=colors[d], label=f"{name} {arrows[d]}" if len(directions) == 2 else name)
        for kind, (name, colors) in KINDS.items()
        if kind in used
        for d in directions
    ]
    patches.append(Patch(facecolor=IDLE, edgecolor="#d1d5db", linewidth=0.6, label="idle"))
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), frameon=False, fontsize=8.5, handlelength=1.1)


if __name__ == "__main__":
    cli.run(main)
