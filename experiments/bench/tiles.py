"""Measures the tables of `pallas_kernels/gemm/tiles.py` again: the time of a step and of the rest, for each tile.

    uv run -m experiments.bench.tiles [--kinds=Wgrad]

Candidates of every kind of product run at shapes of different depth and width; the two numbers are fitted by least squares
to time = waves x (steps x step + fixed), and printed beside those of the table. Tiles of few columns are fitted to products of few rows,
which are bound by reading weights, and run at these only. For every shape it says which tile the table picks, and which is the fastest.
Needs a Hopper GPU.
"""

from typing import Any

import numpy as np
from absl import flags

from experiments import cli
from experiments.bench.timing import draw, kernel_seconds, require_hopper
from pallas_kernels.gemm.hopper import multiply
from pallas_kernels.gemm.product import GROUP, Product
from pallas_kernels.gemm.tiles import Candidate, arranged, candidates, modelled_time, waves
from pallas_kernels.parts import PARTS, ROWS

KINDS = {
    "dense": Product(),
    "rows of groups": Product(groups="rows"),
    "Wgrad": Product("row", out="float32"),
    "bfloat16": Product("none", "rows"),
}
CHOSEN = flags.DEFINE_list("kinds", [*KINDS], f"Kinds of products to measure, of: {', '.join(KINDS)}.")
flags.register_validator("kinds", lambda kinds: set(kinds) <= set(KINDS), f"has to name some of: {', '.join(KINDS)}")
Shape = tuple[int, int, int]  # m, n, k
SHAPES = [(4096, 4096, 7168), (4096, 7168, 2048), (4096, 32768, 512), (8192, 8192, 8192)]
WHOLE = 768  # rows that tiles of any height divide: scales are copied for whole tiles
FEW_ROWS = [(64, 7168, 16384), (64, 24576, 1536), (64, 4096, 7168), (64, 7168, 2048), (128, 7168, 16384), (128, 2112, 7168)]
WGRAD_SHAPES = [(7168, 4096, 4096), (2048, 7168, 4096), (4096, 7168, 8192), (512, 6144, 8192)]  # k is tokens; float32 is slow to store


def main() -> int:
    from pallas_kernels.backend import sm_count

    require_hopper()
    sms = sm_count()
    for kind in CHOSEN.value:
        product = KINDS[kind]
        table = candidates(product)
        times: dict[tuple[Candidate, Shape], float] = {}
        for shape in shapes(product):
            drawn = draw_operands(product, shape)
            runs = [c for c in table if shape not in SHAPES or for_many_rows(c)]
            times |= {(c, shape): measured(product, c, shape, drawn, sms) for c in runs}
            print(choice(kind, shape, {c: times[c, shape] for c in runs}, sms), flush=True)
        for c in table:
            print(figures(kind, c, {shape: times[c, shape] for shape in fitted(product, c)}, sms), flush=True)
    return 0


def shapes(product: Product) -> list[Shape]:
    """Where a kind of product is measured. Only dense ones have tiles for few rows."""
    if product.scales == "row":
        return WGRAD_SHAPES
    return [*SHAPES, *FEW_ROWS] if product == KINDS["dense"] else SHAPES


def for_many_rows(candidate: Candidate) -> bool:
    """Whether a tile is not for few rows only."""
    return candidate.config.block_n >= GROUP


def fitted(product: Product, candidate: Candidate) -> list[Shape]:
    """The shapes that a tile's numbers are fitted to."""
    if not for_many_rows(candidate):
        return FEW_ROWS
    return [shape for shape in shapes(product) if shape not in FEW_ROWS]


def draw_operands(product: Product, shape: Shape) -> dict[str, Any]:
    """Random operands of a product; with groups, one owns all rows."""
    import jax.numpy as jnp

    given = {name: draw(i, x.shape, str(x.dtype)) for i, (name, x) in enumerate(operands(product, *shape, 1).items()) if name != "index"}
    if product.groups == "rows":
        tiles = shape[0] // GROUP
        given["index"] = jnp.zeros(tiles + 1, jnp.int32).at[-1].set(tiles)
    return given


def measured(product: Product, candidate: Candidate, shape: Shape, drawn: dict[str, Any], sms: int) -> float:
    """Nanoseconds of one product in a tile."""
    m, _, k = shape
    config = arranged(product, candidate.config, m, k)
    scales = {"a_scales": None, "b_scales": None}  # products in bfloat16 have none

    def run(*values: Any) -> Any:
        return multiply(product, config, **(scales | dict(zip(drawn, values, strict=True))), sm_count=sms)

    return kernel_seconds(run, [*drawn.values()], cold=True) * 1e9


def choice(kind: str, shape: Shape, times: dict[Candidate, float], sms: int) -> str:
    """What the table picks at a shape, beside what is the fastest."""
    picked = min(times, key=lambda c: modelled_time(c, *shape, sms))
    fastest = min(times, key=lambda c: times[c])
    m, n, k = shape
    line = f"{kind} {m},{n},{k}: picks {tile_name(picked)}, {times[picked] / 1e3:.1f} us"
    return line if picked == fastest else f"{line}; fastest {tile_name(fastest)}, {times[fastest] / 1e3:.1f} us"


def figures(kind: str, candidate: Candidate, times: dict[Shape, float], sms: int) -> str:
    """A tile's two numbers as measured, and as they stand in the table."""
    step, fixed, off = fit([(waves(candidate.config, m, n, sms), -(-k // GROUP)) for m, n, k in times], [*times.values()])
    table = f"in the table {candidate.step} and {candidate.fixed}"
    return f"{kind} {tile_name(candidate)}: step {step:.0f} ns, fixed {fixed:.0f} ns, off by up to {off:.1%}; {table}"


def tile_name(candidate: Candidate) -> str:
    """Rows and columns of a tile, and its cluster."""
    c = candidate.config
    return f"{c.block_m}x{c.block_n}" + (f" in clusters of {c.cluster_size} along {c.cluster}" if c.cluster else "")


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
        found["a_scales"] = (steps, m // ROWS, PARTS) if rows else (*of_a, steps, -(-m // WHOLE) * WHOLE), scales
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
