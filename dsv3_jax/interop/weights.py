"""Weights to be read part by part, wherever they lie, and the way from there to parameters on devices.

A source answers for a slice of one stacked parameter; `load_params` asks it, for every device, for that
device's part alone.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.layout import abstract_tree, leaf_shapes
from dsv3_jax.model.transformer import Params, RouterBias
from dsv3_jax.precision.quantize import BLOCK

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
Index = tuple[slice, ...]


@runtime_checkable
class WeightSource(Protocol):
    """Stacked parameters that can be read in part."""

    config: ModelConfig

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype a parameter is kept in; FP8 has scales beside it."""

    def read(self, path: str, index: Index) -> np.ndarray:
        """A part of a parameter as it is kept."""

    def read_scale(self, path: str, index: Index) -> np.ndarray:
        """A part of the scales of a parameter that is kept in FP8; the index counts scales."""


Shardings = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def load_params(source: WeightSource, dtype: str, sharding: Shardings) -> tuple[Params, RouterBias]:
    """Parameters in `dtype` (FP8 ones dequantized) and router bias in float32, each device reading only its part.

    `sharding`: of every parameter, or a function of its path ("params/moe/mlp/router", "bias/moe") and shape.
    """
    sharding_of = sharding if callable(sharding) else lambda path, shape: sharding

    def reader(path: str, shape: tuple[int, ...]) -> Callable[[Any], np.ndarray]:
        kind = kept_dtype(source, path, dtype)
        return lambda index: read_as(source, path, whole_index(index, shape), kind) if 0 not in shape else np.zeros(shape, kind)

    shapes = leaf_shapes(source.config)
    leaves = [jax.make_array_from_callback(shape, sharding_of(path, shape), reader(path, shape)) for path, shape in shapes.items()]
    tree = jax.tree.unflatten(jax.tree.structure(abstract_tree(source.config)), leaves)
    return tree["params"], RouterBias(**tree["bias"])


def kept_dtype(source: WeightSource, path: str, dtype: str) -> np.dtype:
    """What a parameter becomes where `dtype` is asked for: source (as it is stored, FP8 included), float32 or bfloat16."""
    if dtype == "source":
        return source.stored_dtype(path)
    # The router bias stays float32: its steps of 0.001 are lost in bfloat16.
    return np.dtype(np.float32) if path.startswith("bias/") else jax.numpy.dtype(dtype)


def read_as(source: WeightSource, path: str, index: Index, dtype: np.dtype) -> np.ndarray:
    """A part of a parameter in another dtype, dequantized when it is kept in FP8."""
    values = source.read(path, index)
    if source.stored_dtype(path) != FP8 or dtype == FP8:
        return values.astype(dtype, copy=False)
    blocked = _blocked_axes(path, len(index))
    # Scales of the blocks that the part touches, then each repeated over its rows and columns.
    touched = tuple(slice(s.start // BLOCK, -(-s.stop // BLOCK)) if i in blocked else s for i, s in enumerate(index))
    scale = source.read_scale(path, touched)
    for axis in blocked:
        block_of = np.arange(index[axis].start, index[axis].stop) // BLOCK - touched[axis].start
        scale = np.take(scale, block_of, axis=axis)
    return (values.astype(np.float32) * scale).astype(dtype, copy=False)


class ArraySource:
    """Parameters that are in memory, as a `WeightSource`."""

    def __init__(self, config: ModelConfig, params: Params, bias: RouterBias):
        self.config = config
        leaves = jax.tree.leaves({"bias": bias._asdict(), "params": params})
        self._arrays = dict(zip(leaf_shapes(config), map(np.asarray, leaves), strict=True))

    def stored_dtype(self, path: str) -> np.dtype:
        return self._arrays[path].dtype

    def read(self, path: str, index: Index) -> np.ndarray:
        return self._arrays[path][index]

    def read_scale(self, path: str, index: Index) -> np.ndarray:
        raise NotImplementedError(f"{path}[{index}]: parameters in memory are never FP8")


def _blocked_axes(path: str, ndim: int) -> tuple[int, int]:
    """The axes of a stack of matrices that scales lie along: in, and out; gate and up are a pair between them."""
    return (ndim - 3 if path.endswith("gate_up_proj") else ndim - 2), ndim - 1


def whole_index(index: Index, shape: tuple[int, ...]) -> Index:
    """The same index with every start and stop spelt out."""
    return tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, shape, strict=True))
