"""Time of the FFNs of one MoE layer, forward and backward, in FP8 and in bfloat16, on one device.

    uv run -m experiments.bench.moe_layer --config=configs/h200.py

Routed experts under an uneven load, with the gather of their rows into blocks and the sum of what comes back, and the
shared experts, on random data: the output, and the gradients of input, weights and gates. Both policies run in one
process; a large product beside them says what the machine does at its best, and the profiler lists the kernels of each,
by name and by what they are for, which also gives the ratio with dispatch left out on both sides: of a quantizer that
gathers its rows only as much stays as `retile` takes of rows that lie there. These are means of calls in a row: a single one
is over before the clock has settled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench.moe_kinds import gathers_to_dispatch, kind_of, kind_table, layer, operands, turning
from experiments.bench.timing import matmul_rate, median_seconds

CONFIG = cli.define_config()
TRACED = 10  # calls in a profile
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed runs; the median counts.", lower_bound=5)


def main() -> int:
    from experiments.bench.trace import by_name, kernel_table, traced

    config = cli.read_config(CONFIG)
    m, tokens = config.model, config.train.micro_batch_size * config.train.sequence_length
    experts = m.num_experts_per_tok + m.n_shared_experts
    flops = 3 * 2 * tokens * experts * 3 * m.hidden_size * m.moe_intermediate_size
    arguments = operands(config)
    seconds, kernels, kinds = {}, {}, {}
    for policy in ("bf16", "fp8"):
        run = layer(config, policy).lower(*arguments).compile()
        seconds[policy] = median_seconds(run, *arguments, repeats=REPEATS.value)
        gpus = traced(partial(in_a_row, run, arguments))
        kernels[policy], kinds[policy] = a_call(by_name(gpus)), a_call(by_name(gpus, kind_of(run.as_text())))
        print(f"{policy:<5} {seconds[policy] * 1e3:8.2f} ms  {flops / seconds[policy] / 1e12:7.1f} TFLOP/s", flush=True)
    dtype = config.train.compute_dtype
    print(
        f"FP8 is {seconds['bf16'] / seconds['fp8']:.2f} times as fast; a large product in {dtype}: {matmul_rate(dtype) / 1e12:.1f} TFLOP/s"
    )
    if kinds["fp8"]:
        gathering = sum(ms for name, ms in kernels["fp8"].items() if name.startswith("gather_and_retile"))
        if gathering:
            gathers = gathering - sum(a_call(by_name(traced(partial(in_a_row, *turning(config))))).values())
            kinds["fp8"] = gathers_to_dispatch(kinds["fp8"], gathers)
            print(f"gather_and_retile takes {gathering:.2f} ms, of which its gathers, {gathers:.2f} ms, count as dispatch")
        print("\n" + kind_table(kinds["bf16"], kinds["fp8"]))
        print(*("\n" + kernel_table(policy, times) for policy, times in kernels.items()), sep="\n")
    return 0


def in_a_row(run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The last of several calls, which end in their order; the others' results make room."""
    for _ in range(TRACED):
        out = run(*arguments)
    return out


def a_call(times: dict[str, float]) -> dict[str, float]:
    """Times of one of them."""
    return {name: ms / TRACED for name, ms in times.items()}


if __name__ == "__main__":
    cli.run(main)
