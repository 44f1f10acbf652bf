"""Time of the FFNs of one MoE layer, forward and backward, in FP8 and in bfloat16, on one device.

    uv run -m experiments.bench.moe_layer --config=configs/h200.py

Routed experts under an uneven load, with the gather of their rows into blocks and the sum of what comes back, and the
shared experts, on random data. Both policies run in one process; a large product beside them says what the machine
does at its best, and the profiler lists the kernels of one call of each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench.timing import matmul_rate, median_seconds

CONFIG = cli.define_config()
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed runs; the median counts.", lower_bound=5)


def main() -> int:
    from experiments.bench.trace import kernel_table, kernel_times

    config = cli.read_config(CONFIG)
    m, tokens = config.model, config.train.micro_batch_size * config.train.sequence_length
    experts = m.num_experts_per_tok + m.n_shared_experts
    flops = 3 * 2 * tokens * experts * 3 * m.hidden_size * m.moe_intermediate_size
    arguments = operands(config)
    seconds, kernels = {}, {}
    for policy in ("bf16", "fp8"):
        run = layer(config, policy)
        seconds[policy] = median_seconds(run, *arguments, repeats=REPEATS.value)
        kernels[policy] = kernel_times(partial(run, *arguments))
        print(f"{policy:<5} {seconds[policy] * 1e3:8.2f} ms  {flops / seconds[policy] / 1e12:7.1f} TFLOP/s", flush=True)
    dtype = config.train.compute_dtype
    print(
        f"FP8 is {seconds['bf16'] / seconds['fp8']:.2f} times as fast; a large product in {dtype}: {matmul_rate(dtype) / 1e12:.1f} TFLOP/s"
    )
    for policy, times in kernels.items():
        if times:
            print("\n" + kernel_table(policy, times))
    return 0


def layer(config: Any, policy: str) -> Callable[..., Any]:
    """Gradients of the routed and shared experts with respect to their input and weights, compiled."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from dsv3_jax.model.moe import block_rows, expert_ffn
    from dsv3_jax.precision.linear import ffn
    from dsv3_jax.precision.policy import Recipe

    m, recipe = config.model, Recipe.of(dataclasses.replace(config.precision, policy=policy))
    pairs = config.train.micro_batch_size * config.train.sequence_length * m.num_experts_per_tok
    rows = block_rows(pairs, m.n_routed_experts, jax.default_backend())

    def loss(x: Any, weights: Any, routing: Any, dy: Any) -> Any:
        gate_up, down, shared_up, shared_down = weights
        y = expert_ffn(x, routing, gate_up, down, rows, recipe)[0] + ffn(x, shared_up, shared_down, recipe)
        return (y * dy).sum(dtype=jnp.float32)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def operands(config: Any) -> tuple[Any, ...]:
    """Random input, float32 weights, a routing in which popular experts get several times the mean, and a gradient."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.model.router import Routing

    m, tokens = config.model, config.train.micro_batch_size * config.train.sequence_length
    keys = iter(jax.random.split(jax.random.key(0), 8))
    e, d, f, shared = m.n_routed_experts, m.hidden_size, m.moe_intermediate_size, m.n_shared_experts * m.moe_intermediate_size
    shapes = (e, d, 2, f), (e, f, d), (d, 2 * shared), (shared, d)
    weights = tuple(jax.random.normal(next(keys), shape) * 0.02 for shape in shapes)
    popularity = jax.random.normal(next(keys), (e,)) + jax.random.gumbel(next(keys), (tokens, e))
    scores, experts = jax.lax.top_k(popularity, m.num_experts_per_tok)
    routing = Routing(experts, jax.nn.softmax(scores), jax.nn.softmax(popularity))
    dtype = config.train.compute_dtype
    x, dy = (jax.random.normal(next(keys), (tokens, d), jnp.dtype(dtype)) for _ in range(2))
    return x, weights, routing, dy


if __name__ == "__main__":
    cli.run(main)
