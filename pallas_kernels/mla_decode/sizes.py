"""Sizes of the kernel, known without it: its import takes a second."""

import dataclasses

TILE = 64  # rows of queries of a block of threads: those of one wgmma


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the work is cut up; changes speed, never the result beyond the order of sums."""

    block: int = 32  # positions of a slot: 32 or 64
    stages: int = 4
    score_slots: int = 2  # blocks of P that wait for their values
    pairs: bool = True  # two tiles of a sequence, if it has an even number, share what is read: half of the L2 traffic
    registers: tuple[int, int, int] = (152, 168, 24)  # a thread of scores, of sums, of the producer; 512 with both of sums


DEFAULT = TuningConfig()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that all warpgroups agree on."""

    tokens: int  # queries of a sequence
    heads: int
    rank: int  # columns of c_kv
    rope: int  # columns of k_r
    page: int  # positions
    splits: int  # stretches of a sequence
    scale: float  # of scores, positive

    @property
    def tiles(self) -> int:
        """Tiles of 64 rows that one sequence has."""
        return -(-self.tokens * self.heads // TILE)

    @property
    def half(self) -> int:
        """Columns of one warpgroup of sums."""
        return self.rank // 2
