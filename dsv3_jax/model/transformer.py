"""The main model: embedding, dense layers, MoE layers, final norm (V3 sec. 2.1).

Layers of one kind share one Linen module, their parameters stacked on a leading axis: a loop
runs them, so compile time does not grow with depth. Parameters are one plain pytree, float32:

    embed [V, D], dense {...}[layers], moe {...}[layers], norm, lm_head [D, V] (absent when tied), mtp {...}[depth]

The router bias is a second pytree, `RouterBias`, because it is state and not a parameter.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model.layers import RMSNorm, SwiGLU, rms_norm
from dsv3_jax.model.mla import MLA, LayerStore
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.stack import scan_layers
from dsv3_jax.parallel.expert import ALONE, Placement
from dsv3_jax.precision.policy import BF16, Recipe
from pallas_kernels.backend import platform

Params = dict[str, Any]  # nested; leaves are arrays

# Kept for the backward pass by remat="selective"; the rest, RMSNorms, MLA up-projections and SwiGLU
# outputs above all, is computed again (V3 sec. 3.2.3).
SAVED_NAMES = ("q_latent", "kv_latent", "attention_out", "attention_sums", "attention_residual", "swiglu_in", "routing")

# A stack of up to so many layers is written out: on a CPU, and in the stages of a pipeline on any device (training/pipeline_step.py).
# Deeper ones are a loop, so compile time does not grow with depth.
UNROLLED_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the model is run, as opposed to what it is."""

    dtype: str = "float32"  # of activations
    impl: str = "auto"  # of attention and products
    remat: str = "none"
    balance: str = "loss_free"
    recipe: Recipe = BF16  # of the products of linear layers
    document_eos: int | None = None  # set: attention and losses stop at this token
    placement: Placement = ALONE  # on the devices of a mesh
    overlap: bool = False  # the rows of a layer are two independent halves, see `in_halves`

    @classmethod
    def of(cls, config: Config, eos_id: int) -> "Execution":
        """The execution that a run's configuration asks for."""
        document_eos = eos_id if config.data.document_mask else None
        recipe = Recipe.of(config.precision)
        return cls(config.train.compute_dtype, config.precision.impl, config.train.remat, config.train.balance, recipe, document_eos)


class RouterBias(NamedTuple):
    """Bias of every MoE router, main layers and MTP modules."""

    moe: Float[Array, "layers e"]
    mtp: Float[Array, "depth e"]


class BlockOutput(NamedTuple):
    """Output of a layer, the rest as in `MoEOutput`; zeros for a dense layer."""

    x: Float[Array, "b t d"]
    load: Float[Array, " e"]
    balance_loss: Float[Array, ""]
    fullness: Float[Array, ""]


class LayerReports(NamedTuple):
    """What the layers of a stack return beside their output."""

    load: Float[Array, "layers e"]
    balance_loss: Float[Array, " layers"]
    fullness: Float[Array, " layers"]


class TokenContext(NamedTuple):
    """What every layer needs to know of the tokens beside their hidden states."""

    positions: Int[Array, "b t"]
    segment_ids: Int[Array, "b t"] | None  # None: no document mask
    weights: Float[Array, "b t"]  # 1 for tokens that count in load and balance loss


@functools.singledispatch
def self_attention(config: ModelConfig, impl: str, recipe: Recipe) -> nn.Module:
    """The attention of a layer: MLA. A study registers another for a subclass of ModelConfig, to train it in MLA's place."""
    return MLA(config, impl, recipe)


