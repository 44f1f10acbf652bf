"""Which experts a model's tokens pick, layer by layer: to look at routing from outside a training step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.router import route
from dsv3_jax.model.transformer import Block, Execution, Params, RouterBias, embed, scan_blocks, token_context


def picked_experts(
    params: Params, bias: RouterBias, tokens: Int[Array, "b t"], config: ModelConfig, execution: Execution
) -> Int[Array, "layers b*t k"]:
    """The experts of every token in each MoE layer of the main model, best first, as its own forward pass picks them."""
    x, context = embed(params, tokens, execution.dtype), token_context(tokens, execution)
    if "dense" in params:
        no_bias = jnp.zeros((config.num_dense_layers, config.n_routed_experts))
        x, _ = scan_blocks(params["dense"], no_bias, x, context, config, execution, False)
    block = Block(config, execution, is_moe=True)

    def layer(x: Array, per_layer: tuple[Params, Array]) -> tuple[Array, Array]:
        layer_params, layer_bias = per_layer
        seen = block.apply({"params": layer_params}, x, context, method=Block.router_input)
        picked = route(seen.reshape(-1, config.hidden_size), layer_params["mlp"]["router"], layer_bias, config).experts
        return block.apply({"params": layer_params}, x, layer_bias, context).x, picked

    return jax.lax.scan(layer, x, (params["moe"], bias.moe))[1]
