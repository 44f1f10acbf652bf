"""Plays a pipeline schedule with given costs: when each operation runs, where ranks wait, what they hold.

Each rank runs its operations in order, one at a time, each as soon as what it needs is there:

    F      the output of the stage before
    B, I   the rank's own F, and the gradient (B or I) of the stage after
    W      the rank's own I

Idle time on the rank that waits longest, without communication (V3 table 2; I = B - W):

    GPipe, 1F1B   (P-1)(F+B)
    ZB1P          (P-1)(F+B-2W)       while W <= F and W <= I: a weight pass then fits into every gap
    DualPipe      (P/2-1)(FB+F-2W)    while W <= I <= F and max(F,B) <= FB <= F+B; the paper writes it with F = I,
                                      as (P/2-1)(FB+B-3W)
    DualPipeV     that of a DualPipe of 2P ranks, in stages of half the size
"""

import dataclasses
from typing import NamedTuple

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.schedules import Operation, Overlapped, Pass, Schedule, Seat


class ScheduleError(ValueError):
    """A schedule that cannot run, or does not compute the step: names the rank and the operation."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Durations in one unit of time. B is the full backward pass, W its weight part, so the input part takes B - W."""

    F: float = 1.0
    B: float = 2.0
    W: float = 1.0
    FB: float = 3.0  # a forward and a backward pass overlapped; F + B: overlapping gains nothing
    communication: float = 0.0  # from the end of an operation until a neighbour can use what it computed

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0:
                raise ConfigError(field.name, getattr(self, field.name), "a duration must be a number, and not negative")
        if self.W > self.B:
            raise ConfigError("W", self.W, f"must not be above B = {self.B}: it is a part of the backward pass")

    def of(self, operation: Operation) -> float:
        if isinstance(operation, Overlapped):
            return self.FB
        return {"F": self.F, "B": self.B, "I": self.B - self.W, "W": self.W}[operation.kind]


class Span(NamedTuple):
    """An operation and when it runs."""

    operation: Operation
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A schedule as it was played."""

    schedule: Schedule
    ranks: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """Time from the first operation's start to the last one's end."""
        return max(spans[-1].end for spans in self.ranks)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Time that each rank does nothing."""
        return tuple(self.makespan - sum(span.end - span.start for span in spans) for spans in self.ranks)

    @property
    def bubble_share(self) -> float:
        """Idle time over all ranks' time."""
        return sum(self.bubbles) / (self.makespan * self.schedule.n_ranks)

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """Most micro-batch activations of a stage that each rank holds at once: from the start of F to the end of B or W.

        In units of the activations of one micro-batch on one of P stages; a stage of `v` is half of that.
        """
        return tuple(_peak(spans) for spans in self.ranks)


