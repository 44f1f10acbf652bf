"""Prefill and decoding on the devices of a mesh give what one device gives: heads, tokens, experts and sequences over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.placement import place_experts
from dsv3_jax.inference.replicas import with_replicas
from dsv3_jax.inference.unit import Unit, decode, prefill
from dsv3_jax.model.transformer import Execution, logits, trunk
from experiments.bench.collectives import is_product, pairs
from experiments.bench.hlo import depends_on, parse
from tests.small import model, parameters, rows

CONFIG = model(num_attention_heads=4, num_hidden_layers=2)
LENGTH, NEW = 8, 2


def scores_of_one_device(tokens):
    """Scores at every position, by the training form."""
    params, bias = parameters(CONFIG)
    return logits(params, jax.jit(trunk, static_argnums=(3, 4))(params, bias, tokens, CONFIG, Execution()).hidden)


def scores_of_unit(unit, params, tokens, lengths, batches):
    """Scores after each prompt, and after each of the tokens that follow it, in micro-batches."""
    bias = parameters(CONFIG)[1]
    params, cut = unit.put(params), lambda x: x.reshape(batches, -1, *x.shape[1:])
    caches = tuple(unit.empty_cache(len(tokens) // batches, LENGTH + NEW) for _ in range(batches))
    scores, caches, fullness = prefill(params, bias, cut(tokens[:, :LENGTH]), cut(lengths), caches, unit)
    found = [scores]
    for i in range(NEW):
        following = jnp.take_along_axis(tokens, (lengths + i)[:, None], axis=1)[:, 0]
        scores, caches, fullness = decode(params, bias, cut(following), cut(lengths + i), caches, unit)
        found.append(scores)
        assert fullness <= 1
    return [np.asarray(scores).reshape(len(tokens), -1) for scores in found]


@pytest.mark.parametrize(
    ("sizes", "batches", "replicas"),
    [
        (dict(node=2, gpu=2, tensor=2), 1, None),
        pytest.param(dict(node=2, gpu=1, tensor=4), 2, None, marks=pytest.mark.slow),
        pytest.param(dict(node=1, gpu=4, tensor=2, dispatch="direct"), 1, None, marks=pytest.mark.slow),
        pytest.param(dict(node=2, gpu=2, tensor=2), 1, 16, marks=pytest.mark.slow),
    ],
)
def test_equals_one_device(sizes, batches, replicas):
    params, _ = parameters(CONFIG)
    if replicas:
        load = np.random.default_rng(0).lognormal(size=(CONFIG.num_moe_layers, CONFIG.n_routed_experts))
        params = with_replicas(params, place_experts(load, replicas, CONFIG.n_group, sizes["node"], 8))
    tokens, lengths = rows(CONFIG, 16, LENGTH + NEW - 1), jnp.array([8, 5, 1, 7] * 4)
    expected = scores_of_one_device(tokens)
    for i, scores in enumerate(scores_of_unit(Unit.of(CONFIG, Execution(), **sizes), params, tokens, lengths, batches)):
        np.testing.assert_allclose(scores, expected[jnp.arange(16), lengths + i - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_bound_that_is_too_small_is_seen_and_the_call_can_be_made_again():
    params, bias = parameters(CONFIG)
    whole, bounded = (Unit.of(CONFIG, Execution(), node=2, gpu=2, tensor=2, dispatch_bound=bound) for bound in (None, 0.5))
    tokens, lengths = rows(CONFIG, 16, LENGTH - 1)[None], jnp.full((1, 16), LENGTH)
    params = whole.put(params)
    right = prefill(params, bias, tokens, lengths, (whole.empty_cache(16, LENGTH + NEW),), whole)
    wrong = prefill(params, bias, tokens, lengths, (whole.empty_cache(16, LENGTH + NEW),), bounded)
    assert wrong.fullness > 1 >= right.fullness and np.abs(wrong.scores - right.scores).max() > 1e-3
    again = prefill(params, bias, tokens, lengths, wrong.caches, whole)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("step", [prefill, decode])
@pytest.mark.parametrize("batches", [1, 2])
def test_only_with_two_micro_batches_exchanges_and_products_do_not_wait_for_each_other(step, batches):
    unit = Unit.of(CONFIG, Execution(), node=2, tensor=2)
    params, bias = parameters(CONFIG)
    numbers, caches = jnp.ones((batches, 4), jnp.int32), tuple(unit.empty_cache(4, LENGTH) for _ in range(batches))
    tokens = numbers if step is decode else jnp.ones((batches, 4, LENGTH), jnp.int32)
    program = parse(step.lower(unit.put(params), bias, tokens, numbers, caches, unit).compile().as_text())
    lines = program.computations[program.entry]  # so few layers are no loop on a CPU
    sources = depends_on(lines)
    exchanges = [start.name for start, _ in pairs(lines) if start.opcode == "all-to-all"]
    products = [
        line.name for line in lines if is_product(line, program) and any(part in line.attributes for part in ("/experts/", "self_attn"))
    ]
    assert len(exchanges) == 6 * batches and products  # there with numbers, there with rows, back; two hops
    beside = [name for name in exchanges if any(name not in sources[p] and p not in sources[name] for p in products)]
    assert beside == (exchanges if batches == 2 else [])


def test_units_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="16 devices and there are 8"):
        Unit.of(CONFIG, Execution(), node=4, tensor=4)
    with pytest.raises(ConfigError, match="4 attention heads"):
        Unit.of(CONFIG, Execution(), tensor=8)
    unit = Unit.of(CONFIG, Execution(), node=2, tensor=4)
    with pytest.raises(ConfigError, match="multiple of 8"):
        decode(*parameters(CONFIG), jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), jnp.int32), (unit.empty_cache(4, 8),), unit)
