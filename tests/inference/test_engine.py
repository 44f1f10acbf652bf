import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import MeshConfig
from dsv3_jax.inference import decoders
from dsv3_jax.inference.decode import forward_stored, generate
from dsv3_jax.inference.decoders import forward_pages
from dsv3_jax.inference.engine import Engine, EngineSettings
from dsv3_jax.inference.paged import init_pages, paged
from dsv3_jax.inference.sampling import GREEDY, Sampling, probabilities
from dsv3_jax.inference.speculative import generate_speculatively, read_prompts, speculate_round, start
from dsv3_jax.model.mla import Latent
from dsv3_jax.model.transformer import Execution, logits, trunk
from dsv3_jax.parallel.mesh import make_mesh, replicated
from tests.inference.test_speculative import chi_square
from tests.small import MODEL, agreeing, model, parameters, rows

EXECUTION = Execution()
SETTINGS = EngineSettings(rows=2, pages=18, page_size=4, chunk=6)  # one sequence can be as long as MODEL takes


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
    for begin, size in ((0, 5), (5, 1), (6, 5)):
        positions = jnp.broadcast_to(jnp.arange(begin, begin + size), (2, size))
        hidden, cache = run(tokens[:, begin : begin + size], positions, cache)
        pieces.append(hidden)
    error = np.abs(jnp.concatenate(pieces, 1) - expected)
    assert np.median(error) < tolerance and (fp8 or error.max() < 10 * tolerance)
    if fp8:
        assert cache.moe.c_kv.dtype == jnp.float8_e4m3fn and np.median(error) > 1e-4


def started(config=MODEL, **settings):
    """An engine whose model is placed as that of a run is."""
    placed = jax.device_put(agreeing(config), replicated(make_mesh(MeshConfig())))
    return Engine(*placed, config, EXECUTION, dataclasses.replace(SETTINGS, **settings))


def drain(engine, into):
    """Steps until nothing is left to do; tokens of each request."""
    while not engine.idle:
        for new in engine.step():
            into.setdefault(new.request, []).append(new.token)
    return into


def alone(prompt, count, config=MODEL):
    """What plain greedy decoding says after one prompt. It always goes on for as long, so that all prompts share two programs."""
    steps = generate(*agreeing(config), [prompt], config, EXECUTION, max_new_tokens=50, temperature=0.0, top_p=1.0, key=jax.random.key(0))
    return [int(token[0]) for token in steps][:count]


def drafted_alone(prompt, count, drafts, config):
    """Drafts proposed and accepted where a prompt is continued over rows of slots, by itself."""
    rounds = generate_speculatively(
        *agreeing(config), [prompt], config, EXECUTION,
        drafts=drafts, max_new_tokens=count, temperature=0.0, top_p=1.0, key=jax.random.key(0),
    )  # fmt: skip
    return np.sum([(done.proposed, done.accepted) for done in rounds], axis=0)


@pytest.mark.parametrize(
    ("modules", "drafts"), [(1, 0), pytest.param(1, 1, marks=pytest.mark.slow), (2, 2), pytest.param(1, 2, marks=pytest.mark.slow)]
)
def test_sequences_join_and_leave_at_fixed_shapes(modules, drafts):
    config, programs = model(num_nextn_predict_layers=modules), (forward_pages, read_prompts, speculate_round)
    for program in programs:
        program.clear_cache()
    engine, rng, told = started(config, drafts=drafts), np.random.default_rng(0), {}
    lengths = ((3, 9), (14, 4), (1, 6), (7, 12), (6, 1), (13, 7))  # of prompt and answer
    requests = [(rng.integers(0, 48, length).tolist(), count) for length, count in lengths]
    numbers = [engine.submit(*requests[0]), engine.submit(*requests[1])]
    for _ in range(5):
        for new in engine.step():
            told.setdefault(new.request, []).append(new.token)
    numbers += [engine.submit(*request) for request in requests[2:]]
    drain(engine, told)
    assert [told[number] for number in numbers] == [alone(*request, config) for request in requests]
    assert [program._cache_size() for program in programs] == ([0, 1, 1] if drafts else [2, 0, 0])
    if drafts:  # prompts in chunks left the modules what prompts in one piece leave them, and both ways through a round were taken
        assert [engine.drafted, engine.accepted] == sum(drafted_alone(*request, drafts, config) for request in requests).tolist()
        assert 0 < engine.accepted < engine.drafted
    longest = (requests[1][0], 50)
    number = engine.submit(*longest)
    assert drain(engine, {}) == {number: alone(*longest, config)}
    assert (engine.running, engine.free_pages) == (0, SETTINGS.pages - 1)


