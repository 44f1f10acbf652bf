"""The products of linear layers in a trained model, and what a recipe makes of each.

`products_of` runs the model a layer at a time, without FP8, and keeps x, W and dy of every Linear of every layer of the
main model. dy is the gradient of the loss with respect to a zero that is added to y. `errors_of` multiplies these same
operands as a recipe says: the errors of Fprop, Dgrad and Wgrad are then those of the products alone, and none is handed
on from one product to the next.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Config
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.loss import head_losses, objective, target_counts
from dsv3_jax.model.transformer import Block, Execution, Params, TokenContext, TrunkOutput, embed, token_context
from dsv3_jax.precision.linear import grouped_linear, linear
from dsv3_jax.precision.policy import BF16, Recipe, Role
from dsv3_jax.precision.quantize import BLOCK
from dsv3_jax.training.state import TrainState

GEMMS = ("Fprop", "Dgrad", "Wgrad")


@functools.partial(jax.tree_util.register_dataclass, data_fields=("x", "kernel", "block_expert", "dy"), meta_fields=("role",))
@dataclasses.dataclass(frozen=True)
class Product:
    """Operands of one Linear: rows of x, or blocks of rows with the expert of each."""

    x: Array
    kernel: Array
    block_expert: Array | None
    dy: Array
    role: Role


class _Recorder:
    """A tap that keeps what it sees, and adds a probe to the result of each product."""

    def __init__(self, probes: list[Array] | None) -> None:
        self.probes, self.seen = probes, list[Product]()

    def __call__(self, x: Array, kernel: Array, block_expert: Array | None, role: Role, y: Array) -> Array:
        probe = jnp.zeros_like(y) if self.probes is None else self.probes[len(self.seen)]
        self.seen.append(Product(x, kernel, block_expert, probe, role))
        return y + probe


def product_names(config: Config, is_moe: bool) -> list[str]:
    """The products of a layer in the order that a token meets them."""
    queries = ["q"] if config.model.q_lora_rank is None else ["q_a", "q_b"]
    shared = ["shared up", "shared down"] if config.model.n_shared_experts else []
    return [*queries, "kv_a", "kv_b", "o", *(["experts up", "experts down", *shared] if is_moe else ["ffn up", "ffn down"])]


def products_of(state: TrainState, config: Config, rows: Int[Array, "b row"]) -> list[dict[str, Product]]:
    """Operands of the products of each layer, by name, for one batch. The balance loss adds nothing to dy."""
    tokens = rows[:, :-1]
    x, context = embed(state.params, tokens, config.train.compute_dtype), token_context(tokens, Execution())
    layers, inputs = _layers(state, config), []
    for is_moe, params, bias in layers:
        inputs.append(x)
        x, _ = _run_layer(x, None, params, bias, context, config, is_moe)
    d_out, found = _gradient_of_last(x, state, rows, config), []
    for (is_moe, params, bias), x in zip(reversed(layers), reversed(inputs), strict=True):
        d_out, products = _products_of_layer(x, d_out, params, bias, context, config, is_moe)
        found.append(dict(zip(product_names(config, is_moe), products, strict=True)))
    return found[::-1]


def _layers(state: TrainState, config: Config) -> list[tuple[bool, Params, Array]]:
    """Of each layer of the main model: whether it is MoE, its parameters and its router bias."""
    no_bias = jnp.zeros((config.model.num_dense_layers, config.model.n_routed_experts))
    stacks = ((False, "dense", no_bias), (True, "moe", state.router_bias.moe))
    return [
        (is_moe, jax.tree.map(lambda leaf, i=i: leaf[i], state.params[name]), layer_bias)
        for is_moe, name, bias in stacks
        for i, layer_bias in enumerate(bias)
    ]


@functools.partial(jax.jit, static_argnames=("config", "is_moe"))
def _run_layer(
    x: Array, probes: list[Array] | None, params: Params, bias: Array, context: TokenContext, config: Config, is_moe: bool
) -> tuple[Array, list[Product]]:
    recorder = _Recorder(probes)
    execution = Execution(config.train.compute_dtype, "reference", recipe=Recipe(impl="reference", tap=recorder))
    out = Block(config.model, execution, is_moe).apply({"params": params}, x, bias, context)
    return out.x, recorder.seen


@functools.partial(jax.jit, static_argnames=("config", "is_moe"))
def _products_of_layer(
    x: Array, d_out: Array, params: Params, bias: Array, context: TokenContext, config: Config, is_moe: bool
) -> tuple[Array, list[Product]]:
    """Gradient of a layer's input, and the products, from the gradient of its output."""
    run = functools.partial(_run_layer, params=params, bias=bias, context=context, config=config, is_moe=is_moe)
    probes = [jnp.zeros(product.dy.shape, product.dy.dtype) for product in jax.eval_shape(run, x, None)[1]]
    _, pull, products = jax.vjp(run, x, probes, has_aux=True)
    dx, dys = pull(d_out)
    return dx, [dataclasses.replace(product, dy=dy) for product, dy in zip(products, dys, strict=True)]


