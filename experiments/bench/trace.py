"""What a profiler trace of GPUs says: what kernels take, and how much of the collectives' time other kernels run beside."""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from experiments.output import table

Spans = Float[np.ndarray, "n 2"]  # start and end, ms


class Kernels(NamedTuple):
    """Kernels of one GPU, by start."""

    names: list[str]
    spans: Spans

    def where(self, chosen: Callable[[str], bool]) -> Spans:
        return self.spans[[chosen(name) for name in self.names]].reshape(-1, 2)


def is_collective(name: str) -> bool:
    """Whether a kernel of this name is NCCL's."""
    return "nccl" in name.lower()


def is_all_to_all(name: str) -> bool:
    """Whether it sends and receives, as an all-to-all and a permutation do."""
    return is_collective(name) and "SendRecv" in name


def trace(run: Callable[[], Any], folder: Path) -> dict[str, Kernels]:
    """Kernels of every GPU while `run` runs, by the GPU's name; {} where there is none. Leaves the profile in `folder`."""
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(run())
    found = {}
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if plane.name.startswith("/device:GPU:") and (kernels := _kernels(plane)).names:  # a GPU may be idle
                found[plane.name.removeprefix("/device:")] = kernels
    return dict(sorted(found.items()))


def _kernels(plane: Any) -> Kernels:
    """Events of the GPU's streams; the profiler's other lines say the same of modules and steps."""
    events = [(e.start_ns / 1e6, e.end_ns / 1e6, e.name) for line in plane.lines if line.name.startswith("Stream") for e in line.events]
    events.sort()
    spans = np.array([event[:2] for event in events], float).reshape(-1, 2)
    return Kernels([name for *_, name in events], spans - (spans[0, 0] if len(spans) else 0))


def union(spans: Spans) -> Spans:
    """The same time as spans that do not touch, in order."""
    joined: list[list[float]] = []
    for start, end in sorted(spans.tolist()):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    return np.array(joined).reshape(-1, 2)


def length(spans: Spans) -> float:
    """Time that the spans cover, ms."""
    return float(np.diff(union(spans)).sum())


def both(a: Spans, b: Spans) -> float:
    """Time that a and b both cover, ms."""
    return length(a) + length(b) - length(np.concatenate([a, b]))


class Overlap(NamedTuple):
    """Means over GPUs, ms of the traced time."""

    busy: float  # any kernel
    collectives: float
    hidden: float  # of that, beside another kernel
    all_to_all: float
    all_to_all_hidden: float


def overlap(gpus: Iterable[Kernels]) -> Overlap:
    """How much of the collectives' time the GPUs computed beside. A collective also waits for the slower GPU; that time is in it."""
    rows = []
    for kernels in gpus:
        other = kernels.where(lambda name: not is_collective(name))
        sent, exchanged = kernels.where(is_collective), kernels.where(is_all_to_all)
        rows.append((length(kernels.spans), length(sent), both(sent, other), length(exchanged), both(exchanged, other)))
    return Overlap(*np.mean(rows, 0).tolist())


def _short(name: str) -> str:
    return re.sub(r"(_\d+)+(?=_|$)", "", re.split(r"[(<]", name)[0])


def by_name(gpus: Iterable[Kernels], kind: Callable[[str], str] = _short) -> dict[str, float]:
    """Time of kernels of one kind, a mean over GPUs, the longest first, ms. A name ends before its numbers and parameters."""
    sums: dict[str, float] = {}
    gpus = list(gpus)
    for kernels in gpus:
        for name, (start, end) in zip(kernels.names, kernels.spans.tolist(), strict=True):
            of = kind(name)
            sums[of] = sums.get(of, 0.0) + (end - start) / len(gpus)
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def traced(run: Callable[[], Any]) -> list[Kernels]:
    """Kernels of every GPU while `run` runs; [] without a GPU, where it is not called."""
    if jax.default_backend() != "gpu":
        return []
    with tempfile.TemporaryDirectory() as folder:
        return list(trace(run, Path(folder)).values())


def kernel_times(run: Callable[[], Any]) -> dict[str, float]:
    """`by_name` of the kernels of `run`; {} without a GPU, where it is not called."""
    return by_name(traced(run))


def kernel_table(title: str, times: dict[str, float], most: int = 24) -> str:
    """Kernels by name, ms and share of all: the longest, the rest in one, and the sum."""
    total, longest = sum(times.values()), list(times.items())[:most]
    longest += [("others", total - sum(ms for _, ms in longest)), ("all", total)]
    return table([(title, "ms", "of all"), *((name, f"{ms:.2f}", f"{ms / total:.1%}") for name, ms in longest)], "<>>")


def draw(gpus: dict[str, Kernels], title: str, longest: float) -> Any:
    """Two lanes a GPU, collectives above what is computed, of the last `longest` ms, as a matplotlib Figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.8 + 0.8 * len(gpus)), layout="constrained")
    ax = figure.subplots()
    end = max(float(kernels.spans.max()) for kernels in gpus.values())
    lanes = (
        ("all-to-all", "#C98500", is_all_to_all),
        ("other collectives", "#8C6BB1", lambda name: is_collective(name) and not is_all_to_all(name)),
        ("kernels", "#0072B2", lambda name: not is_collective(name)),
    )
    ticks = []
    for row, (gpu, kernels) in enumerate(gpus.items()):
        for lane, (label, color, chosen) in enumerate(lanes):
            y = 2.5 * row + (lane == 2)
            spans = kernels.where(chosen) - (end - longest)
            ax.broken_barh([(a, b - a) for a, b in spans.tolist() if b > 0], (y, 0.9), color=color, label=label if row == 0 else None)
        ticks.append((2.5 * row + 1, gpu))
    ax.set(xlim=(0, longest), xlabel="ms", title=title)
    ax.set_yticks(*zip(*ticks, strict=True))
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, -0.25))
    return figure
