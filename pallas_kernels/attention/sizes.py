"""What both kernels say of their operands, known without them: their import takes a second."""

import dataclasses
import math
from typing import Any

import jax
from jax import lax

Array = jax.Array

PIECE = 64  # columns
_TOGETHER = 8  # heads: as many as L2 holds


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Queries and keys come in parts that lie by themselves: contents, and in MLA what is rotated, of which all heads share the keys."""

    batch: int
    length: int
    heads: int
    widths: tuple[int, ...]  # columns of each part of queries and keys
    v_width: int
    scale: float  # of scores, positive
    documents: bool  # whether a query sees no key before one that `starts` names

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def exponent(self) -> float:
        """`scale` where exponentials are powers of two, for which there is an instruction."""
        return self.scale * math.log2(math.e)


def sizes_of(k: tuple[Array, ...], v: Array, scale: float, starts: Array | None) -> Sizes:
    """Of keys in parts and values [b, t, h, n]."""
    batch, length, heads, v_width = v.shape
    return Sizes(batch, length, heads, tuple(part.shape[-1] for part in k), v_width, scale, starts is not None)


def head_and_turn(sizes: Sizes, unit: Array, blocks: int) -> tuple[Array, Array, Array]:
    """Row and head of a block of threads, and which of the head's `blocks` it is, if those that take longest come first.

    Some heads take turns, so that their blocks, but for the first, find keys or queries in L2, and all end at about the same time.
    """
    together = math.gcd(sizes.batch * sizes.heads, _TOGETHER)
    group, within = lax.div(unit, blocks * together), lax.rem(unit, blocks * together)
    head = group * together + lax.rem(within, together)
    return lax.div(head, sizes.heads), lax.rem(head, sizes.heads), lax.div(within, together)


def window(ref: Any, row: Any, positions: Any, head: Any, columns: Any) -> Any:
    """A tile of one head, or of all heads if they share it."""
    return ref.at[row, positions, columns] if len(ref.shape) == 3 else ref.at[row, positions, head, columns]
