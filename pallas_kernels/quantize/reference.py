"""What the kernels of this folder compute, in plain JAX (V3 sec. 3.3.2). This is the rule; the kernels follow it.

E4M3; E5M6, held in float16, where an input is kept. The scale of a tile is `max(max |x| / largest number, smallest normal)`,
1 for a tile of zeros; NaN is left out of it and stays NaN in the values; infinity gives an infinite scale, so its tile becomes
NaN and zeros. Subnormal float32 counts as zero. Division and rounding are those of IEEE: once to float32, once to the format,
ties to even.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.parts import Operand, in_parts

BLOCK = 128
SMALLEST_NORMAL = 2.0**-126
E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
E5M6_MAX, E5M6_BITS, E5M6_MIN_EXPONENT = 65024.0, 6, -14


def quantize_rows(x: Array, power_of_two: bool = False) -> tuple[Array, Array]:
    """See `pallas_kernels.quantize.quantize_rows`."""
    values, scales = _by_columns(x, power_of_two)
    return values, _rows_last(scales)


def quantize_and_keep(x: Array) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.quantize_and_keep`."""
    kept, scales = _in_tiles(x, 1, BLOCK, True, E5M6_MAX, _to_e5m6)
    return *quantize_rows(x), kept, _rows_last(scales)


def quantize_both(x: Array, power_of_two: bool = False, operand: Operand | None = None) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.quantize_both`."""
    return *quantize_rows(x, power_of_two), *_turned(x, power_of_two, operand)


def quantize_blocks(w: Array) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.quantize_blocks`."""
    values, scales = _in_tiles(w, BLOCK, BLOCK, False)
    return values, values.mT, scales, scales.mT


def swiglu_quantize(hidden: Array, gates: Array | None, power_of_two: bool = False) -> tuple[Array, Array, Array, Array]:
    """See `pallas_kernels.quantize.swiglu_quantize`."""
    return *quantize_rows(_swiglu(hidden.astype(jnp.float32), gates), power_of_two), *quantize_rows(hidden)


def swiglu_backward(
    hidden: Array,
    scales: Array,
    gates: Array | None,
    d_act: Array,
    power_of_two: bool = False,
    act_power_of_two: bool = False,
    parts: bool = False,
) -> tuple[Array, Array, Array, Array, Array, Array, Array | None]:
    """See `pallas_kernels.quantize.swiglu_backward`."""
    dequantized, d_act = dequantize_rows(hidden, scales), d_act.astype(jnp.float32)
    if gates is None:
        act, back = jax.vjp(lambda h: _swiglu(h, None), dequantized)
        (d_hidden,), d_gates = back(d_act), None
    else:
        act, back = jax.vjp(_swiglu, dequantized, gates)
        d_hidden, d_gates = back(d_act)
    kept = dequantize_rows(*quantize_rows(act, act_power_of_two))
    operands = swiglu_operands(parts)
    return *quantize_both(d_hidden, power_of_two, operands[0]), *_turned(kept, act_power_of_two, operands[1]), d_gates


def swiglu_operands(parts: bool) -> tuple[Operand | None, Operand | None]:
    """What Wgrad takes the columns of `swiglu_backward` as, if their scales are parts: those of the gradient, and of the activation."""
    return ("right", "left") if parts else (None, None)


def retile(values: Array, scales: Array, power_of_two: bool = False, operand: Operand | None = None) -> tuple[Array, Array]:
    """See `pallas_kernels.quantize.retile`."""
    return _turned(dequantize_rows(values, scales), power_of_two, operand)


def gather_and_retile(
    values: Array, scales: Array, source: Array, power_of_two: bool = False, keep: bool = False, operand: Operand | None = None
) -> tuple[Array | None, Array, Array]:
    """See `pallas_kernels.quantize.gather_and_retile`."""
    rows = values.at[source].get(mode="fill", fill_value=0)
    return rows if keep else None, *retile(rows, scales, power_of_two, operand)


def dequantize_rows(values: Float[Array, "m k"], scales: Float[Array, "kb mp"]) -> Float[Array, "m k"]:
    """float32 of what `quantize_rows` gave."""
    m, k = values.shape
    return values.astype(jnp.float32) * jnp.repeat(scales[:, :m].T, BLOCK, axis=1)[:, :k]


def tile_scale(largest: Float[Array, "*s"], power_of_two: bool, maximum: float = E4M3_MAX) -> Float[Array, "*s"]:
    """The scale of tiles, from the largest magnitude of each, which is not NaN."""
    scale = jnp.maximum(largest * jnp.float32(1 / maximum), jnp.float32(SMALLEST_NORMAL))
    scale = jnp.where(largest < SMALLEST_NORMAL, jnp.float32(1.0), scale)
    return _round_up_to_power_of_two(scale) if power_of_two else scale


def _round_up_to_power_of_two(scale: Array) -> Array:
    """Any mantissa carries into the exponent; infinity has none."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x7FFFFF) & 0x7F800000, jnp.float32)


