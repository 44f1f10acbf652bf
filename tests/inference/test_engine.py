import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference.decode import forward_stored, generate
from dsv3_jax.inference.engine import Engine, EngineSettings, forward_pages
from dsv3_jax.inference.paged import init_pages, paged
from dsv3_jax.model.transformer import Execution, trunk
from dsv3_jax.parallel.mesh import make_mesh, replicated
from tests.small import MODEL, parameters, rows

EXECUTION = Execution()
SETTINGS = EngineSettings(rows=2, pages=13, page_size=4, chunk=6)


@pytest.mark.parametrize(("fp8", "tolerance"), [(False, 1e-4), (True, 0.25)])
def test_pages_in_any_order_equal_the_full_forward_pass(fp8, tolerance):
    params, bias = parameters(MODEL)
    tokens = rows(MODEL, 2, 11)[:, :-1]
    expected = jax.jit(trunk, static_argnums=(3, 4))(params, bias, tokens, MODEL, EXECUTION).hidden
    table = jnp.array([[5, 1, 3], [2, 6, 4]])

    @jax.jit
    def run(tokens, positions, cache):
        mask = jnp.arange(12) <= positions[:, :, None]
        return forward_stored(params, bias, tokens, positions, cache, mask, paged(table), MODEL, EXECUTION)

    pieces, cache = [], init_pages(MODEL, 7, 4, "float32", fp8)
    for start, size in ((0, 5), (5, 1), (6, 5)):
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        hidden, cache = run(tokens[:, start : start + size], positions, cache)
        pieces.append(hidden)
    error = np.abs(jnp.concatenate(pieces, 1) - expected)
    assert np.median(error) < tolerance and (fp8 or error.max() < 10 * tolerance)
    if fp8:
        assert cache.moe.c_kv.dtype == jnp.float8_e4m3fn and np.median(error) > 1e-4


def alone(prompt, count):
    """What plain greedy decoding says after one prompt."""
    steps = generate(
        *parameters(MODEL), [prompt], MODEL, EXECUTION, max_new_tokens=count, temperature=0.0, top_p=1.0, key=jax.random.key(0)
    )
    return [int(token[0]) for token in steps]


def drain(engine, into):
    """Steps until nothing is left to do; tokens of each request."""
    while not engine.idle:
        for new in engine.step():
            into.setdefault(new.request, []).append(new.token)
    return into


def test_sequences_join_and_leave_at_fixed_shapes():
    placed = jax.device_put(parameters(MODEL), replicated(make_mesh(MeshConfig())))  # as those of a run are
    engine = Engine(*placed, MODEL, EXECUTION, SETTINGS)
    rng = np.random.default_rng(0)
    requests = [(rng.integers(0, 48, length).tolist(), count) for length, count in ((3, 9), (14, 4), (1, 6), (7, 12), (6, 1))]
    compiled = forward_pages._cache_size()
    told: dict[int, list[int]] = {}
    numbers = [engine.submit(*requests[0]), engine.submit(*requests[1])]
    for _ in range(5):
        for new in engine.step():
            told.setdefault(new.request, []).append(new.token)
    numbers += [engine.submit(*request) for request in requests[2:]]
    drain(engine, told)
    assert [told[number] for number in numbers] == [alone(*request) for request in requests]
    assert forward_pages._cache_size() - compiled == 2  # a chunk, and a token of every row
    assert (engine.running, engine.free_pages) == (0, SETTINGS.pages - 1)


def test_draws_depend_on_the_seed_and_not_on_the_company():
    def drawn(others):
        engine = Engine(*parameters(MODEL), MODEL, EXECUTION, SETTINGS)
        for other in others:
            engine.submit([7, 7], 3, temperature=float(other % 2), seed=other)
        number = engine.submit([3, 1, 4], 8, temperature=1.0, seed=5)
        return drain(engine, {})[number]

    assert drawn([]) == drawn([1, 2]) != alone([3, 1, 4], 8)


def test_a_cancelled_request_and_an_end_token_give_their_pages_back():
    engine = Engine(*parameters(MODEL), MODEL, EXECUTION, SETTINGS)
    said = alone([3, 1, 4], 8)
    first, second, third = engine.submit([3, 1, 4], 8, eos_ids=said[2:3]), engine.submit([9] * 20, 16), engine.submit([9] * 20, 16)
    engine.step()
    assert (engine.waiting, engine.running, engine.free_pages) == (1, 2, 0)  # the rows are taken, and so are the pages
    engine.cancel(second)
    engine.cancel(third)
    assert drain(engine, {}).get(first, [])[-1] == said[2]
    assert engine.free_pages == SETTINGS.pages - 1


@pytest.mark.parametrize(("prompt", "count", "part"), [([], 4, "at least 1"), ([1] * 40, 40, "64"), ([1] * 40, 20, "15 pages")])
def test_requests_that_could_never_run_are_refused(prompt, count, part):
    with pytest.raises(ValueError, match=part):
        Engine(*parameters(MODEL), MODEL, EXECUTION, SETTINGS).submit(prompt, count)
