"""One test base for every implementation of the products: against a float32 product of the dequantized operands."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_gemm import TILE, first_tiles
from pallas_kernels.quantize import reference as quantizers

BF16_ERROR, F32_ERROR = 2.5e-3, 5e-4  # relative, Frobenius; the first is the rounding of the output


def rough(rng, *shape):
    """Rows of different sizes, some outliers, some tiles of zeros; no single element makes up the norm of a product."""
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-1, 2, (*shape[:-1], 1))
    x[rng.random(shape) < 1e-3] *= 30
    x[..., : min(128, shape[-1])] *= rng.random((*shape[:-1], 1)) < 0.9
    return np.float32(x)


def spread(scales, length, axis):
    return np.take(np.repeat(np.asarray(scales), 128, axis), np.arange(length), axis)


class Rows:
    """An operand in 1x128 tiles, and what it stands for."""

    def __init__(self, x):
        self.values, self.scales = quantizers.quantize_rows(jnp.asarray(x))
        self.full = np.asarray(self.values, np.float32) * spread(self.scales, x.shape[1], 0).T[: x.shape[0]]


class Columns:
    """Tokens' columns in 128x1 tiles, from x [columns, tokens], and what they stand for."""

    def __init__(self, x):
        _, _, self.values, self.scales = quantizers.quantize_both(jnp.asarray(x).T)
        self.full = side_by_side(self.values, self.scales)


def side_by_side(values, scales):
    """[tokens / 128, columns, 128] and a scale of each column, as [columns, tokens]."""
    full = np.asarray(values, np.float32) * np.asarray(scales)[:, :, None]
    return np.concatenate(list(full), 1)


class Blocks:
    """Weights [..., n, k] in 128x128 blocks."""

    def __init__(self, x):
        self.values, _, self.scales, _ = quantizers.quantize_blocks(jnp.asarray(x))
        scales = spread(spread(self.scales, x.shape[-2], -2), x.shape[-1], -1)
        self.full = np.asarray(self.values, np.float32) * scales


def assert_near(actual, expected, limit):
    assert np.isfinite(np.asarray(actual, np.float32)).all()
    difference = np.linalg.norm(np.asarray(actual, np.float32) - expected)
    assert difference <= limit * np.linalg.norm(expected)