def _swiglu(hidden: Array, gates: Array | None) -> Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    act = jax.nn.silu(gate) * up
    return act if gates is None else act * gates[:, None]


def _turned(x: Array, power_of_two: bool, operand: Operand | None) -> tuple[Array, Array]:
    """128x1 tiles, each 128 rows transposed by themselves; rows of zeros complete the last tile."""
    padded = jnp.pad(x, ((0, -x.shape[0] % BLOCK), (0, 0)))
    values, scales = _in_tiles(padded, BLOCK, 1, power_of_two)
    if operand is not None:
        scales = in_parts(jnp.pad(scales, ((0, 0), (0, -x.shape[1] % BLOCK)), constant_values=1), operand)
    return values.reshape(-1, BLOCK, x.shape[1]).mT, scales


def _by_columns(x: Array, power_of_two: bool) -> tuple[Array, Array]:
    return _in_tiles(x, 1, BLOCK, power_of_two)


def _rows_last(scales: Float[Array, "m kb"]) -> Float[Array, "kb mp"]:
    return jnp.pad(scales.T, ((0, 0), (0, -scales.shape[0] % BLOCK)), constant_values=1.0)


def _in_tiles(
    x: Array, rows: int, columns: int, power_of_two: bool, maximum: float = E4M3_MAX, rounded: Callable[[Array], Array] | None = None
) -> tuple[Array, Array]:
    """Values, and scales `[..., tiles of rows, tiles of columns]`."""
    *batch, m, n = x.shape
    x = _flush(x)
    padding = [(0, 0)] * len(batch) + [(0, -m % rows), (0, -n % columns)]
    shape = (*batch, -(-m // rows), rows, -(-n // columns), columns)
    tiles = jnp.pad(x, padding).reshape(shape)
    largest = jnp.where(jnp.isnan(tiles), 0.0, jnp.abs(tiles)).max((-3, -1), keepdims=True)
    scale = tile_scale(largest, power_of_two, maximum)
    # Without the barrier XLA multiplies by 1 / scale, which is not the quotient.
    spread = jax.lax.optimization_barrier(jnp.broadcast_to(scale, tiles.shape))
    values = (rounded or _to_e4m3)(tiles / spread).reshape(*batch, shape[-4] * rows, shape[-2] * columns)
    return values[..., :m, :n], scale[..., 0, :, 0]


def _flush(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, jnp.copysign(0.0, x), x)


def _to_e5m6(x: Array) -> Array:
    """In float16; saturates, NaN and infinity stay."""
    finite = jnp.clip(_flush(x), -E5M6_MAX, E5M6_MAX)
    exponent = ((jax.lax.bitcast_convert_type(finite, jnp.int32) >> 23) & 0xFF) - 127
    quantum = jax.lax.bitcast_convert_type(jnp.maximum(exponent, E5M6_MIN_EXPONENT) - E5M6_BITS + 127 << 23, jnp.float32)
    return jnp.where(jnp.isinf(x), x, jnp.round(finite / quantum) * quantum).astype(jnp.float16)


def _to_e4m3(x: Array) -> Array:
    """Saturates; NaN and infinity become NaN."""
    finite = jnp.clip(_flush(x), -E4M3_MAX, E4M3_MAX)
    return jnp.where(jnp.isinf(x), x, finite).astype(E4M3)
