"""Experts spread over eight devices give what one device gives, whatever the routing, and send no more than they must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.model.moe import expert_ffn
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.expert import Placement, block_sizes, make_hops, pack, plan_hop, unpack
from dsv3_jax.parallel.mesh import BATCH_AXES, EXPERT_AXES, make_mesh
from dsv3_jax.precision.policy import BF16, EXPERT_UP, Recipe
from dsv3_jax.precision.quantize import dequantize, quantize
from tests.small import model

FP8 = Recipe(fp8=True)
EXPERTS, PICKED, WIDTH, INNER = 16, 3, 160, 24  # 160: one whole tile of 128, and a part
MESH = MeshConfig(node=2, gpu=4)
ROUTING = model(n_routed_experts=EXPERTS, num_experts_per_tok=PICKED, n_group=1)


def layer(tokens, skew, seed=0):
    """Activations, gates, kernels and a cotangent; a large skew sends all tokens to the last experts and leaves others empty."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(tokens, EXPERTS)) + skew * np.arange(EXPERTS)
    experts = jnp.asarray(np.argsort(-scores, -1)[:, :PICKED], jnp.int32)
    shapes = ((tokens, WIDTH), (tokens, PICKED), (EXPERTS, WIDTH, 2, INNER), (EXPERTS, INNER, WIDTH), (tokens, WIDTH))
    return experts, *(jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.float32) for shape in shapes)


def value_and_gradients(placement, recipe, rows, experts, x, gates, gate_up, down, cotangent):
    def ffn(*arguments):
        x, gates, gate_up, down = arguments
        return expert_ffn(x, Routing(experts, gates, jnp.zeros((x.shape[0], EXPERTS))), gate_up, down, rows, recipe, placement)

    y, pull, fullness = jax.vjp(ffn, x, gates, gate_up, down, has_aux=True)
    return (y, *pull(cotangent)), fullness


@functools.cache
def spread_layer(dispatch, recipe, rows, bound=None):
    """The same over eight devices."""
    placement = Placement(BATCH_AXES, make_hops(dispatch, MESH, ROUTING), bound)
    tokens, experts = P(EXPERT_AXES), P(EXPERT_AXES)

    def on_one_device(*arguments):
        results, fullness = value_and_gradients(placement, recipe, rows, *arguments)
        return results, jax.lax.pmax(fullness, BATCH_AXES)

    return jax.jit(jax.shard_map(
        on_one_device, mesh=make_mesh(MESH), check_vma=False, in_specs=(tokens, tokens, tokens, experts, experts, tokens),
        out_specs=((tokens, tokens, tokens, experts, experts), P()),
    ))  # fmt: skip


@functools.cache
def whole_layer(recipe, rows):
    return jax.jit(functools.partial(value_and_gradients, Placement(), recipe, rows))


@pytest.mark.parametrize(("dispatch", "recipe"), [("direct", BF16), ("two_hop", BF16), ("two_hop", FP8)], ids=["direct", "two_hop", "fp8"])
def test_equals_one_device_under_any_routing(dispatch, recipe):
    rows = 128 if recipe.fp8 else 4
    for skew in (0.0, 0.3, 100.0):
        arguments = layer(64, skew)
        got, fullness = spread_layer(dispatch, recipe, rows)(*arguments)
        expected, _ = whole_layer(recipe, rows)(*arguments)
        assert fullness <= 1
        for name, a, b in zip(("y", "x", "gates", "gate_up", "down"), got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6, err_msg=f"{name}, skew {skew}")


def test_a_bound_is_checked_and_changes_nothing_where_it_suffices():
    even, uneven = layer(64, 0.0), layer(64, 100.0)
    bounded = spread_layer("two_hop", BF16, 4, bound=2.0)
    got, fullness = bounded(*even)
    assert 0.5 < fullness <= 1
    for a, b in zip(got, spread_layer("two_hop", BF16, 4)(*even)[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert bounded(*uneven)[1] > 1


def test_two_hops_cross_nodes_once_a_target_node():
    experts = layer(64, 0.0)[0]
    plan, fullness = plan_hop(experts, EXPERTS // 2, 2, 64)
    crossing = sum(len(set(row // (EXPERTS // 2))) for row in np.asarray(experts))
    assert (np.asarray(plan.source) < 64).sum() == crossing < experts.size
    assert fullness == max((np.asarray(experts) // 8 == node).any(1).sum() for node in (0, 1)) / 64


def test_node_limited_routing_limits_the_blocks():
    limited = model(n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4)
    hops = make_hops("two_hop", MeshConfig(node=8, gpu=4), limited)
    assert [hop.copies for hop in hops] == [4, 4]
    assert block_sizes(100, 8, Placement(hops=hops)) == [100, 800]  # the worst case
    assert block_sizes(100, 8, Placement(hops=hops, bound=1.0)) == [50, 200]


def test_what_is_sent_in_fp8_is_quantized_by_the_expert_to_the_same_numbers():
    x = jax.random.normal(jax.random.key(0), (9, 300)) * 10.0 ** jnp.arange(-8, 1)[:, None]
    packed = pack(x.at[3].set(0))
    assert packed.shape == (9, 300 + 3)
    received = unpack(packed, 300, "bfloat16")
    expected = dequantize(quantize(x.at[3].set(0), FP8.input_tile, power_of_two=EXPERT_UP.input_power_of_two))
    np.testing.assert_array_equal(received.astype(jnp.float32), expected)
    np.testing.assert_array_equal(dequantize(quantize(received, FP8.input_tile, power_of_two=True)), expected)
