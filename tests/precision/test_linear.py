"""The FP8 products against the recipe worked out in NumPy: operands from the oracle, products in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.linear import grouped_linear, grouped_swiglu_linear, linear, swiglu_linear
from dsv3_jax.precision.policy import AFTER_ATTENTION, BF16, EXPERT_UP, LINEAR, TILES, Recipe
from tests.precision import oracle

FP8 = Recipe(fp8=True)


class Expected(NamedTuple):
    """What the recipe says of one linear layer: format its input is kept in, and where scales are powers of two."""

    kept: str = "E4M3"
    input_powers: bool = False
    gradient_powers: bool = False
    wgrad_powers: bool = False


# V3 sec. 3.3.3; EXPERT_DOWN is the role inside grouped_swiglu_linear.
ROLES = {
    "linear": (LINEAR, Expected()),
    "after_attention": (AFTER_ATTENTION, Expected(kept="E5M6", wgrad_powers=True)),
    "expert_up": (EXPERT_UP, Expected(input_powers=True, wgrad_powers=True)),
}
EXPERT_DOWN = Expected(gradient_powers=True)


def products(x, w, dy, expected=ROLES["linear"][1], recipe=FP8):
    """y, dx, dW of one product."""
    inputs, gradients, weights = recipe.input_tile, recipe.gradient_tile, oracle.dequantized(w, recipe.weight_tile)
    y = oracle.dequantized(x, inputs, "E4M3", expected.input_powers) @ weights
    dx = oracle.dequantized(dy, gradients, "E4M3", expected.gradient_powers) @ weights.T
    kept = np.float32(oracle.dequantized(x, inputs, expected.kept, expected.wgrad_powers))
    columns = oracle.dequantized(kept.T, inputs, "E4M3", expected.wgrad_powers)
    rows = oracle.dequantized(dy, gradients[::-1], "E4M3", expected.gradient_powers)
    return y, dx, columns @ rows


def random(seed, *shape):
    """Rows and columns of different sizes, so that a wrong tile shows."""
    rng = np.random.default_rng(seed)
    sizes = 2.0 ** rng.integers(-4, 5, (*shape[:-1], 1)) * 2.0 ** rng.integers(-2, 3, shape[-1])
    return jnp.asarray(rng.normal(size=shape) * sizes, jnp.float32)


def vjp(f, arguments, dy):
    """Value and gradients, under jit."""

    def run(arguments, dy):
        value, pull = jax.vjp(f, *arguments)
        return value, *pull(dy)

    return jax.jit(run)(arguments, dy)


def assert_close(got, expected, dtype=jnp.float32):
    """Within 1e-6 of the largest and of the whole; or one rounding to bfloat16."""
    assert got.dtype == dtype
    got, expected = np.asarray(got, np.float64), np.asarray(expected).reshape(got.shape)
    slack = 0 if dtype == jnp.float32 else 2.0**-8 * np.abs(expected)
    assert (np.abs(got - expected) <= slack + 1e-6 * np.abs(expected).max()).all()
    if dtype == jnp.float32:
        assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("lead", "k", "n", "role", "dtype"),
    [
        *(((2, 75), 200, 130, role, jnp.float32) for role in ROLES),
        ((2, 75), 200, 130, "after_attention", jnp.bfloat16),
        ((140,), 128, 6, "linear", jnp.float32),
        ((1,), 5, 1, "after_attention", jnp.float32),
    ],
)
def test_linear_follows_the_recipe(lead, k, n, role, dtype):
    x, w, dy = random(0, *lead, k).astype(dtype), random(1, k, n), random(2, *lead, n).astype(dtype)
    role, expected = ROLES[role]
    y, dx, dw = vjp(lambda x, w: linear(x, w, FP8, role), (x, w), dy)
    for got, exact, kind in zip(
        (y, dx, dw), products(x.reshape(-1, k), w, dy.reshape(-1, n), expected), (dtype, dtype, jnp.float32), strict=True
    ):
        assert_close(got, exact, kind)
    assert y.shape == dy.shape


@pytest.mark.parametrize(
    ("inputs", "gradients", "weights"),
    [("128x128", "128x128", "128x128"), ("tensor", "tensor", "tensor"), ("1x128", "128x128", "tensor"), ("128x128", "1x128", "128x128")],
)
def test_linear_with_other_tiles(inputs, gradients, weights):
    recipe = Recipe(True, TILES[inputs], TILES[gradients], TILES[weights])
    x, w, dy = random(0, 150, 200), random(1, 200, 130), random(2, 150, 130)
    for got, exact in zip(vjp(lambda x, w: linear(x, w, recipe), (x, w), dy), products(x, w, dy, recipe=recipe), strict=True):
        assert_close(got, exact)


# Experts of each block: some have no block, one has many or all.
OWNERS = {"some empty": [1, 1, 1, 3], "one has all": [2, 2, 2, 2], "first and last": [0, 0, 4, 4]}


def padded(seed, owners, rows, width):
    """Blocks whose last rows are zero: padding."""
    x = random(seed, len(owners), rows, width)
    return x.at[:, rows - rows // 3 :].set(0)


@pytest.mark.parametrize(("owners", "rows"), [("some empty", 128), ("one has all", 20), ("first and last", 1)])
def test_grouped_linear_is_linear_by_block(owners, rows):
    k, n, owners = 150, 136, OWNERS[owners]
    x, w, dy = padded(0, owners, rows, k), random(1, 5, k, n), padded(2, owners, rows, n)
    block_expert = jnp.asarray(owners, jnp.int32)
    y, dx, dw = vjp(lambda x, w: grouped_linear(x, w, block_expert, FP8, EXPERT_UP), (x, w), dy)
    exact = [products(x[i], w[e], dy[i], ROLES["expert_up"][1]) for i, e in enumerate(owners)]
    assert_close(y, np.stack([block[0] for block in exact]))
    assert_close(dx, np.stack([block[1] for block in exact]))
    assert_close(dw, summed(exact, owners, w.shape))


def summed(exact, owners, shape):
    dw = np.zeros(shape)
    for e, block in zip(owners, exact, strict=True):
        dw[e] += block[2]
    return dw


@functools.partial(jax.jit, static_argnums=2)
def activation(hidden, gates, dtype):
    gate, up = jnp.split(jnp.asarray(hidden, dtype), 2, -1)
    return jax.nn.silu(gate) * up * jnp.asarray(gates, dtype)


def swiglu_products(hidden, gates, w, dy, expected):
    """y, d hidden, dW and d gates of one block."""
    y, _, _ = products(activation(hidden, gates, dy.dtype), w, dy, expected)
    kept = jnp.asarray(oracle.dequantized(hidden, (1, 128)), dy.dtype)
    _, d_active, dw = products(activation(kept, gates, dy.dtype), w, dy, expected)
    gate, up = np.split(np.asarray(kept, np.float64), 2, -1)
    sigmoid = 1 / (1 + np.exp(-gate))
    d_gate = d_active * gates * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_hidden = np.concatenate([d_gate, d_active * gates * gate * sigmoid], -1)
    return y, d_hidden, dw, (d_active * gate * sigmoid * up).sum(-1, keepdims=True)


@pytest.mark.parametrize(("owners", "rows"), [("some empty", 20), ("one has all", 128)])
def test_grouped_swiglu_linear_follows_the_recipe(owners, rows):
    f, n, owners = 75, 136, OWNERS[owners]
    hidden, w, dy = padded(0, owners, rows, 2 * f), random(1, 5, f, n), padded(2, owners, rows, n)
    gates = jnp.asarray(np.random.default_rng(3).uniform(size=(4, rows, 1)), jnp.float32)
    block_expert = jnp.asarray(owners, jnp.int32)
    y, d_hidden, d_gates, dw = vjp(lambda h, g, w: grouped_swiglu_linear(h, g, w, block_expert, FP8), (hidden, gates, w), dy)
    exact = [swiglu_products(hidden[i], gates[i], w[e], dy[i], EXPERT_DOWN) for i, e in enumerate(owners)]
    assert_close(y, np.stack([block[0] for block in exact]))
    assert_close(d_hidden, np.stack([block[1] for block in exact]))
    assert_close(d_gates, np.stack([block[3] for block in exact]))
    assert_close(dw, summed(exact, owners, w.shape))


def test_swiglu_linear_follows_the_recipe():
    hidden, w, dy = random(0, 3, 50, 300), random(1, 150, 136), random(2, 3, 50, 136)
    y, d_hidden, dw = vjp(lambda h, w: swiglu_linear(h, w, FP8), (hidden, w), dy)
    exact = swiglu_products(hidden.reshape(-1, 300), jnp.ones(()), w, dy.reshape(-1, 136), ROLES["linear"][1])
    for got, of_oracle in zip((y, d_hidden, dw), exact[:3], strict=True):
        assert_close(got, of_oracle)


def test_without_fp8_they_are_the_plain_products():
    x, w, kernels, block_expert = random(0, 4, 6, 10), random(1, 10, 7), random(2, 5, 10, 7), jnp.array([1, 1, 1, 3])
    gates, narrow, hidden = jax.random.uniform(jax.random.key(0), (4, 6, 1)), random(3, 5, 5, 7), x / 50

    def active(h):
        return jax.nn.silu(h[..., :5]) * h[..., 5:]

    pairs = [
        (lambda x, w: linear(x, w, BF16), lambda x, w: x @ w, (x, w)),
        (lambda x, k: grouped_linear(x, k, block_expert, BF16), lambda x, k: x @ k[block_expert], (x, kernels)),
        (lambda h, w: swiglu_linear(h, w, BF16), lambda h, w: active(h) @ w, (hidden, narrow[0])),
        (
            lambda h, g, k: grouped_swiglu_linear(h, g, k, block_expert, BF16),
            lambda h, g, k: (active(h) * g) @ k[block_expert],
            (hidden, gates, narrow),
        ),
    ]
    dy = random(4, 4, 6, 7)
    with jax.default_matmul_precision("highest"):
        for ours, plain, arguments in pairs:
            for got, expected in zip(vjp(ours, arguments, dy), vjp(plain, arguments, dy), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def kept_for_backward(f, *arguments):
    """Shape and dtype of all that the gradient of f keeps, other than the float32 kernel and the experts of blocks."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(f, *a)[1], *arguments))
    return sorted((leaf.dtype.name, leaf.shape) for leaf in leaves if leaf.shape != arguments[-1].shape and leaf.dtype != jnp.int32)


