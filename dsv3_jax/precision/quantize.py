"""Fine-grained quantization: one scale for a tile of a tensor, found from the tile itself (V3 sec. 3.3.2).

A tile is `(rows, columns)` of the last two axes: (1, 128) for activations, (128, 128) for weights, (128, 1) where a
product sums over rows; 0 stands for the whole axis. Edge tiles are smaller. `scale = max |x| / largest number`, found
online; a tile of zeros has scale 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.precision.formats import E4M3, SMALLEST_NORMAL, Format, flush, round_up_to_power_of_two

BLOCK = 128  # of the recipe's tiles; also the edge of the squares that scales of public FP8 weights belong to
Tile = tuple[int, int]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("tile",))
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Values in a low format and the scale of every tile: the tensor is their product."""

    # Arrays; JAX also rebuilds such a tree around things of its own.
    values: Array | Any  # [..., m, n]
    scales: Array | Any  # [..., tiles of m, tiles of n], float32
    tile: Tile

    def transpose(self) -> "Quantized":
        """The last two axes exchanged; tiles turn with them, nothing is rounded."""
        return Quantized(self.values.mT, self.scales.mT, self.tile[::-1])


Kernel = Array | Quantized  # weights of a linear layer: the master, or what `at_rest` makes of it


def quantize(x: Float[Array, "*b m n"], tile: Tile, format: Format = E4M3, power_of_two: bool = False) -> Quantized:
    """Rounds every tile to `format` after division by its scale. `power_of_two`: scales are rounded up to powers of two."""
    whole = _whole_tile(tile, x.shape)
    x = flush(x)
    # A NaN is left out of the scale, so that it stays alone; backends differ in whether max would drop it.
    size = jnp.where(jnp.isnan(x), 0.0, jnp.abs(x))
    largest = _tiled(size, whole).max((-3, -1))
    scales = jnp.where(largest == 0, 1.0, jnp.maximum(largest * jnp.float32(1 / format.max), SMALLEST_NORMAL))
    if power_of_two:
        scales = round_up_to_power_of_two(scales)
    # A power of two has an exact inverse, and a product takes a fraction of a division's time.
    quotient = x * _spread(1 / scales, whole, x.shape) if power_of_two else x / _spread(scales, whole, x.shape)
    return Quantized(format.round(quotient), scales, tile)


def dequantize(q: Quantized, dtype: str = "float32") -> Float[Array, "*b m n"]:
    """Values times scales, rounded once to `dtype`."""
    scales = _spread(q.scales, _whole_tile(q.tile, q.values.shape), q.values.shape)
    return (q.values.astype(jnp.float32) * scales).astype(dtype)


def retile(q: Quantized, tile: Tile, format: Format = E4M3, power_of_two: bool = False) -> Quantized:
    """The same tensor in other tiles: dequantize, quantize. For Wgrad, 1x128 becomes 128x1 (V3 sec. 3.3.2)."""
    return quantize(dequantize(q), tile, format, power_of_two)


def at_rest(kernel: Float[Array, "*b k n"], tile: Tile) -> Quantized:
    """A kernel for FP8, quantized once instead of in every product, and turned as Fprop reads it, [n, k]. It has no gradients."""
    return quantize(kernel, tile).transpose()


def is_at_rest(kernel: Kernel) -> bool:
    """Whether nothing can be trained: masters are float32."""
    return isinstance(kernel, Quantized) or kernel.dtype != jnp.float32


def kernel_shape(kernel: Kernel) -> tuple[int, ...]:
    """[..., k, n]."""
    return kernel.values.mT.shape if isinstance(kernel, Quantized) else kernel.shape


def scales_along(q: Quantized, start: int, axis: int) -> Float[Array, "*b m n"]:
    """Scales of the slice of `BLOCK` rows (axis -2) or columns (-1) from `start`, spread over the other axis; 1 wide on this one."""
    whole = _whole_tile(q.tile, q.values.shape)
    other = -3 - axis
    picked = jax.lax.slice_in_dim(q.scales, start // whole[axis], start // whole[axis] + 1, axis=q.scales.ndim + axis)
    return _repeat(picked, whole[other], q.values.shape[other], other)


def _whole_tile(tile: Tile, shape: tuple[int, ...]) -> Tile:
    return tile[0] or max(shape[-2], 1), tile[1] or max(shape[-1], 1)


def _tiled(x: Array, tile: Tile) -> Array:
    """[..., tiles, rows, tiles, columns], padded with zeros."""
    m, n = x.shape[-2:]
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -m % tile[0]), (0, -n % tile[1])]
    x = jnp.pad(x, padding)
    return x.reshape(*x.shape[:-2], x.shape[-2] // tile[0], tile[0], x.shape[-1] // tile[1], tile[1])


def _spread(scales: Array, tile: Tile, shape: tuple[int, ...]) -> Array:
    return _repeat(_repeat(scales, tile[0], shape[-2], -2), tile[1], shape[-1], -1)


def _repeat(scales: Array, times: int, length: int, axis: int) -> Array:
    if times == 1:
        return scales
    return jax.lax.slice_in_dim(jnp.repeat(scales, times, axis=axis), 0, length, axis=scales.ndim + axis)
