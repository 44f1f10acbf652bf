"""Continues a prompt with a trained model, over the latent cache.

uv run -m experiments.generate --workdir=runs/tiny --prompt='def read('
uv run -m experiments.generate --hf=DeepSeek-V3 --chat --prompt='Why is the sky blue?'
"""

import sys
import time

from absl import flags

from dsv3_jax.config import ConfigError
from experiments import cli, sources

SOURCE = sources.define_flags()
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most tokens to generate; an end-of-document token ends earlier.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the most likely token each time.", lower_bound=0.0)
TOP_P = flags.DEFINE_float(
    "top_p", 0.9, "Draw from the most likely tokens that hold this share of probability.", lower_bound=0.0, upper_bound=1.0
)
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", lower_bound=0)
CHAT = flags.DEFINE_bool("chat", False, "Take the prompt as a user's message, in the chat template beside the tokenizer.")


def main() -> int:
    import jax

    from dsv3_jax.inference.chat import render_chat
    from dsv3_jax.inference.decode import generate

    run = SOURCE.open()
    tokenizer = run.tokenizer
    if CHAT.value:
        # The template spells out the control tokens, the first one included.
        text = render_chat(run.folder, [{"role": "user", "content": PROMPT.value}])
        prompt = tokenizer.encode(text, add_special_tokens=False).ids
    else:
        prompt = tokenizer.encode(PROMPT.value).ids
    room = run.config.model.max_position_embeddings - len(prompt)
    if not prompt or room < 1:
        limit = run.config.model.max_position_embeddings
        raise ConfigError("--prompt", PROMPT.value[:40], f"is {len(prompt)} tokens long; give 1 to {limit - 1}")
    steps = generate(
        run.params, run.router_bias, [prompt], run.config.model, run.execution,
        max_new_tokens=min(MAX_TOKENS.value, room), temperature=TEMPERATURE.value, top_p=TOP_P.value, key=jax.random.key(SEED.value),
    )  # fmt: skip
    print("" if CHAT.value else PROMPT.value, end="", flush=True)
    started, ids, shown = time.perf_counter(), [], ""
    for token in steps:
        if token[0] in run.eos_ids:
            break
        ids.append(int(token[0]))
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    seconds = time.perf_counter() - started
    print(f"\n\n{len(ids)} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