def _gradient_of_last(x: Array, state: TrainState, rows: Array, config: Config) -> Array:
    """Gradient of the loss, MTP included, with respect to the output of the last layer."""
    model, execution = config.model, Execution(config.train.compute_dtype, "reference")

    @jax.jit
    @jax.grad
    def gradient(x: Array) -> Array:
        out = TrunkOutput(rms_norm(x, state.params["norm"], model.rms_norm_eps), state.router_bias.moe, jnp.zeros(()), jnp.zeros(()))
        losses = head_losses(state.params, state.router_bias, out, rows, model, execution)
        return objective(losses, target_counts(rows, model, execution), config.train.mtp_loss_weight, 0.0)

    return gradient(x)


def errors_of(product: Product, recipes: Mapping[str, Recipe]) -> dict[str, Float[np.ndarray, " gemms"]]:
    """Relative Frobenius errors of Fprop, Dgrad and Wgrad under each recipe, against the products in float32."""
    whole = _in_whole_blocks(product)
    exact = _multiply(whole, BF16)
    return {name: np.array(_relative(_multiply(whole, recipe), exact)) for name, recipe in recipes.items()}


@functools.partial(jax.jit, static_argnames="recipe")
def _multiply(product: Product, recipe: Recipe) -> tuple[Array, Array, Array]:
    """y, dx and dW in float32."""

    def forward(x: Array, kernel: Array) -> Array:
        if product.block_expert is None:
            return linear(x, kernel, recipe, product.role)
        return grouped_linear(x, kernel, product.block_expert, recipe, product.role)

    with jax.default_matmul_precision("highest"):
        y, pull = jax.vjp(forward, product.x.astype(jnp.float32), product.kernel)
        return y, *pull(product.dy.astype(jnp.float32))


@jax.jit
def _relative(ours: tuple[Array, ...], exact: tuple[Array, ...]) -> list[Array]:
    return [jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()) for a, b in zip(ours, exact, strict=True)]


def _in_whole_blocks(product: Product) -> Product:
    """The same rows in blocks of at least 128, as FP8 training cuts them; without FP8 a CPU takes smaller ones."""
    if product.block_expert is None or product.x.shape[1] >= BLOCK:
        return product
    experts, (blocks, rows, _) = product.kernel.shape[0], product.x.shape
    merged, owners = BLOCK // rows, np.asarray(product.block_expert)
    most = min(blocks, blocks // merged + experts)  # every expert may leave one of its new blocks unfilled
    starts, new_owners = np.zeros(experts, int), np.full(most, experts, np.int32)
    used = 0
    for expert, count in enumerate(np.bincount(owners, minlength=experts)[:experts]):
        starts[expert], end = used * merged, used + -(-count // merged)
        new_owners[used:end], used = expert, end
    owned = np.flatnonzero(owners < experts)
    first = np.searchsorted(owners, owners[owned])
    places = starts[owners[owned]] + owned - first

    def moved(old: Array) -> Array:
        new = jnp.zeros((most * merged, rows, old.shape[-1]), old.dtype).at[places].set(old[owned])
        return new.reshape(most, BLOCK, -1)

    return Product(moved(product.x), product.kernel, jnp.asarray(new_owners), moved(product.dy), product.role)