class _Key(NamedTuple):
    """What a pass makes: an output (F), a gradient of the input (B and I), or gradients of the weights (W and B)."""

    result: str
    seat: Seat
    micro_batch: int

    def __str__(self) -> str:
        kind = {"output": "F", "gradient": "B or I", "weights": "B or W"}[self.result]
        return f"{kind} {self.seat.direction}.{self.micro_batch} of rank {self.seat.rank}"


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Plays the schedule. Raises ScheduleError if a pass is missing, there twice, or needs one that can never come before it."""
    check_complete(schedule)
    costs = costs or Costs()
    ready: dict[_Key, float] = {}
    played: list[list[Span]] = [[] for _ in schedule.ranks]
    moved = True
    while moved:
        moved = False
        for rank, operations in enumerate(schedule.ranks):
            while len(played[rank]) < len(operations):
                operation = operations[len(played[rank])]
                start = _earliest(schedule, rank, operation, ready, costs)
                if start is None:
                    break
                start = max([start, *(span.end for span in played[rank][-1:])])
                span = Span(operation, start, start + costs.of(operation))
                played[rank].append(span)
                ready.update({key: span.end for one in operation.passes for key in _makes(rank, one)})
                moved = True
    _check_played(schedule, played, ready)
    return Timeline(schedule, tuple(map(tuple, played)))


def check_complete(schedule: Schedule) -> None:
    """Raises ScheduleError unless every rank runs, for each of its micro-batches, F once, and B once or I and W once."""
    wanted = {(d, m) for d in schedule.directions for m in schedule.micro_batches()}
    for rank, operations in enumerate(schedule.ranks):
        seen: set[Pass] = set()
        for one in (one for operation in operations for one in operation.passes):
            if one in seen:
                raise ScheduleError(f"rank {rank}: {one} is there twice; remove one")
            if (one.direction, one.micro_batch) not in wanted:
                raise ScheduleError(f"rank {rank}: {one} is of no micro-batch of this schedule; remove it")
            seen.add(one)
        for d, m in sorted(wanted):
            _check_micro_batch(rank, seen, d, m)


def _check_micro_batch(rank: int, seen: set[Pass], d: int, m: int) -> None:
    kinds = {kind for kind in "FBIW" if Pass(kind, d, m) in seen}
    if "B" in kinds and kinds & {"I", "W"}:
        raise ScheduleError(f"rank {rank}: B{d}.{m} is there twice, the second time as {'I' if 'I' in kinds else 'W'}{d}.{m}; remove one")
    needed = {"F", "I", "W"} if kinds & {"I", "W"} else {"F", "B"}
    for kind in sorted(needed - kinds):
        raise ScheduleError(f"rank {rank}: {kind}{d}.{m} is missing; add it")


def _needs(schedule: Schedule, rank: int, one: Pass) -> list[_Key]:
    seat, m = Seat(rank, one.direction), one.micro_batch
    if one.kind == "W":
        return [_Key("gradient", seat, m)]
    source = schedule.before(seat) if one.kind == "F" else schedule.after(seat)
    own = [] if one.kind == "F" else [_Key("output", seat, m)]
    return own + ([_Key("output" if one.kind == "F" else "gradient", source, m)] if source else [])


def _makes(rank: int, one: Pass) -> list[_Key]:
    results = {"F": ["output"], "B": ["gradient", "weights"], "I": ["gradient"], "W": ["weights"]}[one.kind]
    return [_Key(result, Seat(rank, one.direction), one.micro_batch) for result in results]


def _earliest(schedule: Schedule, rank: int, operation: Operation, ready: dict[_Key, float], costs: Costs) -> float | None:
    """When everything that an operation needs has arrived; None while some of it has not been played."""
    keys = [key for one in operation.passes for key in _needs(schedule, rank, one)]
    if any(key not in ready for key in keys):
        return None
    return max((ready[key] + (costs.communication if key.seat.rank != rank else 0.0) for key in keys), default=0.0)


def _check_played(schedule: Schedule, played: list[list[Span]], ready: dict[_Key, float]) -> None:
    """Raises ScheduleError with the ring of ranks that wait for one another, if an operation was never reached."""
    waits: dict[int, tuple[Operation, _Key]] = {}
    for rank, operations in enumerate(schedule.ranks):
        if len(played[rank]) < len(operations):
            operation = operations[len(played[rank])]
            waits[rank] = operation, next(k for one in operation.passes for k in _needs(schedule, rank, one) if k not in ready)
    if not waits:
        return
    ring = [min(waits)]
    while ring.count(ring[-1]) < 2:
        ring.append(waits[ring[-1]][1].seat.rank)
    parts = [f"rank {rank}: {waits[rank][0]} comes before {waits[rank][1]}" for rank in ring[ring.index(ring[-1]) : -1]]
    raise ScheduleError("; ".join(parts) + ", which it needs; change that order")


def _peak(spans: tuple[Span, ...]) -> int:
    """An operation frees what its backward pass held only at its end, so an overlapped pair counts both."""
    live = peak = 0
    for span in spans:
        kinds = [one.kind for one in span.operation.passes]
        live += kinds.count("F")
        peak = max(peak, live)
        live -= kinds.count("B") + kinds.count("W")
    return peak
