import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import RopeScaling
from dsv3_jax.model.attention import attend, masked_attention, resolve_implementation
from dsv3_jax.model.layers import rope, rope_frequencies, softmax_scale
from dsv3_jax.model.mla import MLA, Latent, contiguous, expand
from dsv3_jax.precision.linear import linear
from dsv3_jax.precision.policy import BF16, Recipe
from tests.small import MODEL, model

ONE_LAYER = functools.partial(contiguous, 0)
YARN = RopeScaling("yarn", 40.0, 16, 32.0, 1.0, 1.0, 1.0)


@functools.cache
def layer(config):
    """The layer as a compiled function, its parameters, an input and its positions."""
    mla = MLA(config, "reference")
    x = jax.random.normal(jax.random.key(0), (2, 9, config.hidden_size))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    params = jax.jit(mla.init)(jax.random.key(1), x, positions, None)
    return jax.jit(mla.apply, static_argnames=("method", "store")), params, x, positions


@pytest.mark.parametrize("config", [MODEL, model(q_lora_rank=None), model(rope_scaling=YARN), model(rope_interleave=False)])
@pytest.mark.parametrize(("chunks", "first_alone"), [((1,) * 9, False), ((4, 5), False), ((4, 5), True)])
def test_absorbed_decode_equals_expanded_training_form(config, chunks, first_alone):
    apply, params, x, positions = layer(config)
    expected = apply(params, x, positions, None)
    cache = Latent(jnp.full((1, 2, 12, config.kv_lora_rank), jnp.nan), jnp.full((1, 2, 12, config.qk_rope_head_dim), jnp.nan))
    cache = jax.tree.map(lambda a: jnp.nan_to_num(a, nan=1e3), cache)  # whatever unused slots hold must not matter
    outputs, start = [], 0
    for size in chunks:
        at = positions[:, start : start + size]
        mask = None if first_alone and start == 0 else jnp.arange(12) <= at[:, :, None]
        out, cache = apply(params, x[:, start : start + size], at, cache, mask, store=ONE_LAYER, method=MLA.decode)
        outputs.append(out)
        start += size
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", [BF16, Recipe(fp8=True, impl="reference")])
def test_keys_and_values_by_two_products_are_those_of_one(recipe):
    """Heads of 128 have blocks of weights of their own, so FP8 rounds the same but for the order of sums; others go in one product."""
    rng = np.random.default_rng(3)
    c_kv, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 24, 160), (160, 3 * 256)))
    one = linear(c_kv, kernel, recipe)

    def both(kernel):
        return jnp.concatenate(expand(c_kv, kernel, 3, 128, recipe), -1).reshape(one.shape)

    np.testing.assert_allclose(both(kernel), one, rtol=1e-4, atol=1e-4)
    d = jnp.asarray(rng.normal(size=one.shape), jnp.float32)
    expected = jax.vjp(lambda w: linear(c_kv, w, recipe), kernel)[1](d)[0]
    np.testing.assert_allclose(jax.vjp(both, kernel)[1](d)[0], expected, rtol=1e-4, atol=1e-4)


def test_output_depends_on_relative_positions_only():
    apply, params, x, positions = layer(MODEL)
    np.testing.assert_allclose(apply(params, x, positions, None), apply(params, x, positions + 7, None), rtol=1e-4, atol=1e-5)


def test_segments_are_attended_apart():
    apply, params, x, positions = layer(MODEL)
    both = apply(params, x, positions, jnp.broadcast_to(jnp.arange(9) // 5, (2, 9)))
    np.testing.assert_allclose(both[:, 5:], apply(params, x[:, 5:], positions[:, 5:], None), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both[:, :5], apply(params, x[:, :5], positions[:, :5], None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleave", [True, False])
def test_rope_turns_pairs_by_position(interleave):
    config = model(rope_interleave=interleave)
    x = jax.random.normal(jax.random.key(0), (1, 5, 3, 4))
    turned = np.asarray(rope(x, jnp.arange(5)[None] * 3, config))
    pairs = [(0, 1), (2, 3)] if interleave else [(0, 2), (1, 3)]
    for i, (a, b) in enumerate(pairs):
        rotation = np.exp(1j * np.arange(5) * 3 * 10000.0 ** (-i / 2))[:, None]
        expected = (np.asarray(x[0, ..., a]) + 1j * np.asarray(x[0, ..., b])) * rotation
        np.testing.assert_allclose(turned[0, ..., a] + 1j * turned[0, ..., b], expected, atol=1e-5)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    config = model(qk_rope_head_dim=64, rope_scaling=RopeScaling("yarn", 40.0, 4096))
    plain = rope_frequencies(model(qk_rope_head_dim=64))
    ratio = rope_frequencies(config) / plain
    turns = 4096 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 40], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 0.8], 1 / 40, rtol=1e-5)
    assert (np.diff(ratio) <= 1e-7).all()
    np.testing.assert_allclose(softmax_scale(config), (8 + 64) ** -0.5 * (0.1 * np.log(40) + 1) ** 2)


def test_linear_scaling_stretches_every_position():
    linear = model(rope_scaling=RopeScaling("linear", 4.0))
    x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
    at = jnp.arange(6)[None]
    np.testing.assert_allclose(rope(x, at * 4, linear), rope(x, at, MODEL), atol=1e-5)


@pytest.mark.parametrize("segmented", [False, True])
def test_long_rows_in_pieces_equal_the_full_square(segmented):
    q, k, v = (jax.random.normal(key, (1, 256, 2, 4)) for key in jax.random.split(jax.random.key(0), 3))
    ids = jnp.arange(256)[None] // 100 if segmented else jnp.zeros((1, 256), jnp.int32)
    mask = jnp.tril(jnp.ones((256, 256), bool)) & (ids[:, :, None] == ids[:, None, :])
    got = attend(q, k, v, scale=0.5, segment_ids=ids if segmented else None, impl="reference").out
    np.testing.assert_allclose(got, masked_attention(q, k, v, 0.5, mask), atol=1e-5)


@pytest.mark.parametrize(
    ("impl", "segmented", "words"),
    [("cudnn", True, "document mask"), ("pallas", False, "8 columns: .* take 64, 128 or 192")],
)
def test_fused_attention_names_what_it_cannot_do(impl, segmented, words):
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=words):
        attend(q, q, q, scale=1.0, segment_ids=jnp.zeros((1, 4), jnp.int32) if segmented else None, impl=impl)


@pytest.mark.parametrize(
    ("backend", "dtype", "hopper", "reason", "expected"),
    [
        ("cpu", "bfloat16", False, None, "reference"),
        ("gpu", "float32", True, None, "reference"),
        ("gpu", "bfloat16", False, None, "cudnn"),
        ("gpu", "bfloat16", True, "too wide", "cudnn"),
        ("gpu", "bfloat16", True, None, "pallas"),
    ],
)
def test_auto_picks_what_the_backend_can_run(backend, dtype, hopper, reason, expected):
    assert resolve_implementation("auto", backend, dtype, hopper, reason) == expected
