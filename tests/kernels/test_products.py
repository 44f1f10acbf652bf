import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import tiles as sweep
from experiments.bench.tiles import fit, operands
from pallas_kernels import gemm, grouped_gemm
from pallas_kernels.gemm import hopper, tiles
from pallas_kernels.gemm.product import LINE, Product, TuningConfig
from pallas_kernels.parts import in_parts
from tests.gpu import test_products as gpu_cases
from tests.kernels.interpreter import interpreted
from tests.kernels.product_cases import BF16_ERROR, Blocks, ProductCases, Rows, assert_near, rough


def operation(name):
    return getattr(gemm, name, None) or getattr(grouped_gemm, name)


class TestReference(ProductCases):
    def run(self, name, *arguments, **settings):
        return jax.jit(functools.partial(operation(name), impl="reference", **settings))(*arguments)


class TestInterpreted(ProductCases):
    """The kernel as written, on a simulated GPU of two multiprocessors that reports races between threads and copies."""

    dense = [(130, 144, 640)]  # noqa: RUF012
    wgrads = [(144, 192, 384), (136, 208, 256)]  # noqa: RUF012
    pieced = (108, 96, 712)  # two pieces of three steps, the last of them partial
    width, depth = 144, 272
    owners = ([0, 0, 2], [])

    @pytest.fixture(autouse=True)
    def two_multiprocessors(self, monkeypatch):
        monkeypatch.setattr(gemm, "sm_count", lambda: 2)
        monkeypatch.setattr(tiles, "LAUNCH", 0)  # products of these sizes take less than a launch

    def run(self, name, *arguments, **settings):
        return interpreted(lambda: operation(name)(*arguments, impl="pallas", **settings))


SCHEMES = {
    "overlapped, few slots": TuningConfig(overlap=True, steps=2, stages=2),
    "two waves": TuningConfig(256, 128, steps=2, stages=3, store_slots=4),
    "three warpgroups": TuningConfig(192, 128, warpgroups=3, stages=3),
    "one warpgroup": TuningConfig(64, 32, warpgroups=1, steps=4, stages=4, overlap=True),
    "pairs along m": TuningConfig(cluster="m", overlap=True, steps=3, stages=4),
    "pairs along n": TuningConfig(64, 64, warpgroups=1, cluster="n", steps=3, stages=3, raster=(1, 2), store_slots=2),
    "four along n": TuningConfig(64, 32, warpgroups=1, cluster="n", sharing=4, overlap=True, steps=2, stages=3),
}


