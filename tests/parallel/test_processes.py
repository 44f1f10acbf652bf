"""Which rows a process feeds to its devices."""

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.parallel.processes import part_of


def owners(processes: int, pipe: int, rows: int) -> np.ndarray:
    """Process of each device, as JAX numbers devices: those of a process one after another."""
    return np.repeat(np.arange(processes), pipe * rows // processes).reshape(pipe, rows)


@pytest.mark.parametrize(
    ("processes", "pipe", "rows", "expected"),
    [
        (1, 1, 8, [(0, 1)]),
        (2, 1, 8, [(0, 2), (1, 2)]),
        (2, 2, 4, [(0, 1), (0, 1)]),  # each a stage, with all rows
        (4, 2, 4, [(0, 2), (1, 2), (0, 2), (1, 2)]),  # each half of the rows of a stage
        (2, 4, 2, [(0, 1), (0, 1)]),  # each two stages
    ],
)
def test_part_of_the_batch(processes, pipe, rows, expected):
    assert [part_of(owners(processes, pipe, rows), i) for i in range(processes)] == expected


def test_devices_without_whole_parts_are_refused():
    with pytest.raises(ConfigError, match=r"config.parallel.mesh = 6: data x node x gpu are 6 devices"):
        part_of(owners(3, 2, 6), 1)  # rows 4 and 5 of one stage, 0 and 1 of the next
