import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mla_decode as op
from pallas_kernels.mla_decode import splits
from pallas_kernels.mla_decode.sizes import DEFAULT, TuningConfig
from tests.kernels.interpreter import interpreted
from tests.kernels.mla_decode_cases import ERROR, SCALE, DecodeCases, Problem
from tests.kernels.product_cases import assert_near


class TestReference(DecodeCases):
    def run(self, problem):
        return jax.jit(functools.partial(op.mla_decode, scale=SCALE, impl="reference"))(*problem.operands)


class TestInterpreted(DecodeCases):
    """The kernel as written, with as many stretches as test the merge, and stretches that are empty."""

    def run(self, problem):
        return interpreted(lambda: op.run(*problem.operands, SCALE, splits=2))


TUNINGS = {
    "wide blocks": TuningConfig(block=64, stages=2, score_slots=1),
    "few slots, single tiles": TuningConfig(block=32, stages=2, score_slots=1, pairs=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS)
def test_every_tuning_gives_the_same(tuning):
    problem = Problem([200, 128, 0], tokens=2, heads=33, seed=1)
    assert_near(interpreted(lambda: op.run(*problem.operands, SCALE, 1, TUNINGS[tuning])), problem.expected(), ERROR)


@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "context", "config"),
    [
        (1, 1, 128, 131072, DEFAULT),
        (128, 2, 128, 4096, DEFAULT),
        (8, 4, 20, 1024, DEFAULT),
        (32, 1, 128, 131072, TUNINGS["wide blocks"]),
    ],
)
def test_sizes_of_deployment_can_be_lowered(rows, tokens, heads, context, config):
    shapes = [(rows, tokens, heads, 576), (512, 64, 512), (512, 64, 64), (rows, context // 64), (rows,)]
    operands = [jax.ShapeDtypeStruct(s, jnp.bfloat16 if len(s) > 2 else jnp.int32) for s in shapes]
    number = splits.choose(rows, -(-tokens * heads // 64), 512, context, 132)
    run = functools.partial(op.run, scale=SCALE, splits=number, config=config)
    jax.jit(run).trace(*operands).lower(lowering_platforms=("cuda",))


def test_few_long_sequences_are_split_and_many_are_not():
    number = functools.partial(splits.choose, tiles=2, rank=512, sm_count=132)
    assert number(128, longest=131072) == number(1, longest=64) == 1
    assert 32 <= number(1, longest=131072) <= 66
    assert (number(8, longest=16384), number(33, longest=16384)) == (8, 2)  # as many as fill the multiprocessors once
    assert 2 < number(48, longest=32768) <= 5  # 96 units would leave a quarter of them idle


def test_pages_in_fp8_are_dequantized_by_the_reference():
    problem, rng = Problem([100, 7], tokens=2, heads=4), np.random.default_rng(3)
    q, c_kv, k_r, table, lengths = problem.operands
    scales = jnp.asarray(np.float32(rng.uniform(0.5, 2, (*c_kv.shape[:2], 2))))
    low = c_kv.astype(jnp.float8_e4m3fn)
    problem.c_kv = low.astype(jnp.float32) * jnp.repeat(scales, 128, -1)
    out = op.mla_decode(q, low, k_r, table, lengths, SCALE, scales, impl="reference")
    assert_near(out, problem.expected(), ERROR)


SMALL = Problem([5], tokens=1, heads=2).operands


@pytest.mark.parametrize(
    ("operands", "error", "words"),
    [
        ((SMALL[0][..., 1:], *SMALL[1:]), ValueError, "q: 319 columns"),
        ((SMALL[0].astype(jnp.float32), *SMALL[1:]), ValueError, "q: dtype float32"),
        ((SMALL[0], SMALL[1].astype(jnp.float8_e4m3fn), *SMALL[2:]), NotImplementedError, "c_kv: dtype float8_e4m3fn"),
        ((jnp.tile(SMALL[0], (1, 5, 1, 1)), *SMALL[1:]), NotImplementedError, "q: 5 tokens"),
        ((SMALL[0], SMALL[1][:, :24], SMALL[2][:, :24], *SMALL[3:]), NotImplementedError, "pages of 24"),
    ],
)
def test_what_cannot_be_taken_is_named(operands, error, words):
    with pytest.raises(error, match=words):
        op.mla_decode(*operands, SCALE, impl="pallas")


def test_a_block_of_positions_lies_in_one_page():
    problem = Problem([40], tokens=1, heads=2, page=32)
    with pytest.raises(NotImplementedError, match="pages of 32: a block of 64"):
        op.run(*problem.operands, SCALE, 1, TUNINGS["wide blocks"])
