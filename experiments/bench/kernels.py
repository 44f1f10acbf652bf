"""Speed of the products for Hopper at the sizes of DeepSeek-V3, with their error, beside those of XLA, and of peers that are installed.

    uv run -m experiments.bench.kernels

Times are those of the kernel alone, from CUPTI: medians of calls with a cold L2 (a large buffer is written before each)
and of calls back to back. Random operands. The error is relative, by Frobenius norm, against a float32 product of the
dequantized operands, on the first rows (`kernels_error`). DeepGEMM is timed in the same way, in a process of its own, tokamax (bfloat16)
beside ours. PyTorch's block-scaled product (cuBLASLt, the same scales) and a plain one in Triton are timed by events after a flush
of L2. Needs a Hopper GPU.
"""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import flags

from experiments import cli
from experiments.bench.peer import Peer, has_tokamax
from experiments.bench.timing import draw, kernel_seconds, require_hopper

ONLY = flags.DEFINE_list("only", [""], "Time only rows whose name holds one of these.")
DENSE = [(4096, 2112, 7168), (4096, 24576, 1536), (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048),
         (8192, 8192, 8192), (64, 7168, 16384), (128, 7168, 16384)]  # fmt: skip
GROUPS = [(4, 8192), (8, 4096), (32, 1024)]
MASKED = (32, 64)  # experts of a decoding step, and rows of each
UNEVEN = 256  # experts whose loads follow a power law
EXPERT = [(4096, 7168), (7168, 2048)]
WGRAD = [(7168, 4096, 4096), (2048, 7168, 4096)]
PIECES = [(2048, 512, 32768), (512, 6144, 32768)]  # Wgrad of few tiles, in pieces that another kernel adds up


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what runs, its operands, and its FLOPs."""

    name: str
    run: Callable[..., Any]
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    flops: int
    error: Callable[..., Any]  # of a result and the operands
    owners: Any = None  # a last operand: which expert owns each 128 rows
    several: bool = False  # whether all kernels of a call count, and not the longest, which is the product, alone
    question: dict[str, Any] | None = None  # the same product, put to DeepGEMM


def main() -> int:
    require_hopper()
    print(f"{'product':<44} {'cold':>7} {'back to back':>13} TFLOP/s  {'cold us':>9}  error", flush=True)
    table = rows()
    for row in table:
        if wanted(row.name):
            print(line(row), flush=True)
    if importlib.util.find_spec("deep_gemm"):
        for text in deep_gemm_lines(table):
            print(text, flush=True)
    for text in torch_lines():
        print(text, flush=True)
    return 0


def wanted(name: str) -> bool:
    """Whether --only asks for a row."""
    return any(part in name for part in ONLY.value)


def rows() -> list[Row]:
    """The table, by kind of product."""
    import jax
    import jax.numpy as jnp

    from experiments.bench import kernels_error as errors
    from pallas_kernels import gemm, grouped_gemm

    f8, f32, bf16 = "float8_e4m3fn", "float32", "bfloat16"
    table: list[Row] = []
    shapes: tuple[tuple[tuple[int, ...], str], ...]
    for m, n, k in DENSE:
        scales, mp = -(-k // 128), -(-m // 128) * 128
        shapes = ((m, k), f8), ((scales, mp), f32), ((n, k), f8), ((-(-n // 128), scales), f32)
        question = {"kind": "dense", "m": m, "n": n, "k": k}
        table.append(Row(f"gemm {m},{n},{k}", gemm.gemm, shapes, 2 * m * n * k, errors.blocks, question=question))
        table.append(Row(f"XLA bfloat16 {m},{n},{k}", lambda a, b: a @ b.T, (((m, k), bf16), ((n, k), bf16)), 2 * m * n * k, errors.plain))
        whole = lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=bf16)  # noqa: E731
        table.append(Row(f"XLA FP8, a scale a tensor {m},{n},{k}", whole, (((m, k), f8), ((n, k), f8)), 2 * m * n * k, errors.plain))
    for m, n, k in (*WGRAD, *PIECES):
        shapes, flops = _turned(m, n, k), 2 * m * n * k
        table.append(Row(f"wgrad {m},{n},{k}", gemm.wgrad, shapes, flops, errors.columns, several=True))
        question = {"kind": "wgrad", "m": m, "n": n, "k": k}
        with_addend = *shapes, ((m, n), f32)
        name = f"wgrad, accumulated {m},{n},{k}"
        table.append(Row(name, gemm.wgrad, with_addend, flops, errors.columns, several=True, question=question))
    for e, each in GROUPS:
        for n, k in EXPERT:
            m, together, owners = e * each, each // 128, jnp.repeat(jnp.arange(e, dtype=jnp.int32), each // 128)
            shapes = ((m, k), f8), ((k // 128, m), f32), ((e, n, k), f8), ((e, -(-n // 128), k // 128), f32)
            grouped = lambda a, sa, b, sb, owner, t=together: grouped_gemm.grouped_gemm(a, sa, b, sb, owner, t)  # noqa: E731
            half = lambda a, b, owner, t=together: grouped_gemm.grouped_gemm_bf16(a, b, owner, t)  # noqa: E731
            question = {"kind": "grouped", "owners": owners.tolist(), "groups": e, "n": n, "k": k}
            size, flops = f"{e} x {each},{n},{k}", 2 * m * n * k
            table.append(Row(f"grouped {size}", grouped, shapes, flops, errors.blocks, owners, question=question))
            table.append(Row(f"grouped bfloat16 {size}", half, (((m, k), bf16), ((e, n, k), bf16)), flops, errors.plain, owners))
            if ragged := tokamax_product(e, each):
                shapes = ((m, k), bf16), ((e, k, n), bf16)
                table.append(Row(f"tokamax, bfloat16 {size}", ragged, shapes, flops, errors.weights_lie))
    owners = _uneven(256)
    for n, k in EXPERT:
        m = 128 * len(owners)
        shapes = ((m, k), f8), ((k // 128, m), f32), ((UNEVEN, n, k), f8), ((UNEVEN, -(-n // 128), k // 128), f32)
        uneven = lambda a, sa, b, sb, owner: grouped_gemm.grouped_gemm(a, sa, b, sb, owner, 1)  # noqa: E731
        question = {"kind": "grouped", "owners": owners.tolist(), "groups": UNEVEN, "n": n, "k": k}
        table.append(Row(f"grouped {UNEVEN} uneven, {m},{n},{k}", uneven, shapes, 2 * m * n * k, errors.blocks, owners, question=question))
    e, m = MASKED
    used = jnp.full(e, m, jnp.int32)
    for n, k in EXPERT:
        shapes = ((e, m, k), f8), ((e, k // 128, 128), f32), ((e, n, k), f8), ((e, -(-n // 128), k // 128), f32)
        masked = lambda a, sa, b, sb: grouped_gemm.masked_gemm(a, sa, b, sb, used)  # noqa: E731
        question = {"kind": "masked", "groups": e, "m": m, "n": n, "k": k}
        size, flops = f"{e} x {m},{n},{k}", 2 * e * m * n * k
        table.append(Row(f"masked {size}", masked, shapes, flops, errors.first_expert, question=question))
        masked_half = lambda a, b: grouped_gemm.masked_gemm_bf16(a, b, used)  # noqa: E731
        table.append(Row(f"masked bfloat16 {size}", masked_half, (((e, m, k), bf16), ((e, k, n), bf16)), flops, errors.first_lies))
    e, m, n, k = 4, 4096, 7168, 8192
    first = jnp.arange(e + 1, dtype=jnp.int32) * (k // 128)
    run = lambda a, sa, b, sb, *addend: grouped_gemm.grouped_wgrad(a, sa, b, sb, first, *addend)  # noqa: E731
    shapes, flops = _turned(m, n, e * k), 2 * e * m * n * k
    first_group = functools.partial(errors.columns, steps=k // 128)
    table.append(Row(f"grouped wgrad {e} x {m},{n},{k}", run, shapes, flops, first_group, several=True))
    question = {"kind": "grouped wgrad", "groups": e, "m": m, "n": n, "k": k}
    with_addend = *shapes, ((e, m, n), f32)
    name = f"grouped wgrad, accumulated {e} x {m},{n},{k}"
    return [*table, Row(name, run, with_addend, flops, first_group, several=True, question=question)]


def _turned(m: int, n: int, k: int) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Operands of Wgrad over k tokens, and their scales."""
    steps = k // 128
    sides = ((((steps, columns, 128), "float8_e4m3fn"), ((steps, columns), "float32")) for columns in (m, n))
    return tuple(operand for side in sides for operand in side)


