"""Time and error of causal attention at the widths of MLA, forward and with its gradient, by every implementation that is here.

    uv run -m experiments.bench.attention --config=configs/h200.py

In the dtype of train.compute_dtype, on rows of train.sequence_length random tokens. Operations are those of a causal mask, on widths
without padding: 2 products forward, 5 backward. The error is relative, by Frobenius norm, against plain JAX in float32 on the
same operands. On a Hopper GPU the kernels of training take part, given queries and keys in one part, and tokamax where it is installed
with jax-triton.
"""

from absl import flags

from experiments import cli
from experiments.bench.attention_peers import compiled, draw, errors, exact_results, flops, implementations
from experiments.bench.timing import matmul_rate, median_seconds
from experiments.output import table

CONFIG = cli.define_config()
BATCH = flags.DEFINE_integer("batch", 2, "Rows at once; plain JAX holds all their scores.", lower_bound=1)
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed runs; the median counts.", lower_bound=5)


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


if __name__ == "__main__":
    cli.run(main)