class Block(nn.Module):
    """One transformer layer: `x + MLA(norm(x))`, then `x + FFN(norm(x))` with a dense or a MoE FFN."""

    config: ModelConfig
    execution: Execution
    is_moe: bool

    def setup(self) -> None:
        c = self.config
        self.input_layernorm = RMSNorm(c.rms_norm_eps)
        impl, recipe, heads = self.execution.impl, self.execution.recipe, self.execution.placement.heads
        self.self_attn = MLA(heads.of_one_device(c), impl, recipe, heads) if heads else self_attention(c, impl, recipe)
        self.post_attention_layernorm = RMSNorm(c.rms_norm_eps)
        balance = self.execution.balance
        dense = lambda: SwiGLU(c.intermediate_size, c.initializer_range, recipe)  # noqa: E731
        self.mlp = MoE(c, balance, recipe, self.execution.placement) if self.is_moe else dense()

    def __call__(self, x: Float[Array, "b t d"], bias: Float[Array, " e"], context: TokenContext) -> BlockOutput:
        return self._feed_forward(checkpoint_name(self._attend(x, context), "attention_residual"), bias, context.weights)

    def router_input(self, x: Float[Array, "b t d"], context: TokenContext) -> Float[Array, "b t d"]:
        """What the router of the layer sees."""
        return self.post_attention_layernorm(self._attend(x, context))

    def decode(
        self,
        x: Float[Array, "here_b here_t d"],
        bias: Float[Array, " e"],
        positions: Int[Array, "b t"],
        cache: Any,
        mask: Bool[Array, "b t s"] | None,
        store: LayerStore,
    ) -> tuple[Float[Array, "here_b here_t d"], Any, Float[Array, ""]]:
        """The layer over a latent cache, see `MLA.decode`: output, cache, and the fullness of the dispatch buffers."""
        attended, cache = self.self_attn.decode(self.input_layernorm(x), positions, cache, mask, store)
        out = self._feed_forward(x + attended, bias, jnp.ones(x.shape[:2]))
        return out.x, cache, out.fullness

    def _attend(self, x: Array, context: TokenContext) -> Array:
        return x + self.self_attn(self.input_layernorm(x), context.positions, context.segment_ids)

    def _feed_forward(self, x: Array, bias: Array, weights: Array) -> BlockOutput:
        normed = self.post_attention_layernorm(x)
        if self.is_moe:
            out = self.mlp(normed, bias, weights)
            return BlockOutput(x + out.y, out.load, out.balance_loss, out.fullness)
        return BlockOutput(x + self.mlp(normed), jnp.zeros(self.config.n_routed_experts), jnp.zeros(()), jnp.zeros(()))


def rematerialised(f: Callable, policy: str) -> Callable:
    """`f`, with what its backward pass keeps set by the policy: none (everything), selective (SAVED_NAMES), full (inputs)."""
    if policy == "none":
        return f
    saved = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES) if policy == "selective" else None
    return jax.checkpoint(f, policy=saved, prevent_cse=False)


def in_halves(layer: Callable[..., tuple[Any, LayerReports]], overlap: bool) -> Callable[..., tuple[Any, LayerReports]]:
    """`layer(rows, ...) -> (rows, reports)` over two halves of the rows that do not depend on each other; `rows`: a tree, b leading.

    So the exchanges of one half can run beside the products of the other (V3 sec. 3.4, 3.2.1). Loads add up; a balance
    loss is a mean over sequences.
    """
    if not overlap:
        return layer

    def halves(rows: Any, *rest: Any) -> tuple[Any, LayerReports]:
        middle = jax.tree.leaves(rows)[0].shape[0] // 2
        (x, one), (y, two) = (
            layer(jax.tree.map(lambda a, part=part: a[part], rows), *rest) for part in (slice(middle), slice(middle, None))
        )
        reports = LayerReports(one.load + two.load, (one.balance_loss + two.balance_loss) / 2, jnp.maximum(one.fullness, two.fullness))
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x, y), reports

    return halves


def unrolled(layers: int) -> bool:
    """Whether a stack of so many layers is written out instead of a loop."""
    return layers <= UNROLLED_LAYERS and platform() == "cpu"


def layer_gatherer(execution: Execution, section: str) -> Callable[[Params], Params]:
    """What turns the parameters of one layer of a section into those that it computes with."""
    gather = execution.placement.gather_layer
    return functools.partial(gather, section) if gather else lambda layer_params: layer_params


