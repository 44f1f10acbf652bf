import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.cache import in_rows
from dsv3_jax.inference.decode import generate
from dsv3_jax.inference.sampling import GREEDY, Sampling, probabilities
from dsv3_jax.inference.speculative import Model, accept, draft, generate_speculatively, speculate_round, start
from dsv3_jax.model.mtp import predict_ahead
from dsv3_jax.model.transformer import Execution, logits, trunk
from tests.small import MODEL, agreeing, model, parameters

EXECUTION = Execution()
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [35, 8, 9]]


def speculative(params, bias, prompts, config, drafts, count, temperature=0.0, seed=0):
    """New tokens of every prompt, drafts proposed, drafts accepted."""
    sequences, proposed, accepted = [[] for _ in prompts], 0, 0
    rounds = generate_speculatively(
        params, bias, prompts, config, EXECUTION,
        drafts=drafts, max_new_tokens=count, temperature=temperature, top_p=1.0, key=jax.random.key(seed),
    )  # fmt: skip
    for done in rounds:
        for sequence, new in zip(sequences, done.tokens, strict=True):
            sequence += new
        proposed, accepted = proposed + done.proposed, accepted + done.accepted
    return sequences, proposed, accepted


@pytest.mark.parametrize(
    ("modules", "drafts"), [pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(1, 3, marks=pytest.mark.slow), (2, 3)]
)
def test_greedy_speculation_says_what_plain_greedy_decoding_says(modules, drafts):
    config = model(num_nextn_predict_layers=modules)
    params, bias = agreeing(config)
    steps = generate(params, bias, PROMPTS, config, EXECUTION, max_new_tokens=20, temperature=0.0, top_p=1.0, key=jax.random.key(0))
    got, proposed, accepted = speculative(params, bias, PROMPTS, config, drafts, 20)
    assert got == np.stack(list(steps), 1).tolist()
    assert 0 < accepted < proposed  # both ways through a round were taken


def test_drafts_over_the_cache_are_those_of_the_training_pass():
    config = model(num_nextn_predict_layers=2)
    params, bias = agreeing(config)
    prompt = [7, 3, 3, 21, 40, 11]
    padded, draws, settings = np.int32([[*prompt, 0, 0]]), (jnp.zeros(1, jnp.uint32), GREEDY), (config, EXECUTION, 2)
    first, state = start(params, bias, padded, np.int32([6]), 32, *draws, *settings)
    known = [*prompt, int(first[0])]

    @jax.jit
    def drafted(state):
        return draft(
            Model(params, bias, config, EXECUTION, 2, in_rows(state.cache)), state, jax.random.split(jax.random.key(0), 1), GREEDY
        )[0]

    @jax.jit
    def in_training(row):
        hidden = trunk(params, bias, row[:, :-1], config, EXECUTION).hidden
        return [logits(params, out.hidden[0]).argmax(-1) for out in predict_ahead(params, bias, hidden, row, config, EXECUTION)]

    for _ in range(4):
        # Position m-1 of module k predicts token m+k; module 2 sees the first draft as a token.
        found = drafted(state)
        row = np.zeros((1, 20), np.int32)
        row[0, : len(known) + 1] = [*known, int(found[0, 0])]
        assert found[0].tolist() == [int(tokens[len(known) - 2]) for tokens in in_training(jnp.asarray(row))]
        tokens, kept, state = speculate_round(params, bias, state, np.array([True]), *draws, None, *settings)
        known += tokens[0, : int(kept[0]) + 1].tolist()


def chi_square(counts, expected):
    """Statistic over its degrees of freedom, cells of fewer than five expected together in one."""
    rare = expected < 5
    pooled = lambda x: np.append(x[~rare], x[rare].sum())  # noqa: E731
    return ((pooled(counts) - pooled(expected)) ** 2 / np.maximum(pooled(expected), 1e-9)).sum() / (~rare).sum()


def test_accepted_and_replaced_drafts_follow_the_main_model():
    n, rng = 40000, np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(4), 3).astype(np.float32), rng.dirichlet(np.ones(4), 2).astype(np.float32)
    drafts = jax.random.categorical(jax.random.key(1), jnp.log(q)[None], shape=(n, 2)).astype(jnp.int32)
    wide = lambda chances: jnp.broadcast_to(jnp.asarray(chances), (n, *chances.shape))  # noqa: E731
    tokens, kept = (np.asarray(x) for x in accept(jax.random.split(jax.random.key(2), n), drafts, wide(q), wide(p)))
    for i in range(3):
        there = tokens[kept >= i, i]
        assert chi_square(np.bincount(there, minlength=4), p[i] * len(there)) < 3
    assert np.mean(kept >= 1) == pytest.approx(np.minimum(p[0], q[0]).sum(), abs=0.01)


@pytest.mark.slow
def test_sampled_sequences_follow_the_distribution_of_plain_sampling():
    config = dataclasses.replace(MODEL, vocab_size=6)
    params, bias = agreeing(config)
    params = {**params, "lm_head": params["lm_head"] / 3}
    prompt, n = [2, 5, 1], 4000
    got, proposed, accepted = speculative(params, bias, [prompt] * n, config, 2, 3, temperature=1.3)
    every = np.array(np.meshgrid(*[range(6)] * 3, indexing="ij")).reshape(3, -1).T
    row = jnp.concatenate([jnp.broadcast_to(jnp.array(prompt), (216, 3)), jnp.asarray(every)], 1)
    scores = logits(params, jax.jit(trunk, static_argnums=(3, 4))(params, bias, row, config, EXECUTION).hidden)
    chance = np.ones(216)
    for i in range(3):
        chance *= np.asarray(probabilities(scores[:, 2 + i], Sampling(1.3)))[np.arange(216), every[:, i]]
    counts = np.bincount(np.array(got) @ [36, 6, 1], minlength=216)
    assert chi_square(counts, chance * n) < 1.4
    assert 0.2 < accepted / proposed < 0.98


def test_what_cannot_be_speculated_is_refused():
    config = model(num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="0 MTP modules"):
        speculative(*parameters(config), PROMPTS, config, 1, 4)
    with pytest.raises(ValueError, match="0 drafts"):
        speculative(*parameters(MODEL), PROMPTS, MODEL, 0, 4)
