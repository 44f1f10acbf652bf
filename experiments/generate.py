"""Continues a prompt with a trained model, over the latent cache.

uv run -m experiments.generate --workdir=runs/tiny --prompt='def read('
uv run -m experiments.generate --workdir=runs/tiny --prompt='def read(' --speculative=2
uv run -m experiments.generate --hf=DeepSeek-V3 --chat --prompt='Why is the sky blue?'
"""

import itertools
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from dsv3_jax.config import ConfigError
from experiments import cli, sources

if TYPE_CHECKING:
    from dsv3_jax.training.run import Run

SOURCE = sources.define_flags()
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most tokens to generate; an end-of-document token ends earlier.", lower_bound=1)
TEMPERATURE = cli.define_float("temperature", 0.7, "0 takes the most likely token each time.", lower_bound=0.0)
TOP_P = cli.define_float(
    "top_p", 0.9, "Draw from the most likely tokens that hold this share of probability.", lower_bound=0.0, upper_bound=1.0
)
SEED = cli.define_seed("The same seed gives the same text.")
CHAT = flags.DEFINE_bool("chat", False, "Take the prompt as a user's message, in the chat template beside the tokenizer.")
SPECULATIVE = sources.define_speculative()


def main() -> int:
    from dsv3_jax.inference.chat import encode_chat
    from dsv3_jax.inference.text import TextStream

    _check_prompt(PROMPT.value)
    run = SOURCE.open()
    tokenizer = run.tokenizer
    if CHAT.value:
        prompt = encode_chat(run.folder, tokenizer, [{"role": "user", "content": PROMPT.value}])
    else:
        prompt = tokenizer.encode(PROMPT.value).ids
    room = run.config.model.max_position_embeddings - len(prompt)
    if not prompt or room < 1:
        limit = run.config.model.max_position_embeddings
        raise ConfigError("--prompt", PROMPT.value[:40], f"is {len(prompt)} tokens long; give 1 to {limit - 1}")
    drafts = {"proposed": 0, "accepted": 0}
    steps = new_tokens(run, prompt, min(MAX_TOKENS.value, room), drafts)
    print("" if CHAT.value else PROMPT.value, end="", flush=True)
    started, count, text = time.perf_counter(), 0, TextStream(tokenizer)
    for token in itertools.takewhile(lambda token: token not in run.eos_ids, steps):
        count += 1
        print(text.push(token), end="", flush=True)
    print(text.flush(), end="")
    seconds = time.perf_counter() - started
    print(f"\n\n{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s, compilation included", file=sys.stderr)
    if drafts["proposed"]:
        share = drafts["accepted"] / drafts["proposed"]
        print(f"{drafts['accepted']} of {drafts['proposed']} drafts accepted ({share:.1%})", file=sys.stderr)
    return 0


def _check_prompt(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python keeps bytes of an argument that are not UTF-8 as lone surrogates
        start = max(0, error.start - 20)
        raise ConfigError("--prompt", prompt[start : start + 40], "is not valid UTF-8; give it in that encoding") from error


def new_tokens(run: "Run", prompt: list[int], count: int, drafts: dict[str, int]) -> Iterator[int]:
    """The tokens after a prompt, one by one; adds proposed and accepted drafts to `drafts` where tokens are drafted."""
    import jax

    from dsv3_jax.inference.decode import at_rest, generate
    from dsv3_jax.inference.speculative import generate_speculatively

    settings: dict[str, Any] = dict(max_new_tokens=count, temperature=TEMPERATURE.value, top_p=TOP_P.value, key=jax.random.key(SEED.value))
    model = (at_rest(run.params, run.execution), run.router_bias, [prompt], run.config.model, run.execution)
    if not SPECULATIVE.value:
        yield from (int(token[0]) for token in generate(*model, **settings))
        return
    sources.check_drafts(SPECULATIVE.value, run.config.model)
    for done in generate_speculatively(*model, drafts=SPECULATIVE.value, **settings):
        drafts["proposed"] += done.proposed
        drafts["accepted"] += done.accepted
        yield from done.tokens[0]


if __name__ == "__main__":
    cli.run(main)