def test_a_prompt_in_chunks_leaves_modules_what_a_prompt_in_one_piece_leaves_them():
    config, prompt = model(num_nextn_predict_layers=2), np.random.default_rng(0).integers(0, 48, 13).tolist()
    engine, settings = started(config, drafts=2), (jnp.zeros(1, jnp.uint32), GREEDY, config, EXECUTION, 2)
    padded = np.int32([prompt + [0] * 19])
    first, whole = start(*agreeing(config), padded, np.int32([13]), 32, *settings)
    engine.submit(prompt, 4)
    steps = [engine.step() for _ in range(3)]  # the last chunk is one token, fewer than a window has
    assert [[new.token for new in news] for news in steps] == [[], [], first.tolist()]
    state = engine._decoder.state
    np.testing.assert_allclose(state.hidden[0], whole.hidden[0], atol=1e-4)
    for name in Latent._fields:
        found, expected = (np.asarray(getattr(of.drafter, name)) for of in (state, whole))
        for k in range(2):  # up to the last positions, whose tokens ahead are not known yet
            np.testing.assert_allclose(found[k, 1:5].reshape(16, -1)[: 12 - k], expected[k, 0, : 12 - k], atol=1e-4)


@pytest.mark.slow
def test_rounds_over_fp8_pages_say_what_single_steps_over_them_say():
    def said(drafts):
        engine = started(drafts=drafts, fp8=True)
        for prompt in ([3, 1, 4, 1, 5, 9, 2, 6], [5], [35, 8, 9]):
            engine.submit(prompt, 12)
        return drain(engine, {})

    assert said(1) == said(0)


@pytest.mark.parametrize("drafts", [0, 2])
def test_draws_depend_on_the_seed_and_not_on_the_company(drafts):
    def drawn(others):
        engine = started(model(num_nextn_predict_layers=max(1, drafts)), drafts=drafts)
        for other in others:
            engine.submit([7, 7], 3, temperature=float(other % 2), seed=other)
        number = engine.submit([3, 1, 4], 8, temperature=1.0, seed=5)
        return drain(engine, {})[number]

    assert drawn([]) == drawn([1, 2]) != alone([3, 1, 4], 8)


def chances_of(params, bias, config, prompt, sampling):
    """The model's probability of every three tokens after a prompt."""
    size = config.vocab_size
    every = np.array(np.meshgrid(*[range(size)] * 3, indexing="ij")).reshape(3, -1).T
    row = jnp.concatenate([jnp.broadcast_to(jnp.array(prompt), (len(every), len(prompt))), jnp.asarray(every)], 1)
    scores = logits(params, jax.jit(trunk, static_argnums=(3, 4))(params, bias, row, config, EXECUTION).hidden)
    steps = [np.asarray(probabilities(scores[:, len(prompt) - 1 + i], sampling)) for i in range(3)]
    return np.prod([step[np.arange(len(every)), every[:, i]] for i, step in enumerate(steps)], axis=0)