def tokamax_product(groups: int, each: int) -> Callable[..., Any] | None:
    """As many rows of each group times its weights [groups, k, n], by tokamax's kernel for Hopper, if it is installed.

    In tiles that were the fastest of a sweep: its own choice reaches half of that.
    """
    if not has_tokamax():
        return None
    import jax.numpy as jnp
    from tokamax.ops.gpu import PallasMosaicRaggedDot, PallasMosaicRaggedDotConfig

    tiles = PallasMosaicRaggedDotConfig(block_m=128, block_n=192, block_k=64, num_stages=4, split_k=1, grid_tile_width=8)
    run = PallasMosaicRaggedDot(config=tiles)
    return lambda a, b: run(a, b, group_sizes=jnp.full(groups, each, jnp.int32))


def _uneven(tiles: int) -> Any:
    """The owner of each of so many tiles of 128 rows; about half of the experts own none."""
    import jax
    import jax.numpy as jnp

    popularity = -1.2 * jnp.log1p(jnp.arange(UNEVEN))
    return jnp.sort(jax.random.categorical(jax.random.key(0), popularity, shape=(tiles,))).astype(jnp.int32)


def deep_gemm_lines(table: Iterable[Row]) -> Iterator[str]:
    """Lines of the products that DeepGEMM has too, as they come; it ends where one fails, and the next is put to another process."""
    peer = None
    for row in table:
        name = f"DeepGEMM {row.name.removeprefix('gemm ')}"
        if row.question is None or not wanted(name):
            continue
        try:
            peer = peer or Peer(sys.executable, "experiments.bench.kernels_deep_gemm", [])
            found = peer.ask(row.question)
        except RuntimeError as reason:
            found = {"refused": reason}
        if "refused" in found:
            if peer:
                peer.leave()
            peer = None
            yield not_run(name, found["refused"])
        else:
            several = f", {found['kernels']} kernels a call" if found["kernels"] > 1 else ""
            yield figures(name, row.flops, found["cold"], found["warm"], f"{found['error']:.2e}{several}")
    if peer:
        peer.leave()


