"""A pipeline schedule as arrays: what each rank does, reads and receives in each tick.

The executor runs all ranks in step, one operation a tick, and what a rank computes in a tick its neighbour has in
the next. So the schedule is played with every operation as long as one tick, and the starts are the rows of the arrays.

Inputs and gradients that arrive, and what a forward pass keeps for the backward passes of its stage, lie in numbered slots
until their last use. A slot is used again as soon as it is free, so their number is that of the micro-batches alive at once,
and does not grow with M.
"""

import heapq
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dsv3_jax.parallel.schedules import Operation, Pass, Schedule, Seat
from dsv3_jax.parallel.simulate import Costs, Timeline, simulate

DISCARD, ZEROS = 0, 1  # slots: one that nobody reads; one that stays zero, for what no stage sends
FIRST_SLOT = {"activation": 2, "gradient": 2, "kept": 1}  # what is kept is there whenever it is read

Table = Int[np.ndarray, "ticks ranks"]


class Action(NamedTuple):
    """What a rank does in a tick, without the micro-batch: the kind and direction of each pass. () is idle."""

    passes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, operation: Operation) -> "Action":
        return cls(tuple((one.kind, one.direction) for one in operation.passes))


class Channel(NamedTuple):
    """A way that results travel: by so many ranks up (+1), down (-1), or not at all (0)."""

    payload: str  # activation | gradient | kept
    shift: int


class Operand(NamedTuple):
    """Where a pass finds what it works on: a table of all ranks and ticks, or one rank's entries in one tick."""

    micro_batch: Any  # of the batch
    activation: Any  # slot of the stage's input
    gradient: Any  # slot of the gradient of its output
    kept: Any  # slot of what the forward pass kept


class Ticks(NamedTuple):
    """A schedule in steps."""

    actions: list[Action]  # all that occur; the first is idle
    action: Table  # which of them
    operands: dict[str, Operand]  # forward, backward
    arrivals: dict[Channel, Table]  # slot for what comes in at the end of a tick
    slots: dict[str, int]  # of each payload, with those that are no value's


class _Lockstep(Costs):
    def of(self, operation: Operation) -> float:
        return 1.0


def lower(schedule: Schedule) -> Ticks:
    """The arrays of a schedule. Raises ScheduleError for one that cannot run."""
    timeline = simulate(schedule, _Lockstep())
    ticks, ranks = int(timeline.makespan), schedule.n_ranks
    fill = lambda value: np.full((ticks, ranks), value, np.int32)  # noqa: E731
    slot, slots = _allocate(timeline)
    actions = [Action(()), *sorted({Action.of(op) for ops in schedule.ranks for op in ops})]
    action = fill(0)
    operands = {role: Operand(fill(0), fill(ZEROS), fill(ZEROS), fill(DISCARD)) for role in ("forward", "backward")}
    arrivals: dict[Channel, Table] = {}
    for rank, spans in enumerate(timeline.ranks):
        for operation, start, _ in spans:
            at = int(start), rank
            action[at] = actions.index(Action.of(operation))
            for one in operation.passes:
                seat, operand = Seat(rank, one.direction), operands["forward" if one.kind == "F" else "backward"]
                operand.micro_batch[at] = schedule.batch_index(one.direction, one.micro_batch)
                operand.activation[at] = slot.get(("activation", seat, one.micro_batch), ZEROS)
                operand.gradient[at] = slot.get(("gradient", seat, one.micro_batch), ZEROS)
                operand.kept[at] = slot["kept", seat, one.micro_batch]
                for payload, target in _sent(schedule, rank, one):
                    table = arrivals.setdefault(Channel(payload, target.rank - rank), fill(DISCARD))
                    table[int(start), target.rank] = slot[payload, target, one.micro_batch]
    return Ticks(actions, action, operands, arrivals, slots)


def _sent(schedule: Schedule, rank: int, one: Pass) -> list[tuple[str, Seat]]:
    """What a pass sends on, and to which stage; what a forward pass keeps goes to its own."""
    seat = Seat(rank, one.direction)
    if one.kind == "F":
        sent = [("activation", schedule.after(seat)), ("kept", seat)]
    else:
        sent = [] if one.kind == "W" else [("gradient", schedule.before(seat))]
    return [(payload, target) for payload, target in sent if target is not None]


_Value = tuple[str, Seat, int]  # payload, the stage that receives it, micro-batch


def _allocate(timeline: Timeline) -> tuple[dict[_Value, int], dict[str, int]]:
    """A slot for every value that arrives somewhere, and how many slots of each payload the fullest rank needs."""
    slot: dict[_Value, int] = {}
    count = dict(FIRST_SLOT)
    lives = _lives(timeline)
    for payload, first in FIRST_SLOT.items():
        for rank in range(timeline.schedule.n_ranks):
            mine = sorted((life, value) for value, life in lives.items() if value[0] == payload and value[1].rank == rank)
            used: list[tuple[int, int]] = []  # (last use, slot)
            for (arrival, last_use), value in mine:
                # What arrives at the end of a tick may take the place of what was last read in that tick.
                slot[value] = heapq.heappop(used)[1] if used and used[0][0] <= arrival else first + len(used)
                heapq.heappush(used, (last_use, slot[value]))
            count[payload] = max(count[payload], first + len(used))
    return slot, count


def _lives(timeline: Timeline) -> dict[_Value, tuple[int, int]]:
    """Ticks in which each value arrives and is read for the last time."""
    arrival: dict[_Value, int] = {}
    last_use: dict[_Value, int] = {}
    for rank, spans in enumerate(timeline.ranks):
        for operation, start, _ in spans:
            for one in operation.passes:
                for payload in FIRST_SLOT:
                    value = payload, Seat(rank, one.direction), one.micro_batch
                    last_use[value] = max(last_use.get(value, 0), int(start))
                for sent in _sent(timeline.schedule, rank, one):
                    arrival[(*sent, one.micro_batch)] = int(start)
    return {value: (tick, last_use[value]) for value, tick in arrival.items()}
