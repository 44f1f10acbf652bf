"""Which tensor is kept how: the FP8 recipe as one table (V3 sec. 3.3).

| tensor | in FP8 training |
| --- | --- |
| embedding, output head, router, norms, attention core | as without FP8: bfloat16, sums in float32 |
| inputs of linear layers, and gradients of their outputs | E4M3, a scale per 1x128 |
| weights | E4M3, a scale per 128x128; the master stays float32 |
| what Wgrad needs of an input | kept as E4M3 of Fprop, changed to 128x1 in the backward pass |
| input of the Linear after attention | kept as E5M6, scales are powers of two; fused attention's backward pass reads the same |
| inputs of SwiGLU | kept as E4M3; its output is computed again |
| inputs of experts and gradients before their down-projection, which MoE dispatch sends | scales are powers of two, of shared experts too |
| what MoE combine sends | bfloat16 |
| weight gradients | float32 |
| moments of AdamW | bfloat16 |

`Recipe` says how tensors are cut into tiles, `Role` what is special about one linear layer.
"""

import dataclasses
from collections.abc import Callable

from jaxtyping import Array

from dsv3_jax.config import PrecisionConfig
from dsv3_jax.precision.formats import E4M3, E5M6, Format
from dsv3_jax.precision.quantize import BLOCK, Tile

TILES: dict[str, Tile] = {"1x128": (1, BLOCK), "128x128": (BLOCK, BLOCK), "tensor": (0, 0)}


@dataclasses.dataclass(frozen=True)
class Role:
    """What a linear layer's place in the model asks of its tensors."""

    input_power_of_two: bool = False
    gradient_power_of_two: bool = False
    stored: Format = E4M3  # its input, for the backward pass
    name: str = "linear_in"  # of that input, for remat policies

    @property
    def wgrad_power_of_two(self) -> bool:
        """Whether the input's scales are powers of two where it is kept, and in Wgrad: changing tiles then adds little error."""
        return self.input_power_of_two or self.stored is E5M6


LINEAR = Role()
AFTER_ATTENTION = Role(stored=E5M6, name="attention_out")
EXPERT_UP = Role(input_power_of_two=True)
EXPERT_DOWN = Role(gradient_power_of_two=True)


# Sees a product: x, kernel, expert of each block (None: one kernel for all rows), role and y; returns y.
Tap = Callable[[Array, Array, Array | None, Role, Array], Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the products of linear layers are computed; hashable, so that it can be static under jit."""

    fp8: bool = False
    input_tile: Tile = TILES["1x128"]
    gradient_tile: Tile = TILES["1x128"]
    weight_tile: Tile = TILES["128x128"]
    impl: str = "auto"  # "pallas": the kernels for Hopper; "reference": plain JAX; "auto": the kernels where they can run
    tap: Tap | None = None  # for studies: sees every product as it is traced, x as it is before it is quantized

    @property
    def sends_inputs(self) -> bool:
        """Whether MoE dispatch sends E4M3: where a row's scales depend on that row alone."""
        return self.fp8 and self.input_tile == TILES["1x128"]

    @property
    def sends_gradients(self) -> bool:
        """The same for what it sends in the backward pass."""
        return self.fp8 and self.gradient_tile == TILES["1x128"]

    @classmethod
    def of(cls, config: PrecisionConfig) -> "Recipe":
        """The recipe that the precision section of a configuration names."""
        inputs, gradients, weights = (TILES[name] for name in (config.activation_tile, config.gradient_tile, config.weight_tile))
        return cls(config.policy == "fp8", inputs, gradients, weights, config.impl)


BF16 = Recipe()
