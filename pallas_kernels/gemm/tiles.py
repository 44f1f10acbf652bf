"""Which tile for which shape: a model of the time, small enough to check by hand.

Tiles run in waves over the SMs. A wave costs as much as one tile: its steps of 128 along k, and what a tile costs
besides (first loads, store). Both times are measured ones, which `python -m experiments.bench.tiles` measures again.
"""

import dataclasses

from pallas_kernels.gemm.product import GROUP, Product, TuningConfig

LAUNCH, BYTES_A_NS = 5000, 3500  # nanoseconds of one more kernel, and how fast it adds pieces up
BAND_BYTES = 20 * 2**20  # of A, in an L2 of 50 MiB beside what else passes through it; measured as `step` and `fixed` are


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tile and its measured times in nanoseconds, on an H200."""

    config: TuningConfig
    step: int
    fixed: int


_SMALL = (
    Candidate(TuningConfig(64, 16, warpgroups=1, stages=16, overlap=True), 122, 450),
    Candidate(TuningConfig(64, 32, warpgroups=1, stages=16, overlap=True), 160, 950),
    Candidate(TuningConfig(64, 64, warpgroups=1, stages=12, overlap=True), 290, 1600),
    Candidate(TuningConfig(128, 64, stages=8), 300, 1800),
)
# Four blocks share A where a product is bound by reading B once: less traffic from L2. Clusters of four do not fill all multiprocessors.
_SHARED = (
    Candidate(TuningConfig(64, 64, warpgroups=1, stages=12, overlap=True, cluster="n", sharing=4), 272, 2600),
    Candidate(TuningConfig(128, 64, stages=8, cluster="n", sharing=4), 285, 2800),
)
# As many slots of the output as a warpgroup has pieces, even at the price of a stage: it stores without waiting.
_LARGE = Candidate(TuningConfig(256, 128, stages=3, cluster="n", store_slots=4), 733, 1050)
_BLOCK = (
    *_SMALL,
    *_SHARED,
    Candidate(TuningConfig(128, 128, stages=5, overlap=True, cluster="m", store_slots=2), 375, 480),
    Candidate(TuningConfig(192, 128, warpgroups=3, stages=4, cluster="n"), 527, 800),
    _LARGE,
)
# Runs of rows have lengths that only the device knows, so neighbours along m may not share weights.
_BLOCK_ROWS = (
    Candidate(TuningConfig(128, 128, stages=5, overlap=True, cluster="n", store_slots=2), 387, 550),
    _LARGE,
)
_ROW = (Candidate(TuningConfig(stages=5, steps=4, store_slots=2), 431, 1634),)
_BF16 = (
    Candidate(TuningConfig(128, 128), 660, 750),
    Candidate(TuningConfig(128, 256, stages=4), 1300, 900),
)


def choose(
    product: Product, a_shape: tuple[int, ...], b_shape: tuple[int, ...], sm_count: int, n_groups: int = 1, run: int | None = None
) -> TuningConfig:
    """The candidate with the least modelled time, and its raster. `run`: rows of a group come in multiples of it."""
    m, n, k = sizes(product, a_shape, b_shape, n_groups)
    possible = [c for c in candidates(product) if run is None or run % c.config.block_m == 0]
    config = min(possible, key=lambda c: modelled_time(c, m, n, k, sm_count, n_groups if product.per_group else 1)).config
    return arranged(product, config, m, k)


def arranged(product: Product, config: TuningConfig, m: int, k: int) -> TuningConfig:
    """A tile as it runs at these sizes: its raster, and how many steps are written out."""
    config = _written_out(config, -(-k // GROUP))
    return in_bands(config, m, k) if product.groups in ("none", "pieces") else config


def _written_out(config: TuningConfig, steps: int) -> TuningConfig:
    """Half as many steps in the body of a loop of few: with two waves a warpgroup, eight take seconds to compile and gain nothing there."""
    return dataclasses.replace(config, steps=4) if config.waves == 2 and steps < 32 else config


def pieces(a_shape: tuple[int, ...], b_shape: tuple[int, ...], sm_count: int) -> int:
    """In how many equal pieces of k Wgrad is multiplied, whose results are then added: several where whole tiles fill few waves."""
    product, steps = Product("row", "pieces"), a_shape[0]

    def time(number: int) -> int:
        m, n, k = sizes(product, a_shape, b_shape, number)
        multiplied = min(modelled_time(c, m, n, k, sm_count, number) for c in candidates(product))
        return multiplied + (LAUNCH + (number + 1) * 4 * m * n // BYTES_A_NS if number > 1 else 0)

    return min((number for number in (1, 2, 4, 8) if steps % number == 0), key=time)


def in_bands(config: TuningConfig, m: int, k: int) -> TuningConfig:
    """Visits tiles in bands along m: B is read once for each, so they are as wide as A's rows stay in L2 meanwhile, and equally wide.

    Not under eight tiles, where those that run together would share too little. k in numbers of 8 bits.
    """
    tiles, kept = -(-m // config.rows), max(8, BAND_BYTES // (config.rows * k))
    bands = -(-tiles // kept)
    return dataclasses.replace(config, raster=(0, -(-tiles // bands)))


def candidates(product: Product) -> tuple[Candidate, ...]:
    """Tiles that can run a product."""
    if product.scales == "none":
        return _BF16
    if product.scales == "row":
        return _ROW
    return {"rows": _BLOCK_ROWS, "masked": _SMALL}.get(product.groups, _BLOCK)


def sizes(product: Product, a_shape: tuple[int, ...], b_shape: tuple[int, ...], n_groups: int) -> tuple[int, int, int]:
    """m, n and k of one group, taking contractions as evenly spread."""
    if product.scales == "row":
        return a_shape[1], b_shape[1], a_shape[0] * GROUP // n_groups
    if product.groups == "contraction":
        return a_shape[-1], b_shape[-1], a_shape[0] // n_groups
    return a_shape[-2], b_shape[-1 if product.weights_lie else -2], a_shape[-1]


def modelled_time(candidate: Candidate, m: int, n: int, k: int, sm_count: int, groups: int = 1) -> int:
    """Nanoseconds of `groups` products of these sizes."""
    return waves(candidate.config, m, n, sm_count, groups) * (-(-k // GROUP) * candidate.step + candidate.fixed)


def waves(config: TuningConfig, m: int, n: int, sm_count: int, groups: int = 1) -> int:
    """Rounds in which the tiles of `groups` products run over the multiprocessors. A cluster takes a tile for each of its blocks."""
    units = groups * -(-m // config.rows) * -(-n // config.columns)
    return -(-units // config.clusters(sm_count))
