"""How far the products of experiments.bench.kernels are off.

Each function takes a result and the operands that made it, and returns the error of its first rows: relative, by Frobenius norm, against a
float32 product of the dequantized operands.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.precision.quantize import BLOCK, Quantized, dequantize

ROWS = 256  # of a result; of a product in groups the first 128, which have one owner


def plain(out: Array, a: Array, b: Array, owners: Array | None = None) -> Array:
    """Of a [m, k] by b [n, k], or [e, n, k] with the owner of each 128 rows, without scales."""
    return _relative(out, a, b) if owners is None else _relative(out[:BLOCK], a, b[owners[0]])


def weights_lie(out: Array, a: Array, b: Array) -> Array:
    """Of a [m, k], whose first rows belong to the first expert, by b [e, k, n]."""
    return _relative(out[:BLOCK], a, b[0].T)


def blocks(out: Array, a: Array, a_scales: Array, b: Array, b_scales: Array, owners: Array | None = None) -> Array:
    """The same as `plain`, with scales of 1x128 and 128x128."""
    if owners is not None:
        out, b, b_scales = out[:BLOCK], b[owners[0]], b_scales[owners[0]]
    rows = min(ROWS, len(out))
    left = Quantized(a[:rows], a_scales.T[:rows], (1, BLOCK))
    return _relative(out, dequantize(left), dequantize(Quantized(b, b_scales, (BLOCK, BLOCK))))


def first_expert(out: Array, a: Array, a_scales: Array, b: Array, b_scales: Array) -> Array:
    """Of a [e, m, k] by b [e, n, k], with scales of 1x128 and 128x128."""
    return blocks(out[0], a[0], a_scales[0], b[0], b_scales[0])


def first_lies(out: Array, a: Array, b: Array) -> Array:
    """Of a [e, m, k] by b [e, k, n], without scales."""
    return weights_lie(out[0], a[0], b)


def columns(
    out: Array, a: Array, a_scales: Array, b: Array, b_scales: Array, addend: Array | None = None, steps: int | None = None
) -> Array:
    """Of Wgrad: a [tokens / 128, m, 128] by b, with scales of 128x1, less what it was added to. `steps`: of the first of several groups."""
    total = out if addend is None else out - addend
    if steps is not None:
        total = total[0]
    left, right = (_tokens_last(x[:steps], scales[:steps]) for x, scales in ((a[:, :ROWS], a_scales[:, :ROWS]), (b, b_scales)))
    return _relative(total, left, right)


def _tokens_last(x: Array, scales: Array) -> Array:
    return dequantize(Quantized(x, scales[:, :, None], (1, BLOCK))).swapaxes(0, 1).reshape(x.shape[1], -1)


# XLA would look for the fastest float32 product of each shape, for ten seconds.
@functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})
def _error(out: Array, left: Array, right: Array) -> Array:
    expected = jnp.matmul(left.astype(jnp.float32), right.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    return jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


def _relative(out: Array, left: Array, right: Array) -> Array:
    rows = min(ROWS, len(out))
    return _error(out[:rows], left[:rows], right)
