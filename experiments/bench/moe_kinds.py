"""The MoE layer that experiments.bench.moe_layer times, its operands, and what each of its kernels is for."""

import re
from collections.abc import Callable
from typing import Any

from experiments.bench.hlo import parse
from experiments.bench.timing import draw
from experiments.output import table

PRODUCTS, NUMBERS, DISPATCH, OTHER = "products", "quantizers, SwiGLU, casts of weights", "dispatch: plan, gather, sum of rows", "other"
# What a kernel is for: the first that "name|scopes of what XLA fused into it" matches.
KINDS = (
    (r"^[^|]*(product|gemm|nvjet|cutlass|cublas)", PRODUCTS),
    (r"quantize|retile|swiglu|cast_weights|in_parts", NUMBERS),
    (r"\bdispatch\b|\bcombine\b|radix_sort", DISPATCH),
    (r"/dot_general", PRODUCTS),  # the sum of a product's parts
)


def layer(config: Any, policy: str) -> Any:
    """Output of the routed and shared experts, and gradients with respect to their input, weights and gates, to be compiled."""
    import dataclasses

    import jax

    from dsv3_jax.model.moe import expert_ffn
    from dsv3_jax.precision.linear import ffn, prepare
    from dsv3_jax.precision.policy import EXPERT_DOWN, EXPERT_UP, Recipe

    recipe, rows = Recipe.of(dataclasses.replace(config.precision, policy=policy)), _block_rows(config)

    def both_ways(x: Any, weights: Any, routing: Any, dy: Any) -> Any:
        def output(x: Any, weights: Any, gates: Any) -> Any:
            gate_up, down, shared_up, shared_down = weights
            prepared = prepare(x, recipe, EXPERT_UP)
            y, _ = expert_ffn(x, routing._replace(gates=gates), gate_up, down, rows, recipe, prepared=prepared)
            return y + ffn(x, shared_up, shared_down, recipe, (EXPERT_UP, EXPERT_DOWN), prepared)

        y, pull = jax.vjp(output, x, weights, routing.gates)
        # In training the gradient comes once the output is there. Without a barrier rows of both are gathered by one kernel.
        y, dy = jax.lax.optimization_barrier((y, dy))
        return y, pull(dy)

    return jax.jit(both_ways)


def _block_rows(config: Any) -> int:
    from dsv3_jax.model.moe import block_rows
    from pallas_kernels.backend import platform

    return block_rows(_pairs(config), config.model.n_routed_experts, platform())


def _pairs(config: Any) -> int:
    return config.train.micro_batch_size * config.train.sequence_length * config.model.num_experts_per_tok


def turning(config: Any) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """What `gather_and_retile` does in the layer besides gathering: turns rows of input and gradient. And rows that are there, in E4M3."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.model.moe import plan_blocks
    from pallas_kernels.quantize import retile

    experts = jax.ShapeDtypeStruct((_pairs(config), 1), jnp.int32)
    rows = jax.eval_shape(lambda experts: plan_blocks(experts, config.model.n_routed_experts, _block_rows(config)), experts).pair.size
    width = config.model.hidden_size
    tiles = draw(0, (rows, width), "float8_e4m3fn"), draw(1, (-(-width // 128), rows), "float32")
    return jax.jit(lambda v, s: [retile(v, s, True, side) for side in ("left", "right")]), tiles


def gathers_to_dispatch(kinds: dict[str, float], ms: float) -> dict[str, float]:
    """So much of the quantizers' time counted as dispatch instead."""
    return {**kinds, NUMBERS: kinds[NUMBERS] - ms, DISPATCH: kinds[DISPATCH] + ms}


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


def kind_of(text: str) -> Callable[[str], str]:
    """What a kernel is for, by its name: XLA names a kernel after its fusion, which is looked up in the text of the compiled program."""
    program = parse(text)
    fused = {}
    for _, line in program.instructions():
        if line.opcode == "fusion":
            inner = [part for called in line.called for part in program.computations[called]]
            fused[line.name.replace(".", "_")] = " ".join(re.findall(r'op_name="([^"]*)"', " ".join(i.attributes for i in (line, *inner))))

    def kind(kernel: str) -> str:
        described = f"{kernel}|{fused.get(kernel, '')}"
        return next((kind for pattern, kind in KINDS if re.search(pattern, described)), OTHER)

    return kind


def kind_table(bf16: dict[str, float], fp8: dict[str, float]) -> str:
    """Kernels by what they are for, ms in each policy and how many times as fast FP8 is; all of them, and all but dispatch."""
    columns = [{kind: times.get(kind, 0.0) for kind in (PRODUCTS, NUMBERS, DISPATCH, OTHER)} for times in (bf16, fp8)]
    for times in columns:
        times["all"] = sum(times.values())
        times["all but dispatch"] = times["all"] - times[DISPATCH]
    rows = [
        (kind, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}" if b else "")
        for kind, a, b in zip(columns[0], *(c.values() for c in columns), strict=True)
    ]
    return table([("kernels, ms", "bf16", "fp8", "times as fast"), *rows], "<>>>")
