"""FP8 products with the same scales that come with PyTorch, for experiments.bench.kernels: cuBLASLt's, and a plain one in Triton.

Times are by events, after a flush of L2. Needs PyTorch and Triton: importing this raises ImportError without them.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch.nn.functional import ScalingType, scaled_mm
from triton.testing import do_bench

from experiments.bench.torch_blocks import BLOCK, Blocks, first_rows, operands, relative_error


def cublaslt(a: Blocks, b: Blocks) -> torch.Tensor:
    """Raises RuntimeError for shapes that cuBLASLt has no product for."""
    kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    return scaled_mm(a.values, b.values.t(), a.scales, kinds[0], b.scales.t(), kinds[1], output_dtype=torch.bfloat16)


def in_triton(a: Blocks, b: Blocks) -> torch.Tensor:
    """Tiles of 128x128, one a block of threads; k in multiples of 128."""
    (m, k), n = a.values.shape, b.values.shape[0]
    out = torch.empty(m, n, dtype=torch.bfloat16, device=a.values.device)
    tiles = triton.cdiv(m, BLOCK) * triton.cdiv(n, BLOCK)
    _multiply_tile[(tiles,)](a.values, a.scales, b.values, b.scales, out, m, n, k, SIDE=BLOCK, BAND=8, num_warps=8, num_stages=4)
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


PEERS: dict[str, Callable[[Blocks, Blocks], torch.Tensor]] = {"PyTorch, block-scaled": cublaslt, "Triton, block-scaled": in_triton}


def measured(peer: str, m: int, n: int, k: int) -> tuple[float, float]:
    """Seconds of a product, and the relative error of its first rows. Raises RuntimeError where there is none."""
    torch.manual_seed(0)
    run, (a, b) = PEERS[peer], operands(m, n, k)
    relative = relative_error(*first_rows(run(a, b), a), b)
    return do_bench(lambda: run(a, b), return_mode="median") / 1e3, relative
