"""Serves a trained model over HTTP, with the completions and chat endpoints of OpenAI's API.

uv run -m experiments.serve --workdir=runs/tiny
uv run -m experiments.serve --hf=DeepSeek-V3 --port=8001 --rows=16 --context=8192 --speculative=1

For research on one machine: there is no authentication, so it listens on 127.0.0.1 unless told otherwise.
"""

import asyncio

from absl import flags

from dsv3_jax.config import ConfigError
from experiments import cli, sources

SOURCE = sources.define_flags()
NAME = flags.DEFINE_string("model_name", None, "The model's name in requests; without it the name of its folder.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one, which is printed.", lower_bound=0, upper_bound=65535)
ROWS = flags.DEFINE_integer("rows", 8, "Sequences decoded together.", lower_bound=1)
CONTEXT = flags.DEFINE_integer(
    "context", None, "Most tokens of a prompt and its answer together; the cache has room for --rows of them. "
    "Without it what the model takes, 4096 at most.", lower_bound=3,
)  # fmt: skip
FP8_CACHE = flags.DEFINE_bool("fp8_cache", False, "Keep c_kv in E4M3: little more than half the cache of bfloat16.")
SPECULATIVE = sources.define_speculative()
MAX_QUEUE = flags.DEFINE_integer("max_queue", 64, "Requests that may wait for a row; one more gets status 429.", lower_bound=0)
TIMEOUT = cli.define_float(
    "timeout", 600.0, "Seconds of a request, waiting included; a client that leaves an answer unread for so long is dropped.",
    lower_bound=0.001,
)  # fmt: skip
MAX_BODY = flags.DEFINE_integer("max_body", 2**20, "Most bytes of a request's body.", lower_bound=1)
GRACE = cli.define_float("grace", 30.0, "Seconds that running requests get to end after SIGTERM or Ctrl-C.", lower_bound=0.0)


def main() -> int:
    try:
        from experiments.serving import lifetime
    except ModuleNotFoundError as error:
        raise ConfigError("experiments.serve", error.name, "is not installed; use uv run --extra serve") from error
    from dsv3_jax.training.stopping import stop_signal

    settings = lifetime.Settings(
        name=NAME.value, rows=ROWS.value, context=CONTEXT.value, fp8_cache=FP8_CACHE.value,
        drafts=SPECULATIVE.value, max_queue=MAX_QUEUE.value, timeout=TIMEOUT.value, max_body=MAX_BODY.value, grace=GRACE.value,
    )  # fmt: skip
    bound = lifetime.bind(HOST.value, PORT.value)  # before the model is read, which may take minutes
    run = SOURCE.open()
    with stop_signal() as stop:
        asyncio.run(lifetime.serve(run, settings, bound, stop))
    return 0


if __name__ == "__main__":
    cli.run(main)
