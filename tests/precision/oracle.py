"""The formats and the quantization rule once more, in NumPy: by looking values up in a table of all that a format can hold."""

import numpy as np

# exponent bits, mantissa bits, codes at the top that are not finite
_LAYOUT = {"E4M3": (4, 3, 1), "E5M2": (5, 2, 4), "E5M6": (5, 6, 64)}
SMALLEST_NORMAL = np.float32(2.0**-126)


def table(name):
    """All finite values that are not negative, by code; so even codes have even mantissas."""
    exponent_bits, mantissa_bits, special = _LAYOUT[name]
    code = np.arange(2 ** (exponent_bits + mantissa_bits) - special)
    biased, mantissa = code >> mantissa_bits, code % 2**mantissa_bits
    fraction = mantissa / 2**mantissa_bits + (biased > 0)
    return fraction * 2.0 ** (np.maximum(biased, 1) - 2 ** (exponent_bits - 1) + 1)


def rounded(x, name):
    """The nearest table entry to each float32, as float64; at a midpoint the one with the even code."""
    values, x = table(name), np.where(np.isnan(x), np.float32(np.nan), x)  # all NaNs quiet
    size = np.minimum(np.abs(np.nan_to_num(np.float64(x))), values[-1])
    above = np.searchsorted(values, size)
    below = np.maximum(above - 1, 0)
    to_above, to_below = values[above] - size, size - values[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    nearest = np.copysign(np.where(up, values[above], values[below]), x)
    nearest = np.where(np.isinf(x), np.nan if name == "E4M3" else x, nearest)
    return np.where(np.isnan(x), np.nan, nearest)


def quantized(x, tile, name="E4M3", power_of_two=False):
    """Values (float64) and scales (float32)."""
    x = np.array(x, np.float32)
    x[np.abs(x) < SMALLEST_NORMAL] = 0
    heights, widths = (np.arange(0, n, t or n) for n, t in zip(x.shape[-2:], tile, strict=True))
    with np.errstate(all="ignore"):
        largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(x), heights, axis=-2), widths, axis=-1)
        scales = np.maximum(largest * np.float32(1 / table(name)[-1]), SMALLEST_NORMAL)
        scales[largest == 0] = 1
        if power_of_two:
            fraction, power = np.frexp(scales)
            up = np.ldexp(np.float32(1), np.where(fraction == 0.5, power - 1, power))
            scales = np.where(np.isfinite(scales), up, scales).astype(np.float32)
        return rounded(x / over_elements(scales, tile, x.shape), name), scales


def over_elements(scales, tile, shape):
    """The scale of each element."""
    rows, columns = (np.arange(n) // (t or n) for n, t in zip(shape[-2:], tile, strict=True))
    return scales[..., rows[:, None], columns]


def dequantized(x, tile, name="E4M3", power_of_two=False):
    """What quantizing leaves of x, exact in float64."""
    values, scales = quantized(x, tile, name, power_of_two)
    return values * over_elements(np.float64(scales), tile, values.shape)
