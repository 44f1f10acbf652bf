"""Into how many stretches the positions of every sequence are cut, so that a few long sequences keep all multiprocessors busy."""

# Nanoseconds, fitted to the times in docs/kernels.md (H200).
_STEP = 1450  # a block of 32 positions
_FIXED = 5500  # a block of threads: launch, queries, output
_MERGE = 4000  # the second operation, apart from its bytes
_BYTES = 4200  # a nanosecond, of the whole GPU
_POSITIONS = 32
_WAVES = 4  # rounds over the multiprocessors; more only add to what is merged
_LEAST = 2  # blocks of positions that are worth a block of threads


def choose(rows: int, tiles: int, rank: int, longest: int, sm_count: int) -> int:
    """The number of stretches with the least modelled time: `rows` sequences of up to `longest` positions, `tiles` of 64 queries each."""
    blocks = -(-longest // _POSITIONS)
    most = max(blocks // _LEAST, 1)
    possible = range(1, min(most, max(_WAVES * sm_count // (rows * tiles), 1)) + 1)
    return min(possible, key=lambda splits: modelled_time(splits, rows * tiles, rank, blocks, sm_count))


def modelled_time(splits: int, units: int, rank: int, blocks: int, sm_count: int) -> float:
    """Nanoseconds. `units`: tiles of queries of all sequences; `blocks`: of positions of the longest one."""
    waves = -(-units * splits // sm_count)
    merge = _MERGE + splits * units * 64 * rank * 4 * 2 / _BYTES if splits > 1 else 0.0
    return waves * (-(-blocks // splits) * _STEP + _FIXED) + merge