class ProductCases:
    """Subclasses say how an operation runs, and at which sizes."""

    dense = [(1, 16, 16), (130, 144, 272)]  # noqa: RUF012 (a case list, not state)
    wgrads = [(144, 192, 128), (128, 256, 640)]  # noqa: RUF012
    pieced = (64, 96, 1024)  # m, n, k of a Wgrad of few tiles and many steps
    width, depth = 144, 272  # n and k of experts
    wgrad_shape = (128, 192)  # of an expert
    owners = ([0, 0, 2], [2], [], [0, 1, 1, 2])  # expert of each tile; the rest of 5 tiles has none

    def run(self, name, *arguments, **settings):
        raise NotImplementedError

    def test_gemm(self):
        rng = np.random.default_rng(0)
        for m, n, k in self.dense:
            a, b = Rows(rough(rng, m, k)), Blocks(rough(rng, n, k))
            out = self.run("gemm", a.values, a.scales, b.values, b.scales)
            assert out.dtype == jnp.bfloat16
            assert_near(out, a.full @ b.full.T, BF16_ERROR)

    @pytest.mark.parametrize("added", [False, True])
    def test_wgrad(self, added):
        self.check_wgrad(1, self.wgrads[added], added)

    @pytest.mark.parametrize("added", [False, True])
    def test_wgrad_in_pieces(self, added):
        self.check_wgrad(7, self.pieced, added)

    def check_wgrad(self, seed, sizes, added):
        rng = np.random.default_rng(seed)
        m, n, k = sizes
        a, b = Columns(rough(rng, m, k)), Columns(rough(rng, n, k))
        addend = np.float32(rng.normal(size=(m, n)) * 100) if added else None
        out = self.run("wgrad", a.values, a.scales, b.values, b.scales, None if addend is None else jnp.asarray(addend))
        assert out.shape == (m, n)
        assert_near(out, a.full @ b.full.T + (0 if addend is None else addend), F32_ERROR)

    def test_wgrad_of_scales_in_parts(self):
        """As quantizers make them for either operand: also where their last tile of columns is not full."""
        rng = np.random.default_rng(8)
        m, n, k = self.wgrads[1]
        x, dy = (jnp.asarray(rough(rng, k, width)) for width in (m + 32, n))
        turned = [quantizers.quantize_both(a, False, operand)[2:] for a, operand in ((x, "left"), (dy, "right"))]
        whole = [quantizers.quantize_both(a)[2:] for a in (x, dy)]
        out = self.run("wgrad", *turned[0], *turned[1])
        np.testing.assert_array_equal(out, self.run("wgrad", *whole[0], *whole[1]))
        a, b = (side_by_side(*columns) for columns in whole)
        assert_near(out, a @ b.T, F32_ERROR)

    def tiles(self, owners):
        experts = max(max(owners, default=0) + 1, 3)
        return jnp.asarray(owners + [experts] * (5 - len(owners)), jnp.int32), experts

    def expected(self, a, b, owners):
        out = np.zeros((5 * TILE, b.shape[1]), np.float32)
        for tile, expert in enumerate(owners):
            out[tile * TILE : (tile + 1) * TILE] = a[tile * TILE : (tile + 1) * TILE] @ b[expert].T
        return out

    def test_grouped_gemm(self):
        rng = np.random.default_rng(2)
        for owners in self.owners:
            tiles, experts = self.tiles(owners)
            a, b = Rows(rough(rng, 5 * TILE, self.depth)), Blocks(rough(rng, experts, self.width, self.depth))
            out = self.run("grouped_gemm", a.values, a.scales, b.values, b.scales, tiles)
            assert not np.asarray(out[len(owners) * TILE :], np.float32).any()
            assert_near(out, self.expected(a.full, b.full, owners), BF16_ERROR)

    @pytest.mark.parametrize("contraction_first", [False, True])
    def test_grouped_gemm_bf16(self, contraction_first):
        rng = np.random.default_rng(3)
        width = self.wgrad_shape[1] if contraction_first else self.width
        for owners in self.owners:
            tiles, experts = self.tiles(owners)
            a, b = (jnp.asarray(rough(rng, *s), jnp.bfloat16) for s in [(5 * TILE, self.depth), (experts, width, self.depth)])
            out = self.run("grouped_gemm_bf16", a, b.mT if contraction_first else b, tiles, contraction_first=contraction_first)
            assert_near(out, self.expected(np.asarray(a, np.float32), np.asarray(b, np.float32), owners), BF16_ERROR)

    @pytest.mark.parametrize(("added", "lacking"), [(False, 4), (True, 0), (True, 4)])  # rows to a multiple of eight
    def test_grouped_wgrad(self, added, lacking):
        rng = np.random.default_rng(4)
        m, n = self.wgrad_shape
        m -= lacking
        for owners in self.owners:
            tiles, experts = self.tiles(owners)
            a, b = Columns(rough(rng, m, 5 * TILE)), Columns(rough(rng, n, 5 * TILE))
            addend = np.float32(rng.normal(size=(experts, m, n)) * 100) if added else None
            arguments = a.values, a.scales, b.values, b.scales, first_tiles(tiles, experts)
            out = self.run("grouped_wgrad", *arguments, None if addend is None else jnp.asarray(addend))
            assert out.shape == (experts, m, n)
            expected = self.sums(a.full.T, b.full.T, owners, experts) + (0 if addend is None else addend)
            assert_near(out, expected, F32_ERROR)

    def test_grouped_wgrad_bf16(self):
        rng = np.random.default_rng(5)
        m, n = self.wgrad_shape
        for owners in self.owners:
            tiles, experts = self.tiles(owners)
            x, dy = (jnp.asarray(rough(rng, 5 * TILE, s), jnp.bfloat16) for s in (m, n))
            out = self.run("grouped_wgrad_bf16", x, dy, first_tiles(tiles, experts))
            assert_near(out, self.sums(np.asarray(x, np.float32), np.asarray(dy, np.float32), owners, experts), F32_ERROR)

    def sums(self, x, dy, owners, experts):
        out = np.zeros((experts, x.shape[1], dy.shape[1]), np.float32)
        for tile, expert in enumerate(owners):
            rows = slice(tile * TILE, (tile + 1) * TILE)
            out[expert] += x[rows].T @ dy[rows]
        return out

    def test_masked_gemm(self):
        rng = np.random.default_rng(6)
        used = [0, 3, 70]
        a = [Rows(rough(rng, 72, self.depth)) for _ in used]
        b = Blocks(rough(rng, 3, self.width, self.depth))
        values, scales = (jnp.stack([getattr(x, name) for x in a]) for name in ("values", "scales"))
        out = self.run("masked_gemm", values, scales, b.values, b.scales, jnp.asarray(used, jnp.int32))
        for expert, rows in enumerate(used):
            assert_near(out[expert, :rows], a[expert].full[:rows] @ b.full[expert].T, BF16_ERROR)

    def test_masked_gemm_bf16(self):
        rng = np.random.default_rng(9)
        used, width = [0, 3, 70], self.wgrad_shape[1]
        a, b = (jnp.asarray(rough(rng, 3, *shape), jnp.bfloat16) for shape in ((72, self.depth), (self.depth, width)))
        out = self.run("masked_gemm_bf16", a, b, jnp.asarray(used, jnp.int32))
        for expert, rows in enumerate(used):
            assert_near(out[expert, :rows], np.float32(a[expert, :rows]) @ np.float32(b[expert]), BF16_ERROR)