def test_what_the_backward_pass_keeps():
    x, w = jnp.zeros((3, 64, 256), jnp.bfloat16), jnp.zeros((256, 40))
    of_rows = {name: kept_for_backward(lambda x, w, role=role: linear(x, w, FP8, role), x, w) for name, (role, _) in ROLES.items()}
    in_fp8 = [("float32", (192, 2)), ("float8_e4m3fn", (192, 256))]
    assert of_rows == {
        "linear": in_fp8,
        "expert_up": in_fp8,
        "after_attention": [("float16", (192, 256)), ("float32", (192, 2))],  # 12 of the 16 bits
    }
    assert kept_for_backward(lambda x, w: linear(x, w, BF16), x, w) == [("bfloat16", (192, 256))]


def test_swiglu_keeps_its_input_and_not_its_output():
    hidden, w = jnp.zeros((192, 256), jnp.bfloat16), jnp.zeros((128, 40))
    assert kept_for_backward(lambda h, w: swiglu_linear(h, w, FP8), hidden, w) == [
        ("bfloat16", ()),  # gates of 1
        ("float32", (192, 2)),
        ("float8_e4m3fn", (192, 256)),
    ]
    blocks, gates, kernels = hidden.reshape(3, 64, 256), jnp.zeros((3, 64, 1), jnp.bfloat16), jnp.zeros((5, 128, 40))
    owners = jnp.array([0, 2, 2])
    assert kept_for_backward(lambda h, g, w: grouped_swiglu_linear(h, g, w, owners, FP8), blocks, gates, kernels) == [
        ("bfloat16", (3, 64, 1)),
        ("float32", (3, 64, 2)),
        ("float8_e4m3fn", (3, 64, 256)),
    ]
