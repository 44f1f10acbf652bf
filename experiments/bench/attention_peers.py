"""Implementations of causal attention to compare, what they have to compute, and how far off they are."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from dsv3_jax.config import ModelConfig
from experiments.bench.peer import has_tokamax

Attend = Callable[[Any, Any, Any], Any]  # q, k, v


def implementations(config: ModelConfig) -> dict[str, Attend]:
    """What can compute it on this machine, by name."""
    import jax

    from dsv3_jax.model.attention import attend
    from dsv3_jax.model.layers import softmax_scale
    from pallas_kernels.backend import is_hopper

    scale = softmax_scale(config)

    def ours(impl: str) -> Attend:
        return lambda q, k, v: attend(q, k, v, scale=scale, impl=impl).out

    found = {"plain JAX": ours("reference")}
    if jax.default_backend() == "gpu":
        found["cuDNN, V padded"] = ours("cudnn")
    if is_hopper():
        found["pallas_kernels"] = ours("pallas")
        if has_tokamax():
            found["tokamax"] = functools.partial(_tokamax(), logits_scale=scale, is_causal=True)
    return found


def _tokamax() -> Any:
    import tokamax

    # It warns at every call, with a page of its arguments, that nobody has tuned it for them.
    logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith("Autotuning cache miss"))
    return tokamax.ops.gpu.PallasMosaicFlashAttention()


def draw(config: ModelConfig, dtype: str, batch: int, length: int) -> tuple[Any, ...]:
    """Random q, k, v, and a gradient of the output."""
    import jax

    widths = (config.qk_head_dim, config.qk_head_dim, config.v_head_dim, config.v_head_dim)
    shapes = [(batch, length, config.num_attention_heads, width) for width in widths]
    return tuple(jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))


def flops(config: ModelConfig, batch: int, length: int, backward: bool) -> int:
    """Operations forward, or in both passes: scores of half a square, products of width 192 and 128 (2 and 2 x 3 of them, 1 and 2 x 2)."""
    scores = batch * config.num_attention_heads * length * (length + 1) // 2
    widths = config.qk_head_dim + config.v_head_dim
    return 2 * scores * (widths + (3 * config.qk_head_dim + 2 * config.v_head_dim if backward else 0))


def compiled(attend: Attend) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The output, and the output with the three gradients, of q, k, v and the gradient of the output."""
    import jax

    def both(q: Any, k: Any, v: Any, dy: Any) -> tuple[Any, ...]:
        y, pull = jax.vjp(attend, q, k, v)
        return (y, *pull(dy))

    return jax.jit(lambda q, k, v, dy: attend(q, k, v)), jax.jit(both)


def exact_results(operands: tuple[Any, ...], config: ModelConfig) -> tuple[Any, ...]:
    """Output and gradients by plain JAX in float32."""
    import jax
    import jax.numpy as jnp

    with jax.default_matmul_precision("highest"):
        return compiled(implementations(config)["plain JAX"])[1](*(x.astype(jnp.float32) for x in operands))


def errors(attend: Attend, operands: tuple[Any, ...], exact: tuple[Any, ...]) -> list[float]:
    """Relative errors of the output and of each gradient."""
    import jax.numpy as jnp

    pairs = zip(compiled(attend)[1](*operands), exact, strict=True)
    return [float(jnp.linalg.norm((got - right).ravel()) / jnp.linalg.norm(right.ravel())) for got, right in pairs]
