"""Decoding over pages through the kernel, interpreted, against the reference that gathers them."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.paged import init_pages, paged
from dsv3_jax.model.mla import MLA
from pallas_kernels import backend, mla_decode
from tests.kernels.interpreter import interpreted
from tests.small import model

CONFIG = model(kv_lora_rank=256, qk_rope_head_dim=64)
TABLE = jnp.array([[3, 1], [2, 4]])


def decode(impl, tokens, config=CONFIG, page=32, dtype="bfloat16", fp8=False, positions=None):
    """What attention says of new tokens, the second sequence being in its second page; in the second layer of a stack."""
    positions = jnp.array([[7], [page + 1]]) + jnp.arange(tokens) if positions is None else positions
    return jax.jit(lambda: attend(impl, positions, config, page, dtype, fp8))()


def attend(impl, positions, config, page, dtype, fp8):
    mla = MLA(config, "reference")
    x = jax.random.normal(jax.random.key(0), (*positions.shape, config.hidden_size), dtype)
    params = mla.init(jax.random.key(1), x, positions, None)
    pool = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(2), (2, *a.shape[1:])).astype(a.dtype), init_pages(config, 5, page, dtype, fp8).moe
    )
    mask = jnp.arange(2 * page) <= positions[:, :, None]
    store = functools.partial(paged(TABLE, impl), jnp.int32(1))
    return mla.apply(params, x, positions, pool, mask, store=store, method=MLA.decode)


def test_the_kernel_reads_pages_as_the_reference_does(monkeypatch):
    monkeypatch.setattr(mla_decode, "sm_count", lambda: 2)
    assert_same(interpreted(lambda: decode("pallas", 3)), decode("reference", 3))


def test_a_window_that_begins_before_its_sequence_is_read_as_by_the_reference(monkeypatch):
    monkeypatch.setattr(mla_decode, "sm_count", lambda: 2)
    positions = jnp.array([[63, 0], [5, 6]])  # the first one's position -1 is put into the last slot, see speculative.run_module
    (out, pool), (expected, written) = (
        interpreted(lambda: decode("pallas", 2, positions=positions)),
        decode("reference", 2, positions=positions),
    )
    assert np.isfinite(np.float32(out)).all()  # it goes on, and into nobody's page, where a NaN would reach others
    assert_same((out.at[0, 0].set(0), pool), (expected.at[0, 0].set(0), written))


def assert_same(kernel, reference):
    (out, pool), (expected, written) = kernel, reference
    np.testing.assert_array_equal(np.float32(pool.c_kv), np.float32(written.c_kv))
    difference = np.float32(out) - np.float32(expected)
    assert np.linalg.norm(difference) < 0.01 * np.linalg.norm(np.float32(expected))


def test_what_the_kernel_cannot_read_is_refused_or_logged(monkeypatch, caplog):
    with pytest.raises(NotImplementedError, match=r"c_kv: dtype float8_e4m3fn.*impl='auto'"):
        decode("pallas", 1, fp8=True)
    monkeypatch.setattr(backend, "_auto", lambda *device: True)
    with caplog.at_level(logging.INFO):
        out, _ = decode("auto", 1, dtype="float32")
    assert "reads pages by the reference: c_kv: dtype float32" in caplog.text
    np.testing.assert_array_equal(out, decode("reference", 1, dtype="float32")[0])


def test_a_chunk_of_a_prompt_is_no_decoding():
    np.testing.assert_array_equal(decode("pallas", 6)[0], decode("reference", 6)[0])
