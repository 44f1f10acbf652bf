"""What the kernels of every folder say of memory."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def tiled(*shape: int, swizzle: int = 128, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory as TMA writes and wgmma reads it."""
    return plgpu.SMEM(shape, dtype, transforms=in_tiles(swizzle, dtype))


def in_tiles(swizzle: int, dtype: Any) -> tuple[Any, ...]:
    """How that lies: 8 rows of `swizzle` bytes at a time."""
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]  # a protocol, to mypy
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def here(n: jax.Array) -> jax.Array:
    """0, in a way that LLVM does not see: an index that keeps it from computing all addresses before the loop over n.

    It would hold them in registers that are needed.
    """
    return lax.shift_right_logical(n, 20)


def whole_rows(x: jax.Array, axis: int = 0) -> jax.Array:
    """Rows of zeros up to a multiple of eight, which Mosaic's tiled copies need; where some lack, this copies x."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % 8)
    return jnp.pad(x, padding)