@pytest.mark.slow
def test_sampled_requests_follow_their_own_distributions():
    config, prompt, n = model(vocab_size=4), [2, 3, 1], 900
    params, bias = agreeing(config)
    params = {**params, "lm_head": params["lm_head"] / 3}
    engine = Engine(params, bias, config, EXECUTION, dataclasses.replace(SETTINGS, rows=4, drafts=2))
    ways = (Sampling(1.3, 1.0), Sampling(0.9, 0.8), GREEDY)  # of neighbours in the batch
    kinds = {engine.submit(prompt, 3, **ways[i % 3]._asdict(), seed=10_000 + i): i % 3 for i in range(n)}
    told = drain(engine, {})
    for kind, sampling in enumerate(ways):
        found = np.array([tokens for number, tokens in told.items() if kinds[number] == kind]) @ [16, 4, 1]
        counts, expected = np.bincount(found, minlength=64), chances_of(params, bias, config, prompt, sampling) * len(found)
        assert not counts[expected == 0].any() and chi_square(counts, expected) < 1.4
    assert 0.2 < engine.accepted / engine.drafted < 0.98


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_cancelled_request_and_an_end_token_give_their_pages_back(drafts):
    config = model(num_nextn_predict_layers=max(1, drafts))
    engine, rounds = started(config, drafts=drafts), []
    engine.submit([34, 15, 11], 16)
    while not engine.idle:
        rounds.append([new.token for new in engine.step()])
    said, sizes = [token for tokens in rounds for token in tokens], [len(tokens) for tokens in rounds]
    assert (max(sizes) > 1) == bool(drafts)
    place = sum(sizes[: sizes.index(max(sizes))])  # the first token of the largest round, and not said before
    ended = engine.submit([34, 15, 11], 16, eos_ids=[said[place]])
    assert drain(engine, {}) == {ended: said[: place + 1]}
    first, second, third = engine.submit([34, 15, 11], 16), engine.submit([9] * 20, 16), engine.submit([9] * 20, 16)
    for _ in range(3):
        engine.step()
    assert (engine.waiting, engine.running) == (1, 2)  # the rows are taken
    for number in (first, second, third):
        engine.cancel(number)
    assert engine.idle and engine.free_pages == SETTINGS.pages - 1 and engine.step() == []
    again = engine.submit([34, 15, 11], 16)
    assert drain(engine, {}) == {again: said}


@pytest.mark.parametrize(("prompt", "count", "part"), [([], 4, "at least 1"), ([1] * 40, 40, "64"), ([1] * 40, 20, "15 pages")])
def test_requests_that_could_never_run_are_refused(prompt, count, part):
    with pytest.raises(ValueError, match=part):
        started(pages=13).submit(prompt, count)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_program_takes_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed = .*: must lie in"):
        started(pages=13).submit([1], 4, seed=seed)


@pytest.mark.parametrize("size", [{"rows": 0}, {"pages": 1}, {"chunk": 0}, {"page_size": 0}, {"drafts": -1}])
def test_sizes_with_which_nothing_runs_are_refused(size):
    with pytest.raises(ValueError, match="must be at least"):
        dataclasses.replace(SETTINGS, **size)


def test_drafts_take_pages_and_modules():
    with pytest.raises(ValueError, match="13 pages, the pool has 12"):
        started(pages=13, drafts=2).submit([1] * 30, 18)
    started(pages=13, drafts=1).submit([1] * 30, 18)
    with pytest.raises(ValueError, match="0 MTP modules"):
        config = model(num_nextn_predict_layers=0)
        Engine(*parameters(config), config, EXECUTION, dataclasses.replace(SETTINGS, drafts=1))


def test_more_drafts_than_the_kernel_takes_are_refused_or_logged(monkeypatch, caplog):
    monkeypatch.setattr(decoders, "use_pallas", lambda impl: impl != "reference")
    with caplog.at_level(logging.INFO):
        started(drafts=3)
        assert not caplog.text
        started(drafts=4)
    assert "5 positions in a round" in caplog.text
    with pytest.raises(NotImplementedError, match="takes 4; use impl='auto', or fewer drafts"):
        Engine(*agreeing(MODEL), MODEL, Execution(impl="pallas"), dataclasses.replace(SETTINGS, drafts=4))
