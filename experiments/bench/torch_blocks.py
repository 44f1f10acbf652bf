"""Quantized operands in PyTorch, and the error of their product: what the peers of experiments.bench.kernels share."""

from typing import NamedTuple

import torch

BLOCK = 128
ROWS_CHECKED = 256


class Blocks(NamedTuple):
    """A quantized operand of two axes; a scale is for so many rows and 128 columns."""

    values: torch.Tensor
    scales: torch.Tensor
    rows: int

    def dequantized(self) -> torch.Tensor:
        scales = self.scales.repeat_interleave(self.rows, 0)[: len(self.values)]
        return self.values.float() * scales.repeat_interleave(BLOCK, 1)


def draw(*shape: int) -> torch.Tensor:
    """Normal numbers, made in parts, which are larger than their FP8."""
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
    for part in out.view(-1, shape[-1]).split(2**14):
        part.copy_(torch.randn(part.shape, dtype=torch.bfloat16, device="cuda"))
    return out


def draw_scales(*shape: int) -> torch.Tensor:
    """Positive numbers."""
    return torch.empty(shape, device="cuda").uniform_(0.5, 2)


def operands(m: int, n: int, k: int) -> tuple[Blocks, Blocks]:
    """a [m, k] with scales of 1x128, whose neighbours in memory are rows, and b [n, k] with scales of 128x128."""
    a = Blocks(draw(m, k), draw_scales(k // BLOCK, m).t(), 1)
    return a, Blocks(draw(n, k), draw_scales(-(-n // BLOCK), k // BLOCK), BLOCK)


def first_rows(out: torch.Tensor, a: Blocks, rows: int = ROWS_CHECKED) -> tuple[torch.Tensor, Blocks]:
    """Rows that are compared, and of a those that make them."""
    return out[:rows], Blocks(a.values[:rows], a.scales[:rows], 1)


def relative_error(out: torch.Tensor, left: Blocks, right: Blocks) -> float:
    """By Frobenius norm, against a float32 product of the dequantized operands."""
    expected = left.dequantized() @ right.dequantized().t()
    return float(torch.linalg.norm(out.float() - expected) / torch.linalg.norm(expected))
