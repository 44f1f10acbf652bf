"""Small layers: RMSNorm, rotary positions with linear and YaRN scaling, SwiGLU, and the Linen modules that own their parameters."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.precision.linear import Prepared, Roles, ffn, linear
from dsv3_jax.precision.policy import BF16, LINEAR, Recipe, Role
from dsv3_jax.precision.quantize import Quantized


def rms_norm(x: Float[Array, "*b d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """`x / sqrt(mean(x^2) + eps) * scale`, in float32, returned in the dtype of x."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normed * scale).astype(x.dtype)


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 mscale ln(factor) + 1`, the attention temperature of YaRN (2309.00071, eq. 15)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """`1 / sqrt(nope + rope)`, times the square of YaRN's temperature when YaRN is on (V3 sec. 4.3)."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling.type == "yarn":
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rope_frequencies(config: ModelConfig) -> Float[np.ndarray, " half"]:
    """Radians a position turns each channel pair by: plain, interpolated linearly, or blended by YaRN (2309.00071, eq. 17-21)."""
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling
    frequencies = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling.type == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.type == "yarn":
        keep = 1.0 - _yarn_ramp(config)  # 1: fast pair, left as it is; 0: slow pair, interpolated
        frequencies = frequencies * keep + frequencies / scaling.factor * (1.0 - keep)
    return frequencies.astype(np.float32)


def _yarn_ramp(config: ModelConfig) -> np.ndarray:
    """0 for pairs that turn more than beta_fast times over the original length, 1 for under beta_slow, linear between."""
    dim, scaling = config.qk_rope_head_dim, config.rope_scaling

    def pair_turning(turns: float) -> float:
        wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
    return np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)


def _rope_amplitude(config: ModelConfig) -> float:
    scaling = config.rope_scaling
    if scaling.type != "yarn":
        return 1.0
    return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)


def rope(x: Float[Array, "b t h r"], positions: Int[Array, "b t"], config: ModelConfig) -> Float[Array, "b t h r"]:
    """Rotates channel pairs by position: (2i, 2i+1) when `rope_interleave`, else (i, i + r/2). Float32 inside."""
    angles = positions[:, :, None, None].astype(jnp.float32) * rope_frequencies(config)
    pairs, axis = ((-1, 2), -1) if config.rope_interleave else ((2, -1), -2)
    cos, sin = (jnp.expand_dims(f(angles) * _rope_amplitude(config), axis) for f in (jnp.cos, jnp.sin))
    paired = x.astype(jnp.float32).reshape(*x.shape[:-1], *pairs)
    # (a, b) turns to (a cos - b sin, b cos + a sin): the pair, and the pair flipped with its first sign changed.
    sign = jnp.expand_dims(jnp.array([-1.0, 1.0]), -1 if axis == -2 else 0)
    turned = paired * cos + jnp.flip(paired, axis) * (sin * sign)
    return turned.reshape(x.shape).astype(x.dtype)


def kernel_param(module: nn.Module, name: str, std: float, shape: tuple[int, ...], at_rest: type = Quantized) -> Any:
    """A module's parameter for `precision.linear`, or what there is in its place at rest (`inference.decode.at_rest`), of that type."""
    if module.has_variable("params", name) and isinstance(resting := module.get_variable("params", name), at_rest):
        return resting
    return module.param(name, nn.initializers.normal(std), shape, jnp.float32)


def joined(gate_up: Any) -> Any:
    """Gate and up [..., d, 2, f] as the kernel of one product, [..., d, 2f], as which they are at rest."""
    return gate_up if isinstance(gate_up, Quantized) else gate_up.reshape(*gate_up.shape[:-2], -1)


class RMSNorm(nn.Module):
    """Owns the scale of `rms_norm`."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, self.eps)


class Linear(nn.Module):
    """Owns a bias-free kernel [in, out] and sends it through `precision.linear`."""

    features: int
    init_std: float
    recipe: Recipe = BF16
    role: Role = LINEAR

    @nn.compact
    def __call__(self, x: Array, prepared: Prepared | None = None) -> Array:
        kernel = kernel_param(self, "kernel", self.init_std, (x.shape[-1], self.features))
        return linear(x, kernel, self.recipe, self.role, prepared)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one kernel [in, 2, ffn], read as one product."""

    ffn_size: int
    init_std: float
    recipe: Recipe = BF16
    roles: Roles = (LINEAR, LINEAR)

    @nn.compact
    def __call__(self, x: Array, prepared: Prepared | None = None) -> Array:
        d, f = x.shape[-1], self.ffn_size
        gate_up = kernel_param(self, "gate_up_proj", self.init_std, (d, 2, f))
        down = kernel_param(self, "down_proj", self.init_std, (f, d))
        return ffn(x, joined(gate_up), down, self.recipe, self.roles, prepared)
