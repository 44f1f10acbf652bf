"""Time and error of causal attention at the widths of MLA, forward and with its gradient, by every implementation that is here.

    uv run -m experiments.bench.attention --config=configs/h200.py

In the dtype of train.compute_dtype, on rows of train.sequence_length random tokens. Operations are those of a causal mask, on widths
without padding: 2 products forward, 5 backward. The error is relative, by Frobenius norm, against plain JAX in float32 on the
same operands. tokamax takes part where it is installed and there is a GPU.
"""

from collections.abc import Callable
from typing import Any

from absl import flags

from dsv3_jax.config import ModelConfig
from experiments import cli
from experiments.bench.timing import matmul_rate, median_seconds
from experiments.output import table

CONFIG = cli.define_config()
BATCH = flags.DEFINE_integer("batch", 2, "Rows at once; plain JAX holds all their scores.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed runs; the median counts.", lower_bound=5)

Attend = Callable[[Any, Any, Any], Any]  # q, k, v


def main() -> int:
    config = cli.read_config(CONFIG)
    m, dtype, length = config.model, config.train.compute_dtype, config.train.sequence_length
    operands = draw(m, dtype, BATCH.value, length)
    exact = exact_results(operands, m)
    work = [flops(m, BATCH.value, length, backward) for backward in (False, True)]
    refused = ""
    rows: list[tuple[str, ...]] = [("implementation", "forward", "TFLOP/s", "and backward", "TFLOP/s", "error", "of the gradients")]
    for name, attend in implementations(m).items():
        try:
            error = errors(attend, operands, exact)
        except NotImplementedError as reason:
            refused += f"\n{name}: {reason}"
            continue
        times = [median_seconds(f, *operands, repeats=REPEATS.value) for f in compiled(attend)]
        cells = [cell for t, n in zip(times, work, strict=True) for cell in (f"{t * 1e3:.2f} ms", f"{n / t / 1e12:.2f}")]
        rows.append((name, *cells, f"{error[0]:.1e}", f"{max(error[1:]):.1e}"))
    what = f"{BATCH.value} rows of {length} tokens, {m.num_attention_heads} heads, {m.qk_head_dim} and {m.v_head_dim} wide, {dtype}"
    print(f"{what}; a large product: {matmul_rate(dtype) / 1e12:.2f} TFLOP/s\n\n{table(rows, '<>>>>>>')}{refused}")
    return 0


def implementations(config: ModelConfig) -> dict[str, Attend]:
    """What can compute it on this machine, by name."""
    import importlib.util

    import jax

    from dsv3_jax.model.attention import attention
    from dsv3_jax.model.layers import softmax_scale

    scale = softmax_scale(config)

    def ours(impl: str) -> Attend:
        return lambda q, k, v: attention(q, k, v, scale=scale, impl=impl)

    found = {"plain JAX": ours("reference")}
    if jax.default_backend() == "gpu":
        found["cuDNN, V padded"] = ours("cudnn")
        if importlib.util.find_spec("tokamax"):
            import tokamax

            found["tokamax"] = lambda q, k, v: tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="mosaic")
    return found


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


if __name__ == "__main__":
    cli.run(main)
