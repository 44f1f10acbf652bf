"""Pipeline schedules as plain data: for each rank the ordered operations it runs (V3 sec. 3.2.1).

A *pass* is one micro-batch going through one stage once: forward `F`, full backward `B`, backward for the
input only `I`, backward for the weights only `W` (`I` then `W` make up a `B`; Zero Bubble, 2401.10241).
An operation of a rank is a pass, or a forward and a backward pass that run at the same time, `FB(F0.7,B1.3)`.
`F0.3` is the forward pass of micro-batch 3 of direction 0.

How stages lie on the ranks is the schedule's *layout*:

    one_way   rank i holds stage i                    GPipe, 1F1B, ZB1P
    two_way   rank i holds stages i and P-1-i         DualPipe: direction 0 enters at rank 0, direction 1 at rank
                                                      P-1; each has half of the micro-batches and all P stages
    v         rank i holds stages i and 2P-1-i        DualPipeV: every micro-batch goes down the ranks as
                                                      direction 0 and comes back as direction 1

Direction 0 always runs from rank 0 to rank P-1, direction 1 from rank P-1 to rank 0.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from dsv3_jax.config import ConfigError, nearest_name
from dsv3_jax.config_checks import check_layers, check_micro_batches, check_ranks


class Pass(NamedTuple):
    """One micro-batch through one stage of the rank that runs it."""

    kind: str  # F | B | I | W
    direction: int
    micro_batch: int  # within its direction

    @property
    def passes(self) -> tuple["Pass", ...]:
        return (self,)

    def __str__(self) -> str:
        return f"{self.kind}{self.direction}.{self.micro_batch}"


class Overlapped(NamedTuple):
    """A forward and a full backward pass of opposite directions in one operation: one's communication hides behind the other."""

    forward: Pass
    backward: Pass

    @property
    def passes(self) -> tuple[Pass, ...]:
        return (self.forward, self.backward)

    def __str__(self) -> str:
        return f"FB({self.forward},{self.backward})"


Operation = Pass | Overlapped


