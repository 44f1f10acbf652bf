"""The name map: every tensor of a public checkpoint, and the slice of which parameter it fills.

The public format keeps torch's [out, in] weights, one tensor a layer and expert; here kernels are [in, out],
layers and experts are stacked, and gate and up projections share a leaf [in, 2, ffn]. An FP8 weight has a
second tensor, `NAME_scale_inv`, with one scale per 128x128 block; stacked the same way it is the array
`PATH/scale_inv` beside the parameter (V3 sec. 3.3; the release's README_WEIGHTS).
"""

import functools
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.init import init_router_bias, parameter_shapes
from dsv3_jax.precision.quantize import BLOCK

SCALE = "_scale_inv"


class Piece(NamedTuple):
    """One public tensor and the part of a parameter that it fills: `parameter[where] = tensor.T` (`tensor` for the embedding)."""

    tensor: str
    path: str  # "params/moe/self_attn/o_proj/kernel", or "bias/moe" for the router bias
    where: tuple[int | slice, ...]
    shape: tuple[int, ...]  # of the public tensor

    @property
    def transposed(self) -> bool:
        return self.path != "params/embed"

    def scale(self) -> "Piece":
        """The scales of this weight when it is FP8."""
        return Piece(self.tensor + SCALE, scale_path(self.path), self.where, tuple(-(-n // BLOCK) for n in self.shape))


_TOP_TENSORS = {
    "params/embed": "model.embed_tokens.weight",
    "params/norm": "model.norm.weight",
    "params/lm_head": "lm_head.weight",
}
# Parameter of a layer -> the public tensors in it, below "model.layers.N.". Two: gate and up, on the axis before
# the last. "{expert}": one for every expert, on a leading axis.
_LAYER_TENSORS = {
    "input_layernorm/scale": ("input_layernorm.weight",),
    "post_attention_layernorm/scale": ("post_attention_layernorm.weight",),
    "self_attn/q_proj/kernel": ("self_attn.q_proj.weight",),
    "self_attn/q_a_proj/kernel": ("self_attn.q_a_proj.weight",),
    "self_attn/q_a_layernorm/scale": ("self_attn.q_a_layernorm.weight",),
    "self_attn/q_b_proj/kernel": ("self_attn.q_b_proj.weight",),
    "self_attn/kv_a_proj_with_mqa/kernel": ("self_attn.kv_a_proj_with_mqa.weight",),
    "self_attn/kv_a_layernorm/scale": ("self_attn.kv_a_layernorm.weight",),
    "self_attn/kv_b_proj": ("self_attn.kv_b_proj.weight",),
    "self_attn/o_proj/kernel": ("self_attn.o_proj.weight",),
    "mlp/gate_up_proj": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp/down_proj": ("mlp.down_proj.weight",),
    "mlp/router": ("mlp.gate.weight",),
    "mlp/shared_experts/gate_up_proj": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "mlp/shared_experts/down_proj": ("mlp.shared_experts.down_proj.weight",),
    "mlp/experts/gate_up_proj": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "mlp/experts/down_proj": ("mlp.experts.{expert}.down_proj.weight",),
    "enorm/scale": ("enorm.weight",),
    "hnorm/scale": ("hnorm.weight",),
    "eh_proj/kernel": ("eh_proj.weight",),
    "norm/scale": ("shared_head.norm.weight",),
    "": ("mlp.gate.e_score_correction_bias",),  # "bias/moe" and "bias/mtp" have nothing below the stack
}
_SHARED_COPIES = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")


def checkpoint_layout(config: ModelConfig) -> list[Piece]:
    """Every tensor of the public checkpoint of this architecture, MTP modules included, and where it belongs."""
    return [piece for path, leaf in leaf_shapes(config).items() for piece in _pieces(path, leaf, config)]


@functools.cache  # tracing the modules takes a second
def abstract_tree(config: ModelConfig) -> dict[str, Any]:
    """Shapes of parameters and router bias, as one tree: {"bias": ..., "params": ...}."""
    bias = jax.eval_shape(lambda: init_router_bias(config))
    return {"bias": bias._asdict(), "params": parameter_shapes(config)}


@functools.cache  # an export asks for every tensor
def leaf_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of every parameter by its path, in the order of the tree; empty ones (the bias of no MTP module) as well."""
    leaves, _ = jax.tree.flatten_with_path(abstract_tree(config))
    return MappingProxyType({jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves})


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter that a checkpoint holds."""
    return {path: shape for path, shape in leaf_shapes(config).items() if 0 not in shape}


def _pieces(path: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[Piece]:
    if path in _TOP_TENSORS:
        yield Piece(_TOP_TENSORS[path], path, (), shape if path == "params/embed" else shape[::-1])
        return
    _, stack, *rest = path.split("/")
    names = _LAYER_TENSORS["/".join(rest).removeprefix("block/")]
    first = {"dense": 0, "moe": config.num_dense_layers, "mtp": config.num_hidden_layers}[stack]
    for layer in range(shape[0]):
        for expert in range(shape[1]) if "{expert}" in names[0] else (None,):
            for part, name in enumerate(names):
                where: tuple[int | slice, ...] = (layer,) if expert is None else (layer, expert)
                inner = shape[len(where) :]
                if len(names) > 1:
                    where, inner = (*where, slice(None), part), (inner[0], *inner[2:])
                yield Piece(f"model.layers.{first + layer}.{name.format(expert=expert)}", path, where, inner[::-1])


def piece_index(piece: Piece, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where the piece lies in its parameter (or in the scales of it), every start and stop spelt out."""
    where = (*piece.where, *(slice(None) for _ in range(len(shape) - len(piece.where))))
    return tuple(slice(at, at + 1) if isinstance(at, int) else slice(0, n) for at, n in zip(where, shape, strict=True))


def scale_path(path: str) -> str:
    """Path of the scales of an FP8 parameter."""
    return f"{path}/scale_inv"


def scale_shape(piece: Piece, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of the parameter that a piece belongs to: axes of matrices in blocks, axes of stacks as they are."""
    stacks = {i for i, index in enumerate(piece.where) if isinstance(index, int)}
    return tuple(n if i in stacks else -(-n // BLOCK) for i, n in enumerate(shape))


def is_shared_copy(name: str) -> str | None:
    """The tensor that `name`, part of an MTP layer, is a copy of: embedding or head; None for any other name."""
    match = _SHARED_COPIES.fullmatch(name)
    return None if match is None else {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}[match[1]]
