"""What a product is, and how it is cut up for the machine: known without the kernel, whose import takes a second."""

import dataclasses
from typing import Any, Literal

GROUP = 128  # contraction elements under one scale, and the columns under one scale of a weight block
SWIZZLE = 128  # bytes: one row of an operand slot
WAVE = 64  # rows of one wgmma
LINE = 4  # float32 numbers that TMA copies at least

Groups = Literal["none", "rows", "masked", "contraction", "pieces"]


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How a product is cut up for the machine; changes speed, never the result beyond the order of sums in a tile."""

    block_m: int = 128
    block_n: int = 128
    warpgroups: int = 2  # consumers; they share the rows of a tile
    stages: int = 6
    steps: int = 8  # along k, written out in the body of the loop over them
    overlap: bool = False  # promotion runs under the next product, inside such a body
    cluster: Literal["", "m", "n"] = ""  # thread blocks share the B ("m": neighbours along m) or the A tile ("n")
    sharing: Literal[2, 4] = 2  # so many, in a cluster
    raster: tuple[int, int] = (0, 8)  # minor dimension and width of the snake in which tiles are visited
    store_slots: int = 1
    store_bytes: int = 128  # a row of a slot

    @property
    def cluster_size(self) -> int:
        """Thread blocks of a cluster."""
        return self.sharing if self.cluster else 1

    def clusters(self, sm_count: int) -> int:
        """How many run at once. Multiprocessors come in groups that a cluster does not cross: of four blocks 28 fit an H200, 32 did not."""
        return max(1, sm_count * 7 // 33 if self.cluster_size == 4 else sm_count // self.cluster_size)

    @property
    def rows(self) -> int:
        """Rows of the tiles that a cluster, or a block without one, takes at once."""
        return self.block_m * (self.cluster_size if self.cluster == "m" else 1)

    @property
    def columns(self) -> int:
        """Columns of the same."""
        return self.block_n * (self.cluster_size if self.cluster == "n" else 1)

    @property
    def waves(self) -> int:
        """64-row products of one warpgroup in a K step."""
        return self.block_m // (self.warpgroups * WAVE)


@dataclasses.dataclass(frozen=True)
class Product:
    """Which product: shapes of scales, how rows belong to groups, what comes out."""

    scales: Literal["block", "row", "none"] = "block"  # of b: per 128x128, per row and 128, or bfloat16 without scales
    groups: Groups = "none"
    out: str = "bfloat16"
    weights_lie: bool = False  # b is [e, k, n], as weights are stored; of groups of rows and masked ones, in bfloat16

    @property
    def per_group(self) -> bool:
        """Whether every group has its own output, and tiles of its own."""
        return self.groups in ("masked", "contraction", "pieces")


def check_addend(addend: Any, shape: tuple[int, ...], dtype: str) -> None:
    """Raises ValueError unless it is like the output: TMA would add what fits, XLA what can be made to."""
    if (addend.shape, addend.dtype) != (shape, dtype):
        raise ValueError(f"addend: {addend.dtype}{list(addend.shape)}: has to be {dtype}{list(shape)}, as the output")
