"""Speed of the products for Hopper at the sizes of DeepSeek-V3, with their error, beside XLA's bfloat16 product.

    uv run -m experiments.bench.kernels

Times are those of the kernel alone, from CUPTI: medians of calls with a cold L2 (a large buffer is written before each)
and of calls back to back. Random operands. The error is relative, by Frobenius norm, against a float32 product of the
dequantized operands, on the first rows. Needs a Hopper GPU.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench.timing import draw, kernel_seconds, require_hopper

ONLY = flags.DEFINE_string("only", "", "Time only rows whose name holds this.")
DENSE = [(4096, 2112, 7168), (4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048),
         (8192, 8192, 8192), (64, 7168, 16384), (128, 7168, 16384)]  # fmt: skip
GROUPS = [(4, 8192), (32, 1024)]
EXPERT = [(4096, 7168), (7168, 2048)]
WGRAD = [(7168, 4096, 4096), (2048, 7168, 4096)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what runs, its operands, and its FLOPs."""

    name: str
    run: Callable[..., Any]
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    flops: int
    experts: int = 0  # a last operand says which of them owns each 128 rows
    exact: bool = False  # whether the error is to be computed


def main() -> int:
    require_hopper()
    print(f"{'product':<44} {'cold':>7} {'back to back':>13} TFLOP/s  {'cold us':>9}  error", flush=True)
    for row in rows():
        if ONLY.value in row.name:
            print(line(row), flush=True)
    return 0


def rows() -> list[Row]:
    """The table, by kind of product."""
    import jax.numpy as jnp

    from pallas_kernels import gemm, grouped_gemm

    f8, f32, bf16 = "float8_e4m3fn", "float32", "bfloat16"
    table: list[Row] = []
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    for m, n, k in DENSE:
        scales, mp = -(-k // 128), -(-m // 128) * 128
        shapes = ((m, k), f8), ((scales, mp), f32), ((n, k), f8), ((-(-n // 128), scales), f32)
        table.append(Row(f"gemm {m},{n},{k}", gemm.gemm, shapes, 2 * m * n * k, exact=True))
        table.append(Row(f"XLA bfloat16 {m},{n},{k}", lambda a, b: a @ b.T, (((m, k), bf16), ((n, k), bf16)), 2 * m * n * k))
    for m, n, k in WGRAD:
        shapes = ((m, k), f8), ((k // 128, m), f32), ((n, k), f8), ((k // 128, n), f32)
        table.append(Row(f"wgrad {m},{n},{k}", gemm.wgrad, shapes, 2 * m * n * k))
        table.append(Row(f"wgrad, accumulated {m},{n},{k}", gemm.wgrad, (*shapes, ((m, n), f32)), 2 * m * n * k))
    for e, each in GROUPS:
        for n, k in EXPERT:
            m, together = e * each, each // 128
            shapes = ((m, k), f8), ((k // 128, m), f32), ((e, n, k), f8), ((e, -(-n // 128), k // 128), f32)
            grouped = lambda a, sa, b, sb, owner, t=together: grouped_gemm.grouped_gemm(a, sa, b, sb, owner, t)  # noqa: E731
            half = lambda a, b, owner, t=together: grouped_gemm.grouped_gemm_bf16(a, b, owner, t)  # noqa: E731
            table.append(Row(f"grouped {e} x {each},{n},{k}", grouped, shapes, 2 * m * n * k, e))
            table.append(Row(f"grouped bfloat16 {e} x {each},{n},{k}", half, (((m, k), bf16), ((e, n, k), bf16)), 2 * m * n * k, e))
    e, m, n, k = 4, 4096, 7168, 8192
    shapes = ((m, e * k), f8), ((e * k // 128, m), f32), ((n, e * k), f8), ((e * k // 128, n), f32)
    first = jnp.arange(e + 1, dtype=jnp.int32) * (k // 128)
    run = lambda a, sa, b, sb: grouped_gemm.grouped_wgrad(a, sa, b, sb, first)  # noqa: E731
    return [*table, Row(f"grouped wgrad {e} x {m},{n},{k}", run, shapes, 2 * e * m * n * k)]


def line(row: Row) -> str:
    """Times one product."""
    import jax
    import jax.numpy as jnp

    operands = [draw(i, *shape) for i, shape in enumerate(row.shapes)]
    if row.experts:
        operands.append(jnp.arange(row.shapes[0][0][0] // 128, dtype=jnp.int32) * row.experts * 128 // row.shapes[0][0][0])
    run = jax.jit(row.run)
    cold, warm = (kernel_seconds(run, operands, clear) for clear in (True, False))
    rate = [row.flops / seconds / 1e12 for seconds in (cold, warm)]
    return f"{row.name:<44} {rate[0]:>7.0f} {rate[1]:>13.0f}          {cold * 1e6:>9.1f}  {error(run, operands) if row.exact else ''}"


def error(run: Callable[..., Any], operands: list[Any], rows_checked: int = 256) -> str:
    """Relative error of the first rows."""
    import jax
    import jax.numpy as jnp

    a, a_scales, b, b_scales = operands
    a, a_scales = a[:rows_checked].astype(jnp.float32), a_scales[:, : min(rows_checked, a.shape[0])]
    left = a * jnp.repeat(a_scales.T, 128, 1)[:, : a.shape[1]]
    right = b.astype(jnp.float32) * jnp.repeat(jnp.repeat(b_scales, 128, 0)[: b.shape[0]], 128, 1)[:, : b.shape[1]]
    expected = jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST)
    difference = run(*operands)[:rows_checked].astype(jnp.float32) - expected
    return f"{float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected)):.2e}"


if __name__ == "__main__":
    cli.run(main)