def segments(tokens: Int[Array, "b t"], eos_id: int | None) -> Int[Array, "b t"] | None:
    """Number of the document each token is in (its closing EOS belongs to it); None when documents are not kept apart."""
    if eos_id is None:
        return None
    ends = (tokens == eos_id).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


def token_context(tokens: Int[Array, "b t"], execution: Execution) -> TokenContext:
    """Positions 0..T-1, segments, and every token counted."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return TokenContext(positions, segments(tokens, execution.document_eos), jnp.ones(tokens.shape))


def embed(params: Params, tokens: Int[Array, "b t"], dtype: str) -> Float[Array, "b t d"]:
    """Rows of the embedding in the dtype of activations."""
    return jnp.take(params["embed"], tokens, axis=0).astype(dtype)


def head_kernel(params: Params) -> Float[Array, "d v"]:
    """The output head, or the transposed embedding when they are tied."""
    return params["lm_head"] if "lm_head" in params else params["embed"].T


def logits(params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Scores of the next token in float32; `hidden` comes after the final norm."""
    kernel = head_kernel(params).astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, kernel, preferred_element_type=jnp.float32)


class TrunkOutput(NamedTuple):
    """Hidden states after the final norm; load of each MoE layer, sum of their balance losses, their largest fullness."""

    hidden: Float[Array, "b t d"]
    load: Float[Array, "layers e"]
    balance_loss: Float[Array, ""]
    fullness: Float[Array, ""]


def trunk(params: Params, bias: RouterBias, tokens: Int[Array, "b t"], config: ModelConfig, execution: Execution) -> TrunkOutput:
    """Runs the main model over whole rows of tokens."""
    x, context = embed(params, tokens, execution.dtype), token_context(tokens, execution)
    if "dense" in params:
        x, _ = scan_blocks(
            params["dense"], jnp.zeros((config.num_dense_layers, config.n_routed_experts)), x, context, config, execution, False
        )
    load, balance_loss, fullness = jnp.zeros((0, config.n_routed_experts)), jnp.zeros(()), jnp.zeros(())
    if "moe" in params:
        x, out = scan_blocks(params["moe"], bias.moe, x, context, config, execution, True)
        load, balance_loss, fullness = out.load, out.balance_loss.sum(), out.fullness.max()
    return TrunkOutput(rms_norm(x, params["norm"], config.rms_norm_eps), load, balance_loss, fullness)


def scan_blocks(
    stack: Params,
    bias: Float[Array, "layers e"],
    x: Float[Array, "b t d"],
    context: TokenContext,
    config: ModelConfig,
    execution: Execution,
    is_moe: bool,
    count: Int[Array, ""] | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "b t d"], LayerReports]:
    """Runs a stack of layers of one kind; returns the output, and what each layer reports.

    `count`: only the first so many of the stack are layers and the rest is padding, for stages of a pipeline; None: all are.
    `unroll`: writes the layers out instead of a loop.
    """
    block, ready = Block(config, execution, is_moe), layer_gatherer(execution, "moe" if is_moe else "dense")

    def layer_of(rows: tuple[Array, TokenContext], layer_params: Params, layer_bias: Array) -> tuple[Array, LayerReports]:
        out = block.apply({"params": ready(layer_params)}, rows[0], layer_bias, rows[1])
        return out.x, LayerReports(*out[1:])

    halves = in_halves(rematerialised(layer_of, execution.remat), execution.overlap)

    def layer(x: Array, per_layer: tuple[Params, Array], context: TokenContext) -> tuple[Array, LayerReports]:
        return halves((x, context), *per_layer)

    # A CPU copies what each layer keeps into stacks. A few layers without remat are faster unrolled, and still compile quickly.
    if count is None and not unroll and execution.remat == "none" and unrolled(bias.shape[0]):
        return jax.lax.scan(functools.partial(layer, context=context), x, (stack, bias), unroll=True)
    return scan_layers(layer, x, (stack, bias), context, count, unroll)
