"""One test base for every implementation of `pallas_kernels.quantize`: what it gives, against `dsv3_jax.precision`, bit for bit.

What is expected is computed on a CPU, operation by operation: XLA may turn a division into a product with the reciprocal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.formats import E5M6
from dsv3_jax.precision.linear import swiglu
from dsv3_jax.precision.quantize import Quantized, dequantize, quantize
from pallas_kernels.parts import in_parts, whole
from tests.precision.test_quantize import KINDS, draw

BF16, F32 = jnp.bfloat16, jnp.float32


def mixed(rows, columns, dtype, seed=0):
    """All kinds of numbers, each in some tiles of 128 rows; rows and columns of zeros."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([draw(kind, (128, columns), rng) for kind in KINDS])
    x = np.tile(x, (-(-rows // len(x)), 1))[:rows]
    x[:, rng.integers(columns)] = 0
    return on_cpu(lambda: jnp.asarray(x).astype(dtype))


def on_cpu(compute):
    with jax.default_device(jax.devices("cpu")[0]):
        return compute()


def exact(actual, expected):
    """Bit for bit; NaNs are equal, and so are zeros of either sign."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(e, np.float32), err_msg=f"output {i}")


def close(values, scales, expected_values, expected_scales, spread, rtol=2e-5):
    """The same up to float32 rounding before quantization: scales nearly, values at most one step apart, and few of them."""
    np.testing.assert_allclose(scales, expected_scales, rtol=rtol)
    assert (values.shape, values.dtype) == (expected_values.shape, expected_values.dtype)
    step = np.abs(np.asarray(values).view(np.int8).astype(np.int32) - np.asarray(expected_values).view(np.int8))
    step[(np.asarray(values, np.float32) == 0) & (np.asarray(expected_values, np.float32) == 0)] = 0  # of either sign
    assert step.max() <= 1
    assert (step != 0).mean() < spread


def nearly(values, scales, expected_values, expected_scales):
    assert (values.shape, values.dtype, scales.shape) == (expected_values.shape, expected_values.dtype, expected_scales.shape)
    assert np.isclose(scales, expected_scales, rtol=2e-5).mean() > 0.999
    np.testing.assert_allclose(scales, expected_scales, rtol=0.15)
    mine, theirs = (np.asarray(v, np.float32) * np.asarray(s)[..., None] for v, s in ((values, scales), (expected_values, expected_scales)))
    assert np.linalg.norm(mine - theirs) < 1e-2 * np.linalg.norm(theirs)


def rows_last(scales):
    return jnp.pad(scales.T, ((0, 0), (0, -scales.shape[0] % 128)), constant_values=1)


def by_rows(x, power_of_two=False, format=None):
    q = quantize(x, (1, 128), power_of_two=power_of_two) if format is None else quantize(x, (1, 128), format, power_of_two)
    return q.values, rows_last(q.scales)


def by_columns(x, power_of_two=False, operand=None):
    q = quantize(jnp.pad(x, ((0, -x.shape[0] % 128), (0, 0))), (128, 1), power_of_two=power_of_two)
    values = jnp.stack([tile.T for tile in jnp.split(q.values, len(q.values) // 128)])
    if operand is None:
        return values, q.scales
    return values, in_parts(jnp.pad(q.scales, ((0, 0), (0, -x.shape[1] % 128)), constant_values=1), operand)


def opened(values, scales):
    return dequantize(Quantized(values, scales.T[: values.shape[0]], (1, 128)))


class QuantizeCases:
    """A subclass gives `run(name, *arguments)` and sizes: multiples of 32 in columns."""

    rows, columns = 128 * len(KINDS) + 2, 160
    experts, kernel = 2, (608, 160)
    hidden = (130, 512)
    gathered = (200, 384, 640)  # tokens, rows of experts, columns
    fused = True  # multiply-adds round once

    def run(self, name, *arguments):
        raise NotImplementedError

    @pytest.mark.parametrize(("dtype", "power_of_two"), [(BF16, False), (F32, False), (F32, True)])
    def test_rows(self, dtype, power_of_two):
        x = mixed(self.rows, self.columns, dtype)
        self.same(self.run("quantize_rows", x, power_of_two), on_cpu(lambda: by_rows(x, power_of_two)), dtype == BF16 or power_of_two)

    def test_and_keep(self):
        x = mixed(self.rows, self.columns, BF16)
        exact(self.run("quantize_and_keep", x), on_cpu(lambda: (*by_rows(x), *by_rows(x, True, E5M6))))

    @pytest.mark.parametrize(("dtype", "power_of_two", "operand"), [(BF16, True, None), (F32, False, None), (BF16, False, "right")])
    def test_both(self, dtype, power_of_two, operand):
        x = mixed(self.rows, self.columns, dtype)
        expected = on_cpu(lambda: (*by_rows(x, power_of_two), *by_columns(x, power_of_two, operand)))
        self.same(self.run("quantize_both", x, power_of_two, operand), expected, dtype == BF16)

    def test_one_row(self):
        x = mixed(1, 32, BF16)
        exact(self.run("quantize_both", x, False, None), on_cpu(lambda: (*by_rows(x), *by_columns(x))))

    @pytest.mark.parametrize(("dtype", "stacked"), [(F32, True), (BF16, False)])
    def test_blocks(self, dtype, stacked):
        w = mixed(self.experts * self.kernel[0], self.kernel[1], dtype)
        w = w.reshape(self.experts, *self.kernel) if stacked else w
        q = on_cpu(lambda: quantize(w, (128, 128)))
        out = self.run("quantize_blocks", w)
        self.same((out[0], out[2], out[1], out[3]), (q.values, q.scales, q.values.mT, q.scales.mT), False)

    @pytest.mark.parametrize(
        ("format", "power_of_two", "operand"),
        [(None, False, None), (None, True, "left"), (E5M6, True, None), (E5M6, False, "left")],
    )
    def test_retile(self, format, power_of_two, operand):
        x = mixed(self.rows, self.columns + 128 * power_of_two, F32)  # an even number of tiles along a row, and an odd one
        kept = on_cpu(lambda: by_rows(x, power_of_two, format))
        expected = on_cpu(lambda: by_columns(opened(*kept), power_of_two, operand))
        self.same(self.run("retile", *kept, power_of_two, operand), expected, power_of_two)

    @pytest.mark.parametrize(("keep", "power_of_two", "operand"), [(True, False, "right"), (False, True, "left"), (True, True, None)])
    def test_gather_and_retile(self, keep, power_of_two, operand):
        """Rows in any order, some of them twice, and rows of zeros; a tile of these alone."""
        tokens, rows, width = self.gathered
        rng = np.random.default_rng(2)
        source = rng.integers(tokens + tokens // 8, size=rows).clip(max=tokens)
        source[-128:] = tokens
        x = mixed(tokens, width, F32)

        def expect():
            values, scales = by_rows(x, power_of_two)
            of_rows = scales[:, :tokens].at[:, source].get(mode="fill", fill_value=1)
            gathered = values.at[source].get(mode="fill", fill_value=0)
            return values, of_rows, gathered, by_columns(opened(gathered, of_rows), power_of_two, operand)

        values, scales, gathered, expected = on_cpu(expect)
        actual = self.run("gather_and_retile", values, scales, jnp.asarray(source, jnp.int32), power_of_two, keep, operand)
        assert (actual[0] is None) != keep
        if keep:
            exact(actual[:1], [gathered])
        self.same(actual[1:], expected, power_of_two)

    @pytest.mark.parametrize("gated", [True, False])
    def test_swiglu(self, gated):
        hidden, gates, _ = self.ffn(gated)
        values, scales, *kept = self.run("swiglu_quantize", hidden, gates, gated)
        exact(kept, on_cpu(lambda: by_rows(hidden)))
        close(values, scales, *on_cpu(lambda: by_rows(activation(hidden, gates), gated)), spread=1e-3)

    @pytest.mark.parametrize("gated", [True, False])
    def test_swiglu_backward(self, gated):
        """What linear.py would give, in float32: the activation is rounded as it would be kept, then turned."""
        hidden, gates, d_act = self.ffn(gated)
        kept = on_cpu(lambda: by_rows(hidden))
        *actual, d_gates = self.run("swiglu_backward", *kept, gates, d_act, gated, False, gated)
        if gated:  # parts of scales, exact to float32's rounding
            actual[3], actual[5] = on_cpu(lambda: (whole(actual[3], "right"), whole(actual[5], "left")))
        act, d_hidden, d_gates_expected = on_cpu(lambda: gradients(opened(*kept), gates, d_act))
        close(*actual[:2], *on_cpu(lambda: by_rows(d_hidden, gated)), spread=1e-3)
        close(*actual[2:4], *on_cpu(lambda: by_columns(d_hidden, gated)), spread=1e-3)
        # The activation is rounded twice: where the first is a tie, the largest of a column may move by a step.
        nearly(*actual[4:], *on_cpu(lambda: by_columns(opened(*by_rows(act)))))
        if gated:
            np.testing.assert_allclose(d_gates, d_gates_expected, rtol=1e-4, atol=1e-3)
        else:
            assert d_gates is None

    def same(self, actual, expected, always):
        """Bits, if multiply-adds are fused or it does not matter; else next to it for ties, of which some kinds have many."""
        if always or self.fused:
            return exact(actual, expected)
        for i in range(0, len(expected), 2):
            close(*actual[i : i + 2], *expected[i : i + 2], spread=1e-3, rtol=0)

    def ffn(self, gated):
        rng = np.random.default_rng(1)
        m, width = self.hidden

        def draws():
            hidden = jnp.asarray(rng.normal(size=(m, width)) * 3, BF16).at[m // 2].set(0)
            gates = jnp.asarray(rng.uniform(size=m), F32) if gated else None
            return hidden, gates, jnp.asarray(rng.normal(size=(m, width // 2)), BF16)

        return on_cpu(draws)


def activation(hidden, gates):
    act = swiglu(hidden.astype(F32))
    return act if gates is None else act * gates[:, None]


def gradients(hidden, gates, d_act):
    act, back = jax.vjp(activation, hidden, gates)
    return act, *back(d_act.astype(F32))
