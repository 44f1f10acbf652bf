"""FP8 products with the same scales that come with PyTorch, for experiments.bench.kernels: cuBLASLt's, and a plain one in Triton.

Times are by events, after a flush of L2. Needs PyTorch and Triton: importing this raises ImportError without them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import ScalingType, scaled_mm
from triton.testing import do_bench

BLOCK = 128
ROWS_CHECKED = 256


class Operands(NamedTuple):
    """a [m, k] with a scale for each row and 128 columns, [k / 128, m], and b [n, k] with one for each 128x128, [n / 128, k / 128]."""

    a: torch.Tensor
    a_scales: torch.Tensor
    b: torch.Tensor
    b_scales: torch.Tensor


def draw(m: int, n: int, k: int) -> Operands:
    """Normal numbers, and positive ones as scales."""
    a, b = (torch.randn(rows, k, device="cuda").to(torch.float8_e4m3fn) for rows in (m, n))
    a_scales, b_scales = (torch.rand(shape, device="cuda") + 0.5 for shape in ((k // BLOCK, m), (-(-n // BLOCK), k // BLOCK)))
    return Operands(a, a_scales, b, b_scales)


def cublaslt(x: Operands) -> torch.Tensor:
    """Raises RuntimeError for shapes that cuBLASLt has no product for."""
    kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    # Neighbours in memory are rows of a, and steps of b, transposed.
    return scaled_mm(x.a, x.b.t(), x.a_scales.t(), kinds[0], x.b_scales.t(), kinds[1], output_dtype=torch.bfloat16)


def in_triton(x: Operands) -> torch.Tensor:
    """Tiles of 128x128, one a block of threads; k in multiples of 128."""
    (m, k), n = x.a.shape, x.b.shape[0]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=x.a.device)
    tiles = triton.cdiv(m, BLOCK) * triton.cdiv(n, BLOCK)
    _multiply_tile[(tiles,)](*x, out, m, n, k, SIDE=BLOCK, BAND=8, num_warps=8, num_stages=4)
    return out


@triton.jit
def _multiply_tile(a, a_scales, b, b_scales, out, m, n, k, SIDE: tl.constexpr, BAND: tl.constexpr):
    # Tiles are visited in bands of BAND of them along m, whose operands stay in L2 meanwhile.
    tile, steps = tl.program_id(0), k // SIDE
    of_band = BAND * tl.cdiv(n, SIDE)
    first = tile // of_band * BAND
    height = min(tl.cdiv(m, SIDE) - first, BAND)
    row, column = first + tile % of_band % height, tile % of_band // height

    rows, columns, depth = row * SIDE + tl.arange(0, SIDE), column * SIDE + tl.arange(0, SIDE), tl.arange(0, SIDE)
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for step in range(steps):
        left = tl.load(a + rows[:, None] * k + step * SIDE + depth[None, :], mask=rows[:, None] < m, other=0.0)
        right = tl.load(b + columns[None, :] * k + step * SIDE + depth[:, None], mask=columns[None, :] < n, other=0.0)
        scales = tl.load(a_scales + step * m + rows, mask=rows < m, other=0.0) * tl.load(b_scales + column * steps + step)
        total += tl.dot(left, right) * scales[:, None]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(out + rows[:, None] * n + columns[None, :], total.to(tl.bfloat16), mask=inside)


PEERS: dict[str, Callable[[Operands], torch.Tensor]] = {"PyTorch, block-scaled": cublaslt, "Triton, block-scaled": in_triton}


def line(name: str, m: int, n: int, k: int) -> str:
    """A peer's rate in TFLOP/s, its time and its error; or why there is none."""
    torch.manual_seed(0)
    operands, run = draw(m, n, k), PEERS[name]
    try:
        relative = error(run(operands), operands)
        milliseconds = do_bench(lambda: run(operands), return_mode="median")
    except RuntimeError as reason:
        return f"refused: {str(reason).splitlines()[0][:60]}"
    return f"{2 * m * n * k / milliseconds / 1e9:>7.0f} {'':>13}          {milliseconds * 1e3:>9.1f}  {relative:.2e}"


def error(out: torch.Tensor, x: Operands) -> float:
    """Relative, of the first rows, by Frobenius norm, against a float32 product of the dequantized operands."""
    left = x.a[:ROWS_CHECKED].float() * x.a_scales[:, :ROWS_CHECKED].t().repeat_interleave(BLOCK, 1)
    of_b = x.b_scales.repeat_interleave(BLOCK, 0)[: len(x.b)].repeat_interleave(BLOCK, 1)
    expected = left @ (x.b.float() * of_b).t()
    difference: Any = torch.linalg.norm(out[:ROWS_CHECKED].float() - expected) / torch.linalg.norm(expected)
    return float(difference)
