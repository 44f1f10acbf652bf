"""Speed of one training step of a configuration: tokens/s, compilation, model FLOPs utilisation, memory.

    uv run -m experiments.bench.train_step --config=configs/tiny.py
    uv run -m experiments.bench.train_step --config=configs/tiny.py --peer_python=PYTHON_WITH_TORCH

Random tokens, one micro-batch a step. Utilisation is against a large matrix product timed in the same
run. On a GPU the profiler lists the kernels of one more step. With --peer_python, a Python that has
torch and transformers, transformers' model of the same configuration is timed on the same machine after
it, and the ratio printed.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench.peer import training_rates
from experiments.bench.timing import matmul_rate
from experiments.output import check_outputs

CONFIG = cli.define_config()
STEPS = flags.DEFINE_integer("steps", 10, "Timed steps; the median counts.", lower_bound=1)
PEER = flags.DEFINE_string("peer_python", None, "A Python interpreter with torch and transformers to compare with.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def main() -> int:
    from dsv3_jax.training.metrics import write_json
    from experiments.bench.trace import kernel_table

    config = cli.read_config(CONFIG)
    check_outputs(JSON)
    train, result = config.train, measure(config, STEPS.value)
    times = [f"{result[name] * 1e3:,.1f}" for name in ("step_seconds", "fastest_seconds", "slowest_seconds")]
    rows = [
        ("device", result["device"]),
        ("parameters", f"{result['parameters'] / 1e6:,.1f} M"),
        ("micro-batch", f"{train.micro_batch_size} x {train.sequence_length}, {train.compute_dtype}, remat {train.remat}"),
        ("lowering, compilation", f"{result['lower_seconds']:.1f} s, {result['compile_seconds']:.1f} s"),
        ("step (median)", f"{times[0]} ms (fastest {times[1]}, slowest {times[2]})"),
        ("throughput", f"{result['tokens_per_second']:,.0f} tokens/s"),
        ("model FLOPs", f"{result['model_flops_per_second'] / 1e12:,.3f} TFLOP/s"),
        ("matrix product", f"{result['matmul_flops_per_second'] / 1e12:,.3f} TFLOP/s, {config.train.compute_dtype}, timed beside it"),
        ("utilisation", f"{result['utilisation']:.1%} of that"),
        ("peak memory", f"{result['peak_memory_bytes'] / 2**30:.2f} GiB; the program's own plan {result['planned_bytes'] / 2**30:.2f} GiB"),
    ]  # fmt: skip
    if PEER.value:
        result["peer"] = training_rates(PEER.value, config)
        rows += peer_rows(result, config)
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if result["kernels"]:
        print("\n" + kernel_table("kernel", result["kernels"]))
    if JSON.value:
        write_json(Path(JSON.value), result)
    return 0


def measure(config: Any, steps: int) -> dict[str, Any]:
    """Compiles and times the step of a configuration on random tokens."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.model.transformer import Execution
    from dsv3_jax.training.accounting import model_flops_per_token
    from dsv3_jax.training.finish import peak_memory
    from dsv3_jax.training.optimizer import make_optimizer
    from dsv3_jax.training.state import create_state
    from dsv3_jax.training.step import Rates, jit_train_step, make_train_step
    from experiments.bench.trace import kernel_times

    train, optimizer = config.train, make_optimizer(config.optimizer)
    state = jax.block_until_ready(jax.jit(lambda: create_state(config, optimizer))())
    shape = (1, train.micro_batch_size, train.sequence_length + 1)
    batches = [jax.random.randint(jax.random.key(i), shape, 0, config.model.vocab_size) for i in range(4)]
    rates = Rates(jnp.float32(1e-4), jnp.float32(1e-3), jnp.float32(0.3))
    step = make_train_step(config, Execution.of(config, 0), optimizer)
    started = time.perf_counter()
    lowered = jit_train_step(step).lower(state, batches[0], jnp.int32(1), rates)
    lower_seconds, started = time.perf_counter() - started, time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - started
    plan = compiled.memory_analysis()
    seconds = []
    for i in range(steps + 2):
        started = time.perf_counter()
        state, metrics = compiled(state, batches[i % 4], jnp.int32(1), rates)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    seconds = seconds[2:]
    if not np.isfinite(metrics.grad_norm):
        raise FloatingPointError("the timed step gave a gradient that is not finite")
    tokens_per_second = train.micro_batch_size * train.sequence_length / float(np.median(seconds))
    kernels = kernel_times(lambda: compiled(state, batches[0], jnp.int32(1), rates)[1])
    flops, limit = tokens_per_second * model_flops_per_token(config), matmul_rate(train.compute_dtype)
    return {
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()}), jax {jax.__version__}",
        "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
        "lower_seconds": lower_seconds,
        "compile_seconds": compile_seconds,
        "step_seconds": float(np.median(seconds)),
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "tokens_per_second": tokens_per_second,
        "model_flops_per_second": flops,
        "matmul_flops_per_second": limit,
        "utilisation": flops / limit,
        "peak_memory_bytes": peak_memory(),
        "kernels": kernels,
        "planned_bytes": plan.temp_size_in_bytes + plan.argument_size_in_bytes if plan else 0,
    }


def peer_rows(result: dict[str, Any], config: Any) -> list[tuple[str, str]]:
    """The peer as it comes, compiled, and with MTP modules, each beside ours doing the same work.

    Ours is timed again after the peer, so that a slow minute of the machine does not fall on one side alone.
    """
    rates = {True: max(result["tokens_per_second"], measure(config, STEPS.value)["tokens_per_second"])}
    if config.model.num_nextn_predict_layers:
        main_model = dataclasses.replace(config.model, num_nextn_predict_layers=0)
        rates[False] = measure(dataclasses.replace(config, model=main_model), STEPS.value)["tokens_per_second"]
    result["main_model_tokens_per_second"] = rates.get(False, rates[True])
    result["tokens_per_second"] = rates[True]
    rows = [("ours again", f"{rates[True]:,.0f} tokens/s; without MTP {result['main_model_tokens_per_second']:,.0f}")]
    for figures in result["peer"]:
        peer_rate, same_work = figures["tokens_per_second"], rates[figures["mtp"] or False not in rates]
        ratios = f"ours {rates[True] / peer_rate:.2f}x as configured, {same_work / peer_rate:.2f}x at the same work"
        rows.append(("transformers", f"{peer_rate:,.0f} tokens/s ({figures['implementation']}); {ratios}"))
    return rows


if __name__ == "__main__":
    cli.run(main, keeps_programs=False)
