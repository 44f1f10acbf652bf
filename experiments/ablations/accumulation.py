"""What a short running sum in the tensor core costs, and how often it must be emptied (V3 sec. 3.3.2).

    uv run -m experiments.ablations.accumulation --workdir=runs/accumulation

Simulated: products of E4M3 numbers, a running sum of --bits bits, added to a float32 sum every N_C elements.
Published: about 2 % maximum relative error at K = 4096 without, cured by N_C = 128.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags

from dsv3_jax.precision.formats import E4M3
from dsv3_jax.precision.matmul import simulated_dot
from experiments import cli
from experiments.ablations import study
from experiments.output import panels

STEPS, WORKDIR = study.define_flags(steps=4, text="Pairs of random matrices that an error is the mean over.")
BITS = flags.DEFINE_integer("bits", 14, "Bits of the running sum.", lower_bound=2, upper_bound=24)
ROWS = flags.DEFINE_integer("rows", 32, "The matrices have so many rows and columns.", lower_bound=1)
LARGEST_K = flags.DEFINE_integer("largest_k", 4096, "Longest sum.", lower_bound=128)
INTERVALS: tuple[int | None, ...] = (32, 64, 128, 256, None)


def main() -> int:
    lengths = [k for k in (128, 256, 512, 1024, 2048, 4096, 8192, 16384) if k <= LARGEST_K.value]
    errors = {interval: [sum_errors(k, interval, BITS.value, ROWS.value, STEPS.value) for k in lengths] for interval in INTERVALS}
    figure, (largest, typical) = panels(f"Running sum of {BITS.value} bits", 2)
    for interval, values in errors.items():
        label = "never" if interval is None else f"N_C = {interval}"
        largest.loglog(lengths, [value[0] for value in values], "o-", label=label, base=2)
        typical.loglog(lengths, [value[1] for value in values], "o-", label=label, base=2)
    largest.set(ylabel="largest error of a batch / its rms, %")
    typical.set(ylabel="rms error / rms, %", xlabel="K")
    largest.legend()
    header = ["N_C", *(f"K = {k}" for k in lengths)]
    rows = [["never" if i is None else str(i), *(f"{v[0]:.3f} % ({v[1]:.4f} %)" for v in values)] for i, values in errors.items()]
    at_end = {interval: values[-1] for interval, values in errors.items()}
    verdict = (
        f"At K = {lengths[-1]}: largest error {at_end[None][0]:.2f} % of the rms without promotion, {at_end[128][0]:.3f} % with N_C = 128. "
        "Published: about 2 % at K = 4096, cured by N_C = 128. Largest error over rms; in brackets rms error over rms."
    )
    named = {str(interval): [list(map(float, value)) for value in values] for interval, values in errors.items()}
    study.finish(Path(WORKDIR.value), figure, study.markdown(header, rows), verdict, {"k": lengths, "errors_percent": named})
    return 0


def sum_errors(k: int, interval: int | None, bits: int, rows: int, draws: int) -> tuple[float, float]:
    """Largest and rms error of a product of random matrices, in percent of the rms of the exact result; means over `draws`."""
    product = jax.jit(simulated_dot, static_argnums=(2, 3))
    found = []
    for seed in range(draws):
        keys = jax.random.split(jax.random.key(seed))
        # Positive on one side, as activations after SwiGLU's gate lean: sums then grow with K.
        a = E4M3.round(jax.random.uniform(keys[0], (rows, k)) * 448)
        b = E4M3.round(jax.random.normal(keys[1], (k, rows)) * 100)
        exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
        difference = np.asarray(product(a, b, bits, interval), np.float64) - exact
        rms = np.sqrt((exact**2).mean())
        found.append((100 * np.abs(difference).max() / rms, 100 * np.sqrt((difference**2).mean()) / rms))
    largest, typical = np.mean(found, axis=0)
    return float(largest), float(typical)


if __name__ == "__main__":
    cli.run(main)
