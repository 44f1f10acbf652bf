"""The products of the model by the kernels, interpreted, against the same products in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_jax.model.moe import MoE, expert_ffn
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.expert import pack, unpack
from dsv3_jax.precision import hopper
from dsv3_jax.precision.linear import ffn, grouped_linear, linear, prepare, restored
from dsv3_jax.precision.policy import AFTER_ATTENTION, EXPERT_DOWN, EXPERT_UP, LINEAR, Recipe
from dsv3_jax.precision.quantize import at_rest
from pallas_kernels import gemm, grouped_gemm, quantize
from pallas_kernels.quantize.reference import dequantize_rows
from tests.kernels import interpreter  # noqa: F401, makes it quicker
from tests.small import model


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    for kernels in (gemm, quantize):
        monkeypatch.setattr(kernels, "sm_count", lambda: 2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def both_ways(function, arguments, fp8=True, nobodys=False):
    """Value and gradients by the kernels and by the reference."""

    def run(impl, *arguments):
        value, pull = jax.vjp(lambda *a: function(*a, Recipe(fp8=fp8, impl=impl)), *arguments)
        dy = jnp.cos(jnp.arange(value.size).reshape(value.shape))
        return value, *pull(jnp.where(nobodys, 0, dy).astype(value.dtype))

    run = jax.jit(run, static_argnums=0)  # operations one by one would all be compiled
    return run("pallas", *arguments), run("reference", *arguments)


def assert_same(results, limit):
    """The reference rounds the gradient of the hidden activation to bfloat16 before it is quantized, the kernels do not."""
    for i, (kernels, reference) in enumerate(zip(*results, strict=True)):
        assert (kernels.shape, kernels.dtype) == (reference.shape, reference.dtype)
        kernels, reference = np.float32(kernels), np.float32(reference)
        assert np.linalg.norm(kernels - reference) <= limit * np.linalg.norm(reference), f"output {i}"


@pytest.mark.parametrize("role", [LINEAR, AFTER_ATTENTION], ids=["linear", "after attention"])
def test_linear(role):
    x, w = random(0, 3, 50, 192).astype(jnp.bfloat16), random(1, 192, 64)
    assert_same(both_ways(lambda x, w, recipe: linear(x, w, recipe, role), (x, w)), 4e-3)


def test_an_input_that_is_prepared():
    """Its input is made before, since attention's backward pass reads what is kept of it."""
    x, w = random(0, 3, 50, 192).astype(jnp.bfloat16), random(1, 192, 64)

    def projected(x, w, recipe):
        prepared = prepare(x, recipe, AFTER_ATTENTION)
        assert (prepared.inputs is None) == (recipe.impl == "reference")
        kept = restored(prepared.kept, "bfloat16").reshape(x.shape)
        return jnp.concatenate([linear(x, w, recipe, AFTER_ATTENTION, prepared), kept], -1)

    assert_same(both_ways(projected, (x, w)), 4e-3)


@pytest.mark.parametrize("roles", [(LINEAR, LINEAR), (EXPERT_UP, EXPERT_DOWN)], ids=["dense", "shared expert"])
def test_ffn(roles):
    x, up, down = random(0, 150, 64).astype(jnp.bfloat16), random(1, 64, 256) / 8, random(2, 128, 64) / 8
    assert_same(both_ways(lambda x, up, down, recipe: ffn(x, up, down, recipe, roles), (x, up, down)), 1.5e-2)


def test_the_gradient_of_shared_experts_is_rounded_as_dispatch_sends_it():
    """A large number in a row costs the small ones digits, in Wgrad too, though that sees each with its own column."""
    x, up, down = random(0, 150, 64).astype(jnp.bfloat16), random(1, 64, 256) / 8, random(2, 128, 64) / 8
    larger = jnp.ones(64).at[0].set(2.0**15).astype(jnp.bfloat16)
    results = both_ways(lambda *a: larger * ffn(*a, roles=(EXPERT_UP, EXPERT_DOWN)), (x, up, down))
    assert_same([[d_down[:, 1:]] for *_, d_down in results], 1.5e-2)


OWNERS = jnp.asarray([0, 2, 2, 3])  # expert 1 gets nothing, the last block is nobody's
NOBODYS = (OWNERS == 3)[:, None, None]


def blocks(seed, width):
    x = random(seed, 4, 128, width).at[3].set(0).at[0, 100:].set(0)
    return x.astype(jnp.bfloat16)


@pytest.mark.parametrize("fp8", [True, False])
def test_grouped_linear(fp8):
    function = lambda x, w, recipe: grouped_linear(x, w, OWNERS, recipe, EXPERT_UP)  # noqa: E731
    assert_same(both_ways(function, (blocks(0, 64), random(1, 3, 64, 128)), fp8, NOBODYS), 4e-3)


@pytest.mark.parametrize("width", [64, 256])  # the second is gathered by the kernel that turns it
def test_routed_ffn(width):
    """Experts of unequal load, one without any; gradients too are sums over a token's rows."""
    experts = jnp.stack([jnp.arange(150) % 5 == 0, jnp.full(150, 3)], 1).astype(jnp.int32)
    gates, up, down = jnp.abs(random(0, 150, 2)), random(1, 4, width, 2, 128) / 8, random(2, 4, 128, width) / 8

    def layer(x, gates, up, down, recipe):
        return expert_ffn(x, Routing(experts, gates, gates), up, down, 128, recipe)[0]

    assert_same(both_ways(layer, (random(3, 150, width).astype(jnp.bfloat16), gates, up, down)), 1.5e-2)


