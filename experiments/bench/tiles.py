"""Measures the tables of `pallas_kernels/gemm/tiles.py` again: the time of a step and of the rest, for each tile.

    uv run -m experiments.bench.tiles [--kinds=Wgrad]

Every candidate of every kind of product runs at shapes of different depth and width; the two numbers are fitted by least
squares to time = waves x (steps x step + fixed). Prints both, and how far the model is off. Needs a Hopper GPU.
"""

from typing import Any

import numpy as np
from absl import flags

from experiments import cli
from experiments.bench.timing import draw, kernel_seconds, require_hopper
from pallas_kernels.gemm.hopper import multiply
from pallas_kernels.gemm.product import GROUP, Product
from pallas_kernels.gemm.tiles import Candidate, candidates, in_bands, waves
from pallas_kernels.parts import PARTS, ROWS

KINDS = {
    "dense": Product(),
    "rows of groups": Product(groups="rows"),
    "Wgrad": Product("row", out="float32"),
    "bfloat16": Product("none", "rows"),
}
CHOSEN = flags.DEFINE_list("kinds", [*KINDS], f"Kinds of products to measure, of: {', '.join(KINDS)}.")
flags.register_validator("kinds", lambda kinds: set(kinds) <= set(KINDS), f"has to name some of: {', '.join(KINDS)}")
SHAPES = [(4096, 4096, 7168), (4096, 7168, 2048), (4096, 32768, 512), (8192, 8192, 8192)]
WGRAD_SHAPES = [(7168, 4096, 4096), (2048, 7168, 4096), (4096, 7168, 8192), (512, 6144, 8192)]  # k is tokens; float32 is slow to store


def main() -> int:
    from pallas_kernels.backend import sm_count

    require_hopper()
    sms = sm_count()
    for kind in CHOSEN.value:
        product = KINDS[kind]
        shapes = WGRAD_SHAPES if product.scales == "row" else SHAPES
        for candidate in candidates(product):
            times = [measured(product, candidate, shape, sms) for shape in shapes]
            step, fixed, off = fit([(waves(candidate.config, m, n, sms), -(-k // GROUP)) for m, n, k in shapes], times)
            c = candidate.config
            cluster = f" in clusters of {c.cluster_size} along {c.cluster}" if c.cluster else ""
            print(f"{kind}, {c.block_m}x{c.block_n}{cluster}: step {step:.0f} ns, fixed {fixed:.0f} ns, off by up to {off:.1%}", flush=True)
    return 0


def measured(product: Product, candidate: Candidate, shape: tuple[int, int, int], sms: int) -> float:
    """Nanoseconds of one product; with groups, one owns all rows."""
    import jax.numpy as jnp

    m, _, k = shape
    given = {name: draw(i, x.shape, str(x.dtype)) for i, (name, x) in enumerate(operands(product, *shape, 1).items()) if name != "index"}
    if product.groups == "rows":
        given["index"] = jnp.zeros(m // GROUP + 1, jnp.int32).at[-1].set(m // GROUP)
    config = in_bands(candidate.config, m, k) if product.groups == "none" else candidate.config
    scales = {"a_scales": None, "b_scales": None}  # products in bfloat16 have none

    def run(*values: Any) -> Any:
        return multiply(product, config, **(scales | dict(zip(given, values, strict=True))), sm_count=sms)

    return kernel_seconds(run, [*given.values()], cold=True) * 1e9


def operands(product: Product, m: int, n: int, k: int, e: int) -> dict[str, Any]:
    """Shapes and types of what `multiply` takes for a product, of e groups if it has groups, by name."""
    import jax
    import jax.numpy as jnp

    rows, half = product.scales == "row", product.scales == "none"  # scales of rows come in parts
    steps, of_a, of_b = -(-k // GROUP), (e,) * (product.groups == "masked"), (e,) * (product.groups in ("rows", "masked"))
    a, b = (*of_a, m, k), (*of_b, *((k, n) if product.weights_lie else (n, k)))
    if half and product.groups == "contraction":
        a, b = (k, m), (k, n)
    if rows:
        a, b = (steps, m, GROUP), (steps, n, GROUP)
    values, scales = jnp.bfloat16 if half else jnp.float8_e4m3fn, jnp.bfloat16 if rows else jnp.float32
    found = {"a": (a, values), "b": (b, values)}
    if not half:
        found["a_scales"] = (steps, m // ROWS, PARTS) if rows else (*of_a, steps, -(-m // GROUP) * GROUP), scales
        found["b_scales"] = (steps, n // ROWS, PARTS) if rows else (*of_b, -(-n // GROUP), steps), scales
    if product.groups in ("rows", "masked", "contraction"):
        found["index"] = ({"rows": m // GROUP + 1, "masked": e, "contraction": e + 1}[product.groups],), jnp.int32
    return {name: jax.ShapeDtypeStruct(*kind) for name, kind in found.items()}


def fit(sizes: list[tuple[int, int]], times: list[float]) -> tuple[float, float, float]:
    """Time of a step and of the rest, from (waves, steps) and times, and the largest relative deviation."""
    a = np.array([[w * steps, w] for w, steps in sizes], np.float64) / np.array(times)[:, None]
    (step, fixed), *_ = np.linalg.lstsq(a, np.ones(len(times)), rcond=None)
    return float(step), float(fixed), float(np.abs(a @ [step, fixed] - 1).max())


if __name__ == "__main__":
    cli.run(main)