def whole_fours(scales):
    return jnp.pad(scales, ((0, 0), (0, -scales.shape[1] % LINE)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_the_product(scheme):
    """Sizes that divide nothing: rows, columns and K steps (5, one of them partial) all have a rest."""
    rng = np.random.default_rng(0)
    a, b = Rows(rough(rng, 200, 592)), Blocks(rough(rng, 208, 592))
    arguments = Product(), SCHEMES[scheme], a.values, a.scales, b.values, whole_fours(b.scales)
    out = interpreted(lambda: hopper.multiply(*arguments, sm_count=2))
    assert_near(out, a.full @ b.full.T, BF16_ERROR)


PRODUCTS = [
    Product("block", "none"),
    Product("block", "rows"),
    Product("block", "masked"),
    Product("row", "none", "float32"),
    Product("row", "contraction", "float32"),
    Product("row", "pieces", "float32"),
    Product("none", "rows"),
    Product("none", "rows", weights_lie=True),
    Product("none", "masked", weights_lie=True),
    Product("none", "contraction", "float32"),
]


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_every_candidate_can_be_lowered(product):
    """Layouts and shared memory are settled in lowering, which needs no GPU."""
    for candidate in tiles.candidates(product):
        run = functools.partial(hopper.multiply, product, candidate.config, n_groups=8, sm_count=132)
        jax.jit(run).trace(*shapes(product, 4096, 2112, 7168, 8)).lower(lowering_platforms=("cuda",))


def shapes(product, *sizes):
    found = operands(product, *sizes)
    return [found.get(name) for name in ("a", "a_scales", "b", "b_scales", "index")]


@pytest.mark.parametrize("groups", ["none", "contraction"])
def test_the_addend_is_added_in_place_by_tma(groups):
    product, grouped = Product("row", groups, "float32"), groups == "contraction"
    addend = jax.ShapeDtypeStruct((*(8,) * grouped, 4096, 2112), jnp.float32)
    for candidate in tiles.candidates(product):
        run = functools.partial(hopper.multiply, product, candidate.config, n_groups=8, sm_count=132)
        text = jax.jit(run).trace(*shapes(product, 4096, 2112, 7168, 8), addend).lower(lowering_platforms=("cuda",)).as_text()
        assert "cp.reduce.async.bulk.tensor" in text
        assert "cp.async.bulk.prefetch.tensor" in text  # into L2, or operands would wait behind additions
        assert "output_operand_alias" in text


@pytest.mark.parametrize(
    ("product", "config", "words"),
    [
        (Product(), TuningConfig(block_n=96), "block_n 96: has to divide 128"),
        (Product(), TuningConfig(256, overlap=True), "block_m 256: two waves"),
        (Product("row", out="float32"), TuningConfig(256), "block_m 256: two waves"),
        (Product("none", "contraction", "float32"), TuningConfig(256), "block_m 256: two waves"),
    ],
)
def test_tiles_that_no_scheme_takes_are_refused(product, config, words):
    """They would be multiplied with scales of other columns, or not at all."""
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(functools.partial(hopper.multiply, product, config, sm_count=132), *shapes(product, 4096, 2112, 7168, 1))


def test_an_addend_of_another_shape_or_type_is_refused():
    """TMA would add what fits into it."""
    product = Product("row", out="float32")
    run = functools.partial(hopper.multiply, product, TuningConfig(), sm_count=132)
    for shape, dtype in (((4096, 2048), jnp.float32), ((4096, 2112), jnp.bfloat16)):
        with pytest.raises(ValueError, match="has to be float32"):
            jax.eval_shape(run, *shapes(product, 4096, 2112, 7168, 1), jax.ShapeDtypeStruct(shape, dtype))


def test_an_addend_of_pieces_of_another_shape_or_type_is_refused(monkeypatch):
    """XLA would repeat it, or convert."""
    monkeypatch.setattr(gemm, "sm_count", lambda: 132)
    product = Product("row", "pieces", "float32")
    run = lambda operands, addend: gemm.run(product, operands, 2, addend=addend)  # noqa: E731
    for shape, dtype in (((2112,), jnp.float32), ((4096, 2112), jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"has to be float32\[4096, 2112\]"):
            jax.eval_shape(run, tuple(shapes(product, 4096, 2112, 7168, 1)), jax.ShapeDtypeStruct(shape, dtype))


@pytest.mark.parametrize("shape", [(1, 7168, 576), (130, 144, 272), (4100, 2064, 7184)])
def test_odd_sizes_can_be_lowered(shape, monkeypatch):
    """TMA's rules about divisibility are checked in lowering only."""
    monkeypatch.setattr(gemm, "sm_count", lambda: 132)
    m, n, k = shape
    operands = shapes(Product(), m, n, k, 1)[:4]
    jax.jit(functools.partial(gemm.gemm, impl="pallas")).trace(*operands).lower(lowering_platforms=("cuda",))


def test_the_model_picks_what_measured_best():
    """Fastest of the sweep on an H200: three warpgroups where their tiles fill the waves, one wide wave for few columns."""
    block = lambda *shape: tiles.choose(Product(), (shape[0], shape[2]), (shape[1], shape[2]), 132)  # noqa: E731
    assert (block(8192, 8192, 8192).block_m, block(4096, 7168, 16384).block_m, block(4096, 32768, 512).block_m) == (192, 256, 128)
    assert block(64, 2112, 7168).block_n == 16


def test_four_blocks_share_the_rows_of_a_product_that_reads_weights():
    """Only where their clusters run at once: 28 of the 33 that an H200 has multiprocessors for."""
    sharing = lambda m, n, k: tiles.choose(Product(), (m, k), (n, k), 132).cluster_size  # noqa: E731
    assert [sharing(m, 7168, 16384) for m in (1, 64, 128)] == [4, 4, 4]
    assert [sharing(64, n, 7168) for n in (2112, 4096)] == [1, 1]  # more, smaller tiles
    assert sharing(128, 28 * 4 * 64 + 64, 16384) != 4
    four = TuningConfig(cluster="n", sharing=4)
    assert [four.clusters(sms) for sms in (2, 132)] == [1, 28]


def test_bodies_of_two_waves_are_long_only_where_that_gains():
    steps = lambda n, k: tiles.choose(Product("block", "rows"), (32768, k), (8, n, k), 132, 8, run=256).steps  # noqa: E731
    assert [steps(n, k) for n, k in ((7168, 2048), (4096, 7168))] == [4, 8]


def test_wgrad_of_few_tiles_is_cut_along_k():
    """Weights of `h200` over 32,768 tokens; those of V3 over 4096 have tiles enough, and three steps cannot be halved."""
    number = lambda m, n, k, sms=132: tiles.pieces((k // 128, m, 128), (k // 128, n, 128), sms)  # noqa: E731
    assert (number(2048, 512, 32768), number(512, 4096, 32768), number(4096, 2048, 32768)) == (2, 1, 1)
    assert (number(7168, 4096, 4096), number(2048, 7168, 4096), number(64, 64, 384)) == (1, 1, 1)


def test_the_cases_of_pieces_are_cut(monkeypatch):
    for sms, cases in ((132, gpu_cases.TestFull), (2, TestInterpreted)):
        monkeypatch.setattr(tiles, "LAUNCH", 0 if sms == 2 else tiles.LAUNCH)
        m, n, k = cases.pieced
        assert tiles.pieces((-(-k // 128), m, 128), (-(-k // 128), n, 128), sms) > 1


def test_bands_are_what_measured_best():
    """Of the sweep of rasters on an H200; eleven of 22 or of 43 tiles, all tiles where rows are short, eight where none fit."""
    best = {(4096, 2112, 7168): 11, (8192, 8192, 8192): 11, (4096, 24576, 1536): 22, (4096, 32768, 512): 16, (4096, 7168, 16384): 8}
    assert {shape: tiles.choose(Product(), shape[::2], shape[1:], 132).raster[1] for shape in best} == best
    for m in (1, 100, 4096, 100_000):
        for config in (TuningConfig(), TuningConfig(cluster="m")):
            width = tiles.in_bands(config, m, 7168).raster[1]
            assert 1 <= width <= -(-m // config.block_m)


def test_a_product_of_several_bands_has_every_tile(monkeypatch):
    """21 tiles in two bands of eleven, so the second lacks one."""
    monkeypatch.setattr(tiles, "BAND_BYTES", 11 * 64 * 128)
    rng = np.random.default_rng(0)
    a, b = Rows(rough(rng, 21 * 64, 128)), Blocks(rough(rng, 48, 128))
    config = tiles.in_bands(SCHEMES["one warpgroup"], 21 * 64, 128)
    assert config.raster == (0, 11)
    out = interpreted(lambda: hopper.multiply(Product(), config, a.values, a.scales, b.values, whole_fours(b.scales), sm_count=2))
    assert_near(out, a.full @ b.full.T, BF16_ERROR)


def test_rows_of_groups_in_several_bands_have_every_tile():
    """Three of five 128 rows are owned: six tiles of 64, in bands of four, so that the second has two; zeros follow."""
    rng = np.random.default_rng(0)
    owners, config = [0, 0, 2], dataclasses.replace(SCHEMES["one warpgroup"], raster=(0, 4))
    a, b = Rows(rough(rng, 5 * 128, 128)), Blocks(rough(rng, 3, 96, 128))
    index = jnp.asarray([*owners, 3, 3, len(owners)], jnp.int32)
    scales = jnp.pad(b.scales, [(0, 0), (0, 0), (0, LINE - 1)])
    out = interpreted(lambda: hopper.multiply(Product(groups="rows"), config, a.values, a.scales, b.values, scales, index, sm_count=2))
    expected = np.concatenate([a.full[128 * i :][:128] @ b.full[e].T for i, e in enumerate(owners)])
    assert_near(out[: len(expected)], expected, BF16_ERROR)
    assert not np.asarray(out[len(expected) :], np.float32).any()


def test_the_fit_finds_the_times_it_was_made_of():
    sizes = [(8, 56), (14, 16), (63, 4), (32, 64)]
    step, fixed, off = fit(sizes, [w * (steps * 387 + 630) for w, steps in sizes])
    assert (round(step), round(fixed)) == (387, 630)
    assert off < 1e-9


def test_the_sweep_finds_the_table_that_it_measures(monkeypatch, capsys):
    """Where times are those of the model: its numbers for each tile, and no tile that is faster than what the table picks."""
    monkeypatch.setattr(sweep, "require_hopper", lambda: None)
    monkeypatch.setattr("pallas_kernels.backend.sm_count", lambda: 132)
    monkeypatch.setattr(sweep, "draw_operands", lambda product, shape: {})
    monkeypatch.setattr(sweep, "measured", lambda product, candidate, shape, drawn, sms: tiles.modelled_time(candidate, *shape, sms))
    monkeypatch.setattr(sweep, "CHOSEN", SimpleNamespace(value=[*sweep.KINDS]))
    assert sweep.main() == 0
    lines = capsys.readouterr().out.splitlines()
    found = [[int(n) for n in re.findall(r"-?\d+", line.split(": ")[1])] for line in lines if "in the table" in line]
    assert len(found) == sum(len(tiles.candidates(product)) for product in sweep.KINDS.values())
    assert all((step, fixed) == (in_table, beside) for step, fixed, *_, in_table, beside in found)
    assert not any("fastest" in line for line in lines)


def test_the_sweep_says_where_another_tile_is_faster():
    small, large = tiles.candidates(Product())[0], tiles.candidates(Product())[-1]
    line = sweep.choice("dense", (8192, 8192, 8192), {small: 1000.0, large: 2000.0}, 132)
    assert line == "dense 8192,8192,8192: picks 256x128 in clusters of 2 along n, 2.0 us; fastest 64x16, 1.0 us"


@pytest.mark.parametrize("run", [lambda: Product("block", "rows"), lambda: Product("none", "rows")])
def test_tiles_do_not_cross_runs(run):
    product = run()
    config = tiles.choose(product, (32768, 7168), (8, 4096, 7168), 132, 8, run=128)
    assert config.block_m == 128


def test_parts_of_scales_multiply_to_the_scales():
    """To float32's rounding over many powers of two, and to nothing where one is zero. The tensor cores add up all of them twice."""
    rng = np.random.default_rng(0)
    left, right = (np.float32(rng.uniform(1, 2, (3, 40)) * 2.0 ** rng.integers(-40, 40, (3, 40))) for _ in range(2))
    left[:, 0] = right[:, -1] = 0
    a, b = (np.float64(in_parts(jnp.asarray(x), side)).reshape(3, 40, 8) for x, side in ((left, "left"), (right, "right")))
    np.testing.assert_allclose(2 * np.einsum("smp,snp->smn", a, b), np.float64(left)[:, :, None] * right[:, None], rtol=2**-24)


F8 = jnp.zeros((128, 128), jnp.float8_e4m3fn)
ROWS, BLOCK = jnp.ones((1, 128)), jnp.ones((1, 1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: gemm.gemm(jnp.zeros((128, 128)), ROWS, F8, BLOCK), ValueError, "a: dtype float32"),
        (lambda: gemm.check_turned(F8[None], F8), ValueError, r"a and b: shapes \(1, 128, 128\) and \(128, 128\)"),
        (lambda: gemm.check_turned(F8[None], jnp.tile(F8, (2, 1, 1))), ValueError, "of as many tokens"),
        (
            lambda: grouped_gemm.grouped_gemm(F8, ROWS, F8[None], BLOCK[None], jnp.zeros(2, jnp.int32)),
            ValueError,
            "expert_of_tile: 2 tiles for 128 rows",
        ),
        (lambda: gemm.gemm(F8, ROWS, F8[:24], BLOCK, impl="pallas"), NotImplementedError, "n in multiples of 16"),
    ],
)
def test_errors_name_the_field(call, error, words):
    with pytest.raises(error, match=words):
        call()
