"""Registers of a thread inside of `plgpu.inline_mgpu`: vectors of MLIR, taken apart and put together."""

from collections.abc import Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import vector


def elements(register: Any) -> list[Any]:
    """The numbers of a vector."""
    at = [ir.DenseI64ArrayAttr.get([i]) for i in range(ir.VectorType(register.type).shape[0])]
    return [vector.extract(register, dynamic_position=[], static_position=i) for i in at]


def together(numbers: Sequence[Any]) -> Any:
    """A vector of numbers of one type."""
    return vector.from_elements(ir.VectorType.get((len(numbers),), numbers[0].type), list(numbers))
