import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.inference.cache import init_cache
from dsv3_jax.inference.decode import at_rest, forward_cached, generate
from dsv3_jax.inference.sampling import GREEDY, Sampling, sample, top_p_mask
from dsv3_jax.inference.speculative import generate_speculatively
from dsv3_jax.model.transformer import Execution, logits, trunk
from dsv3_jax.precision.policy import Recipe
from tests.small import MODEL, model, parameters, rows

EXECUTION = Execution()


@pytest.mark.parametrize("config", [MODEL, model(q_lora_rank=None, first_k_dense_replace=0, tie_word_embeddings=True)])
def test_cached_decoding_equals_the_full_forward_pass(config):
    params, bias = parameters(config)
    tokens = rows(config, 2, 11)[:, :-1]
    expected = jax.jit(trunk, static_argnums=(3, 4))(params, bias, tokens, config, EXECUTION).hidden
    cache = init_cache(config, 2, 16, "float32")
    run = jax.jit(forward_cached, static_argnums=(5, 6))
    pieces, start = [], 0
    for size in (5, 1, 5):
        positions = jnp.broadcast_to(jnp.arange(start, start + size), (2, size))
        hidden, cache = run(params, bias, tokens[:, start : start + size], positions, cache, config, EXECUTION)
        pieces.append(hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected, rtol=1e-3, atol=1e-4)


def greedy_without_cache(params, bias, prompt, count):
    run, tokens = jax.jit(trunk, static_argnums=(3, 4)), list(prompt)
    for _ in range(count):
        padded = jnp.zeros((1, 24), jnp.int32).at[0, : len(tokens)].set(jnp.array(tokens))
        hidden = run(params, bias, padded, MODEL, EXECUTION).hidden
        tokens.append(int(logits(params, hidden[0, len(tokens) - 1]).argmax()))
    return tokens[len(prompt) :]


def test_prompts_of_different_length_are_continued_as_if_alone():
    params, bias = parameters(MODEL)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [35, 8, 9]]
    steps = generate(params, bias, prompts, MODEL, EXECUTION, max_new_tokens=6, temperature=0.0, top_p=1.0, key=jax.random.key(0))
    together = np.stack(list(steps), 1)
    for prompt, got in zip(prompts, together, strict=True):
        assert got.tolist() == greedy_without_cache(params, bias, prompt, 6)


def test_weights_at_rest_give_the_same_numbers():
    execution, (params, bias) = Execution("bfloat16"), parameters(MODEL)
    resting = at_rest(params, execution)
    assert resting["moe"]["self_attn"]["o_proj"]["kernel"].dtype == resting["embed"].dtype == jnp.bfloat16
    run = jax.jit(trunk, static_argnums=(3, 4))
    one, other = (run(p, bias, rows(MODEL, 2, 10), MODEL, execution).hidden for p in (params, resting))
    np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


def test_kernels_at_rest_in_fp8_give_the_same_numbers():
    """All forms: training and prefill, the absorbed one, and an MTP module, whose own projection is none of FP8."""
    execution, (params, bias) = Execution("bfloat16", recipe=Recipe(fp8=True)), parameters(MODEL)
    resting = at_rest(params, execution)
    kernel, projection = resting["moe"]["self_attn"]["o_proj"]["kernel"], resting["mtp"]["eh_proj"]["kernel"]
    assert (kernel.values.dtype, projection.dtype) == (jnp.float8_e4m3fn, jnp.bfloat16)
    assert resting["mtp"]["block"]["mlp"]["experts"]["down_proj"].values.dtype == jnp.float8_e4m3fn
    settings = dict(max_new_tokens=6, temperature=0.0, top_p=1.0, key=jax.random.key(0))

    def steps(params):
        hidden = jax.jit(trunk, static_argnums=(3, 4))(params, bias, rows(MODEL, 2, 10), MODEL, execution).hidden
        greedy = [*generate(params, bias, [[3, 1, 4], [5]], MODEL, execution, **settings)]
        drafted = [*generate_speculatively(params, bias, [[3, 1, 4]], MODEL, execution, drafts=1, **settings)]
        return np.float32(hidden), np.stack(greedy), [(done.proposed, done.accepted, done.tokens) for done in drafted]

    (hidden, greedy, drafted), (hidden_resting, *generated) = steps(params), steps(resting)
    np.testing.assert_array_equal(hidden, hidden_resting)
    np.testing.assert_array_equal(greedy, generated[0])
    assert drafted == generated[1]


@pytest.mark.parametrize("prompts", [[[]], [[1] * 60]])
def test_prompts_that_do_not_fit_are_refused(prompts):
    params, bias = parameters(MODEL)
    with pytest.raises(ValueError, match=r"1\.\.64"):
        next(generate(params, bias, prompts, MODEL, EXECUTION, max_new_tokens=10, temperature=0.0, top_p=1.0, key=jax.random.key(0)))


def test_nucleus_is_the_smallest_set_that_reaches_top_p():
    scores = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]))
    kept = np.isfinite(top_p_mask(scores, 0.7))
    np.testing.assert_array_equal(kept, [[False, True, False, True], [True, False, False, False]])
    assert np.isfinite(top_p_mask(scores, 1.0)).all()
    assert (np.isfinite(top_p_mask(scores, 0.0)).sum(-1) == 1).all()


def test_samples_follow_the_tempered_distribution():
    probabilities = np.array([0.6, 0.3, 0.1])
    scores = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (20000, 3))
    drawn = np.bincount(sample(scores, jax.random.key(0), Sampling(2.0)), minlength=3) / 20000
    tempered = probabilities**0.5 / (probabilities**0.5).sum()
    np.testing.assert_allclose(drawn, tempered, atol=0.015)
    assert (np.asarray(sample(scores, jax.random.key(0), GREEDY)) == 0).all()
