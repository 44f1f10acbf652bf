"""Continues a prompt with a trained model, over the latent cache.

uv run -m experiments.generate --workdir=runs/tiny --prompt='def read('
"""

import sys
import time
from pathlib import Path

from absl import flags

from dsv3_jax.config import ConfigError
from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of experiments.pretrain.", required=True)
PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.", required=True)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most tokens to generate; an end-of-document token ends earlier.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "0 takes the most likely token each time.", lower_bound=0.0)
TOP_P = flags.DEFINE_float(
    "top_p", 0.9, "Draw from the most likely tokens that hold this share of probability.", lower_bound=0.0, upper_bound=1.0
)
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.", lower_bound=0)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")


def main() -> int:
    import jax

    from dsv3_jax.inference.decode import generate
    from dsv3_jax.training.run import load_run

    run = load_run(Path(WORKDIR.value), EMA.value)
    prompt = run.tokenizer.encode(PROMPT.value).ids
    room = run.config.model.max_position_embeddings - len(prompt)
    if not prompt or room < 1:
        limit = run.config.model.max_position_embeddings
        raise ConfigError("--prompt", PROMPT.value[:40], f"is {len(prompt)} tokens long; give 1 to {limit - 1}")
    steps = generate(
        run.params, run.router_bias, [prompt], run.config.model, run.execution,
        max_new_tokens=min(MAX_TOKENS.value, room), temperature=TEMPERATURE.value, top_p=TOP_P.value, key=jax.random.key(SEED.value),
    )  # fmt: skip
    print(PROMPT.value, end="", flush=True)
    started, ids, shown = time.perf_counter(), [], ""
    for token in steps:
        if token[0] == run.vocabulary.eos_id:
            break
        ids.append(int(token[0]))
        text = run.tokenizer.decode(ids, skip_special_tokens=False)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    seconds = time.perf_counter() - started
    print(f"\n\n{len(ids)} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
