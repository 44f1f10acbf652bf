"""What the kernels of every folder say of memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def tiled(*shape: int, swizzle: int = 128, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory as TMA writes and wgmma reads it: 8 rows of `swizzle` bytes at a time."""
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]  # a protocol, to mypy
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))  # type: ignore[abstract]


def whole_rows(x: jax.Array, axis: int = 0) -> jax.Array:
    """Rows of zeros up to a multiple of eight, which Mosaic's tiled copies need; where some lack, this copies x."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % 8)
    return jnp.pad(x, padding)
