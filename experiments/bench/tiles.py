"""Measures the table of `pallas_kernels/gemm/tiles.py` again: the time of a step and of the rest, for each large tile.

    uv run -m experiments.bench.tiles

Every candidate for dense FP8 products runs at shapes of different depth and width; the two numbers are fitted by least
squares to time = waves x (steps x step + fixed). Prints both, and how far the model is off. Needs a Hopper GPU.
"""

import functools

import numpy as np

from experiments import cli
from experiments.bench.timing import draw, kernel_seconds, require_hopper
from pallas_kernels.gemm.hopper import multiply
from pallas_kernels.gemm.product import GROUP, Product
from pallas_kernels.gemm.tiles import Candidate, candidates, in_bands, waves

SHAPES = [(4096, 4096, 7168), (4096, 7168, 2048), (4096, 32768, 512), (8192, 8192, 8192)]


def main() -> int:
    from pallas_kernels.backend import sm_count

    require_hopper()
    sms = sm_count()
    for candidate in candidates(Product()):
        times = [measured(candidate, shape, sms) for shape in SHAPES]
        step, fixed, off = fit([(waves(candidate.config, m, n, sms), -(-k // GROUP)) for m, n, k in SHAPES], times)
        c = candidate.config
        print(f"{c.block_m}x{c.block_n}: step {step:.0f} ns, fixed {fixed:.0f} ns, off by up to {off:.1%}", flush=True)
    return 0


def measured(candidate: Candidate, shape: tuple[int, int, int], sms: int) -> float:
    """Nanoseconds of one product."""
    m, n, k = shape
    operands = [draw(0, (m, k), "float8_e4m3fn"), draw(1, (k // GROUP, m), "float32")]
    operands += [draw(2, (n, k), "float8_e4m3fn"), draw(3, (-(-n // GROUP), k // GROUP), "float32")]
    run = functools.partial(multiply, Product(), in_bands(candidate.config, m, k), sm_count=sms)
    return kernel_seconds(run, operands, cold=True) * 1e9


def fit(sizes: list[tuple[int, int]], times: list[float]) -> tuple[float, float, float]:
    """Time of a step and of the rest, from (waves, steps) and times, and the largest relative deviation."""
    a = np.array([[w * steps, w] for w, steps in sizes], np.float64) / np.array(times)[:, None]
    (step, fixed), *_ = np.linalg.lstsq(a, np.ones(len(times)), rcond=None)
    return float(step), float(fixed), float(np.abs(a @ [step, fixed] - 1).max())


if __name__ == "__main__":
    cli.run(main)