class Seat(NamedTuple):
    """One of the stages of one rank."""

    rank: int
    direction: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What every rank does, in order."""

    name: str
    layout: str  # one_way | two_way | v
    n_micro_batches: int  # M, of all directions together
    ranks: tuple[tuple[Operation, ...], ...]

    @property
    def n_ranks(self) -> int:
        return len(self.ranks)

    @property
    def n_stages(self) -> int:
        """Stages that a micro-batch goes through."""
        return 2 * self.n_ranks if self.layout == "v" else self.n_ranks

    @property
    def directions(self) -> range:
        return range(1 if self.layout == "one_way" else 2)

    def micro_batches(self) -> range:
        """Of one direction."""
        return range(self.n_micro_batches // 2 if self.layout == "two_way" else self.n_micro_batches)

    def batch_index(self, direction: int, micro_batch: int) -> int:
        """Which of the M micro-batches of the batch this is; direction 1 of `two_way` has the second half."""
        return micro_batch + (direction * len(self.micro_batches()) if self.layout == "two_way" else 0)

    def stage(self, seat: Seat) -> int:
        """The stage that a rank runs for a direction, from 0."""
        return seat.rank if seat.direction == 0 else self.n_stages - 1 - seat.rank

    def before(self, seat: Seat) -> Seat | None:
        """Where the input of a stage comes from; None for stage 0."""
        return self._at(self.stage(seat) - 1, seat.direction)

    def after(self, seat: Seat) -> Seat | None:
        """Where the output of a stage goes; None for the last one."""
        return self._at(self.stage(seat) + 1, seat.direction)

    def _at(self, stage: int, direction: int) -> Seat | None:
        if not 0 <= stage < self.n_stages:
            return None
        if self.layout == "v":
            direction = stage // self.n_ranks
        return Seat(stage if direction == 0 else self.n_stages - 1 - stage, direction)


def make_schedule(name: str, P: int, M: int) -> Schedule:
    """The schedule of that name for P ranks and M micro-batches. Raises ConfigError for P or M that are odd, or M below 2 P."""
    if name not in GENERATORS:
        raise ConfigError("schedule", name, f"{nearest_name(name, list(GENERATORS))} (one of {', '.join(GENERATORS)})")
    check_ranks(P)
    check_micro_batches(P, M)
    layout, generate = GENERATORS[name]
    return Schedule(name, layout, M, tuple(tuple(generate(rank, P, M)) for rank in range(P)))


def split_layers(n_layers: int, n_stages: int) -> list[range]:
    """The layers of each stage: in order, as many each as can be; what is left over goes one each to the first stages.

    The last stages are the shorter ones because the last of all runs the output head and the MTP modules as well.
    Raises ConfigError when there are fewer layers than stages.
    """
    check_layers(n_layers, n_stages)
    each, over = divmod(n_layers, n_stages)
    starts = [stage * each + min(stage, over) for stage in range(n_stages + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _gpipe(rank: int, P: int, M: int) -> list[Operation]:
    """All forward passes, then all backward passes (1811.06965)."""
    return [Pass(kind, 0, m) for kind in "FB" for m in range(M)]


def _one_f_one_b(rank: int, P: int, M: int) -> list[Operation]:
    """Forward passes until the first gradient comes back, then one backward for one forward (PipeDream-Flush, 2006.09503)."""
    ops = _Operations()
    ops.repeat(P - rank, "F0")
    ops.repeat(M - P + rank, "B0 F0")
    ops.repeat(P - rank, "B0")
    return ops.done


def _zb1p(rank: int, P: int, M: int) -> list[Operation]:
    """1F1B whose weight passes wait (ZB-H1, 2401.10241): rank i lets i of them wait, so that all ranks hold P activations."""
    ops = _Operations()
    steady = M - P + rank
    ops.repeat(P - rank, "F0")
    ops.repeat(rank, "I0 F0")
    ops.repeat(steady - rank, "I0 W F0")
    ops.repeat(P - rank, "I0 W")
    ops.repeat(rank, "W")
    return ops.done


def _dualpipe(rank: int, P: int, M: int) -> list[Operation]:
    """The two halves of the ranks mirror each other: what direction 0 is to the first, direction 1 is to the second."""
    return _eight_phases(min(rank, P - 1 - rank), P // 2, M // 2, flip=rank >= P // 2)


def _dualpipe_v(rank: int, P: int, M: int) -> list[Operation]:
    """The first half of a DualPipe of 2 P ranks and 2 M micro-batches; the second half is folded onto it."""
    return _eight_phases(rank, P, M, flip=False)


def _eight_phases(rank: int, half: int, n: int, flip: bool) -> list[Operation]:
    """DualPipe on one rank of a half: `rank` 0 is outermost, half - 1 the middle; n micro-batches a direction.

    Here direction 0 enters at this half's outer end, and so comes first. The rank nearest the middle splits its first
    F0 and B1: overlapped, B1 would keep the rank beyond the middle waiting for the F0.
    """
    ops, inner, outer = _Operations(flip), half - 1 - rank, rank + 1
    ops.repeat(2 * inner, "F0")  # 1: fill
    ops.repeat(outer, "F0 F1")  # 2: the other direction has arrived
    ops.repeat(inner, "I1 W F1")  # 3: its first gradients; input gradients first, because other ranks wait for them
    main = n - 2 * half + outer
    ops.repeat(1, "F0 B1 F1&B0" if inner == 0 else "F0&B1 F1&B0")  # 4: everything overlapped
    ops.repeat(main - 1, "F0&B1 F1&B0")
    ops.repeat(inner, "B1 F1&B0")  # 5: direction 0 has no forward passes left
    for k in range(2 * outer):  # 6: only backward passes; the second half of them leaves the weights for later
        ops.repeat(1, ("B" if k < outer else "I") + ("1" if k % 2 == 0 else "0"))
    ops.repeat(inner, "W I0")  # 7: weight passes fill the gaps between the last gradients
    ops.repeat(outer, "W")  # 8: and the end
    return ops.done


class _Operations:
    """The operations of one rank as they are listed; numbers micro-batches in the order they come.

    Written as words: F0, B1, I0, `F0&B1` (overlapped), and `W`, which takes the oldest I that still lacks one.
    """

    def __init__(self, flip: bool = False) -> None:
        self.done: list[Operation] = []
        self._flip = flip
        self._count: Counter[tuple[str, int]] = Counter()
        self._waiting: list[Pass] = []

    def repeat(self, times: int, words: str) -> None:
        for word in words.split() * times:
            passes = [self._next(part) for part in word.split("&")]
            self.done.append(Overlapped(*passes) if len(passes) == 2 else passes[0])

    def _next(self, word: str) -> Pass:
        if word == "W":
            return self._waiting.pop(0)._replace(kind="W")
        kind, direction = word[0], int(word[1]) ^ self._flip
        number = ("F" if kind == "F" else "B", direction)
        done = Pass(kind, direction, self._count[number])
        self._count[number] += 1
        if kind == "I":
            self._waiting.append(done)
        return done


GENERATORS: dict[str, tuple[str, Callable[[int, int, int], list[Operation]]]] = {
    "gpipe": ("one_way", _gpipe),
    "1f1b": ("one_way", _one_f_one_b),
    "zb1p": ("one_way", _zb1p),
    "dualpipe": ("two_way", _dualpipe),
    "dualpipe_v": ("v", _dualpipe_v),
}