@pytest.mark.parametrize(("tokens", "fp8"), [(1, True), (20, True), (20, False)])
def test_routed_ffn_of_a_decoding_step(tokens, fp8, monkeypatch):
    """Kernels at rest, few tokens: a block for each expert, of which the third has none; against masters, in plain JAX."""
    product = "masked_gemm" if fp8 else "masked_gemm_bf16"
    experts = jnp.stack([jnp.arange(tokens) % 2, jnp.full(tokens, 3)], 1).astype(jnp.int32)
    gates, x = jnp.abs(random(0, tokens, 2)), random(3, tokens, 192).astype(jnp.bfloat16)
    up, down = random(1, 4, 192, 2, 128) / 8, random(2, 4, 128, 192) / 8

    def layer(up, down, recipe):
        return expert_ffn(x, Routing(experts, gates, gates), up, down, 128, recipe)[0]

    def by_kernels(up, down):
        recipe, called = Recipe(fp8=fp8, impl="pallas"), []
        kernel = getattr(grouped_gemm, product)
        monkeypatch.setattr(hopper, product, lambda *a: called.append(a) or kernel(*a))
        if fp8:
            up, down = at_rest(up.reshape(4, 192, 256), recipe.weight_tile), at_rest(down, recipe.weight_tile)
        else:
            up, down = up.astype(jnp.bfloat16), down.astype(jnp.bfloat16)
        out = layer(up, down, recipe)
        assert len(called) == 2
        return out

    results = jax.jit(by_kernels)(up, down), jax.jit(lambda *w: layer(*w, Recipe(fp8=fp8, impl="reference")))(up, down)
    assert_same(([result] for result in results), 4e-3)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_decoding_step_has_no_gradients(fp8):
    experts, gates, x = jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1)), jnp.ones((3, 64), jnp.bfloat16)
    up, down = jnp.ones((2, 64, 2, 128), jnp.bfloat16), jnp.ones((2, 128, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="no float32 masters"):
        jax.grad(lambda up: expert_ffn(x, Routing(experts, gates, gates), up, down, 128, Recipe(fp8, impl="pallas"))[0].sum())(up)


def test_kernels_at_rest_give_the_same_numbers():
    x, up, down = random(0, 50, 64).astype(jnp.bfloat16), random(1, 64, 256) / 8, random(2, 128, 192) / 8
    recipe = Recipe(fp8=True, impl="pallas")
    run = jax.jit(lambda up, down: (ffn(x, up, down, recipe), linear(x, up, recipe)))
    for out, rested in zip(run(up, down), run(at_rest(up, recipe.weight_tile), at_rest(down, recipe.weight_tile)), strict=True):
        np.testing.assert_array_equal(np.float32(out), np.float32(rested))


def test_both_kinds_of_experts_keep_the_same_tokens():
    config = model(hidden_size=192, moe_intermediate_size=128)
    layer, x = MoE(config, "none", Recipe(fp8=True, impl="pallas")), jax.ShapeDtypeStruct((2, 50, 192), jnp.bfloat16)
    rest = jnp.zeros(config.n_routed_experts), jnp.ones(x.shape[:2])

    def kept(x):
        params = layer.init(jax.random.key(0), x, *rest)
        return jax.tree.leaves(jax.vjp(lambda x: layer.apply(params, x, *rest).y, x)[1])

    held = {v for v in jax.make_jaxpr(kept)(x).jaxpr.outvars if v.aval.dtype == jnp.float8_e4m3fn}
    assert [v.aval.shape for v in held].count((100, 192)) == 1


def test_a_gradient_that_was_sent_is_quantized_to_the_same_numbers():
    """So none is rounded where nothing is sent. The largest number of some tiles rounds down to where a scale half as large suffices."""
    dy = (random(4, 150, 256) * 10.0 ** random(5, 150, 1)).at[:3, 0].set(230 * 2.0**10).astype(jnp.bfloat16)
    received = unpack(pack(dy), 256, "bfloat16")
    once, twice = (quantize.quantize_rows(gradient, True, "reference") for gradient in (dy, received))
    assert (received != dy).any() and (once[1][0, :3] == 2 * twice[1][0, :3]).all()
    np.testing.assert_array_equal(dequantize_rows(*once), dequantize_rows(*twice))
    for turned, again in zip(*(quantize.retile(*q, True, impl="reference") for q in (once, twice)), strict=True):
        np.testing.assert_array_equal(turned.astype(jnp.float32), again.astype(jnp.float32))


@pytest.mark.parametrize(
    ("recipe", "dtype", "width", "words"),
    [
        (Recipe(fp8=True, impl="pallas"), jnp.float32, 64, "float32, the kernels take bfloat16"),
        (Recipe(fp8=True, impl="pallas", gradient_tile=(128, 128)), jnp.bfloat16, 64, "tiles of 1x128"),
        (Recipe(fp8=True, impl="pallas"), jnp.bfloat16, 72, "multiples of 64"),
    ],
)
def test_what_the_kernels_cannot_run_is_refused(recipe, dtype, width, words):
    with pytest.raises(NotImplementedError, match=words):
        linear(jnp.zeros((128, width), dtype), jnp.zeros((width, 64)), recipe)
