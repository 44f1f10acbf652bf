"""Multi-token prediction (V3 sec. 2.2): D modules in sequence, each predicting one token further ahead.

Module k sees, at position i, the hidden state of module k-1 and the embedding of token i+k, and predicts
token i+k+1, so the causal chain is kept at every depth. Embedding and head are the main model's. The
input of the first module is the main model's hidden state *after* the final norm, as in the public
checkpoint; later modules receive the block output of the one before.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.mla import LayerStore
from dsv3_jax.model.transformer import (
    Block,
    BlockOutput,
    Execution,
    LayerReports,
    Params,
    RouterBias,
    TokenContext,
    embed,
    in_halves,
    layer_gatherer,
    rematerialised,
    segments,
)


class MTPOutput(NamedTuple):
    """One prediction depth: states for the head, which of them have a target, and what its layer reports."""

    hidden: Float[Array, "b t d"]
    targets: Int[Array, "b t"]
    weights: Float[Array, "b t"]
    load: Float[Array, " e"]
    balance_loss: Float[Array, ""]
    fullness: Float[Array, ""]


class MTPModule(nn.Module):
    """`Block(eh_proj [enorm(embedding); hnorm(hidden)])`, and the norm before the shared head (eq. 21-23)."""

    config: ModelConfig
    execution: Execution

    def setup(self) -> None:
        c = self.config
        self.enorm = RMSNorm(c.rms_norm_eps)
        self.hnorm = RMSNorm(c.rms_norm_eps)
        self.eh_proj = Linear(c.hidden_size, c.initializer_range)
        self.block = Block(c, self.execution, is_moe=True)
        self.norm = RMSNorm(c.rms_norm_eps)

    def __call__(
        self, hidden: Float[Array, "b t d"], embedding: Float[Array, "b t d"], bias: Float[Array, " e"], context: TokenContext
    ) -> tuple[BlockOutput, Float[Array, "b t d"]]:
        """The block's output, which the next depth takes, and its normalised copy, which the head takes."""
        out = self.block(self._join(hidden, embedding), bias, context)
        return out, self.norm(out.x)

    def decode(
        self,
        hidden: Float[Array, "b t d"],
        embedding: Float[Array, "b t d"],
        bias: Float[Array, " e"],
        positions: Int[Array, "b t"],
        cache: Any,
        mask: Bool[Array, "b t s"] | None,
        store: LayerStore,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"], Any]:
        """The same over the module's own latent cache: the block's output, its normalised copy, the cache; see `MLA.decode`."""
        x, cache, _ = self.block.decode(self._join(hidden, embedding), bias, positions, cache, mask, store)
        return x, self.norm(x), cache

    def _join(self, hidden: Array, embedding: Array) -> Array:
        return self.eh_proj(jnp.concatenate([self.enorm(embedding), self.hnorm(hidden)], axis=-1))


def target_weights(rows: Int[Array, "b row"], depth: int, eos_id: int | None) -> Float[Array, "b t"]:
    """1 where position i of a row of T+1 tokens has the target i + depth + 1, in the same document when `eos_id` is given."""
    t = rows.shape[1] - 1
    inside = jnp.arange(t) + depth + 1 <= t
    weights = jnp.broadcast_to(inside, (rows.shape[0], t))
    document = segments(rows, eos_id)
    if document is not None:
        weights = weights & (document[:, :t] == shifted(document, depth + 1))
    return weights.astype(jnp.float32)


def shifted(rows: Int[Array, "b row"], by: int) -> Int[Array, "b t"]:
    """Entry i + by at position i of T = row - 1 positions; past the end of the row the last entry repeats."""
    t = rows.shape[1] - 1
    return rows[:, jnp.minimum(jnp.arange(t) + by, t)]


def predict_ahead(
    params: Params, bias: RouterBias, hidden: Float[Array, "b t d"], rows: Int[Array, "b row"], config: ModelConfig, execution: Execution
) -> list[MTPOutput]:
    """Runs the modules over rows of T+1 tokens; `hidden` is the trunk's output for the first T of each."""
    t = rows.shape[1] - 1
    positions = jnp.broadcast_to(jnp.arange(t), (rows.shape[0], t))
    segment_ids = segments(rows[:, :t], execution.document_eos)
    module, outputs = MTPModule(config, execution), []
    ready = layer_gatherer(execution, "mtp")

    def layer(rows: tuple[Array, Array, TokenContext], module_params: Params, module_bias: Array) -> tuple[Any, LayerReports]:
        hidden, embedding, context = rows
        out, normed = module.apply({"params": ready(module_params)}, hidden, embedding, module_bias, context)
        return (out.x, normed), LayerReports(*out[1:])

    apply = in_halves(rematerialised(layer, execution.remat), execution.overlap)
    for k in range(1, config.num_nextn_predict_layers + 1):
        module_params = jax.tree.map(lambda p, k=k: p[k - 1], params["mtp"])
        weights = target_weights(rows, k, execution.document_eos)
        context = TokenContext(positions, segment_ids, weights)
        embedding = embed(params, shifted(rows, k), execution.dtype)
        (hidden, normed), reports = apply((hidden, embedding, context), module_params, bias.mtp[k - 1])
        outputs.append(MTPOutput(normed, shifted(rows, k + 1), weights, *reports))
    return outputs