def torch_lines() -> Iterator[str]:
    """Lines of what comes with PyTorch, or of why there are none."""
    try:
        from experiments.bench import kernels_torch
    except ImportError as reason:
        yield f"PyTorch and Triton: not installed ({reason})"
        return
    for m, n, k in DENSE:
        for peer in kernels_torch.PEERS:
            if not wanted(name := f"{peer} {m},{n},{k}"):
                continue
            try:
                seconds, relative = kernels_torch.measured(peer, m, n, k)
            except RuntimeError as reason:
                yield not_run(name, reason)
            else:
                yield figures(name, 2 * m * n * k, seconds, None, f"{relative:.2e}")


def line(row: Row) -> str:
    """Times one product."""
    import jax

    operands = [draw(i, *shape) for i, shape in enumerate(row.shapes)]
    if row.owners is not None:
        operands.append(row.owners)
    run = jax.jit(row.run)
    cold, warm = (kernel_seconds(run, operands, clear, of=sum if row.several else max) for clear in (True, False))
    return figures(row.name, row.flops, cold, warm, f"{float(row.error(run(*operands), *operands)):.2e}")


def figures(name: str, flops: int, cold: float, warm: float | None, remark: str) -> str:
    """A line of the table; the times in seconds."""
    rates = [f"{flops / seconds / 1e12:.0f}" if seconds else "" for seconds in (cold, warm)]
    return f"{name:<44} {rates[0]:>7} {rates[1]:>13}          {cold * 1e6:>9.1f}  {remark}"


def not_run(name: str, reason: object) -> str:
    """A line that says why there are no figures, as far as a first line says it."""
    return f"{name:<44} not run: {str(reason).partition(chr(10))[0]}"


if __name__ == "__main__":
    cli.run(main)
