"""Speed of generation over the latent cache: prefill and decode tokens/s, time to first token, time between tokens.

    uv run -m experiments.bench.decode --config=configs/tiny.py
    uv run -m experiments.bench.decode --config=configs/tiny.py --batch=1,8 --context=128,384 --peer_python=PYTHON_WITH_TORCH

Random weights, at rest as generation has them (in FP8 with --config.precision.policy=fp8), and random prompts of equal length, greedy.
Each token is fetched when it is there, as in serving. The
time to the first token is the prefill with the choice of the token; compilation is apart. The limit of the memory is what a step
cannot avoid to read, the weights that work on the batch and its latents, at the speed of a copy timed in the same run.
With --peer_python, a Python that has torch and transformers, the weights are exported as a public checkpoint, and `generate` of
transformers is timed on them and on the same prompts, case by case after ours; then the table has the ratios, that of a
whole generation too, and the share of tokens on which both agree.
"""

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from dsv3_jax.config import Config, ConfigError, ModelConfig
from experiments import cli
from experiments.bench.decode_report import render, step_bytes
from experiments.bench.peer import Peer
from experiments.output import check_outputs

if TYPE_CHECKING:
    import numpy as np

CONFIG = cli.define_config()
BATCH = flags.DEFINE_list("batch", ["1", "8"], "Batch sizes, with commas between them.")
CONTEXT = flags.DEFINE_list("context", ["64", "256"], "Lengths of the prompts, with commas between them.")
NEW = flags.DEFINE_integer("new_tokens", 32, "Tokens to generate.", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed generations of each case after one to warm up; medians count.", lower_bound=1)
PEER = flags.DEFINE_string("peer_python", None, "A Python interpreter with torch and transformers to compare with.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")


def main() -> int:
    from dsv3_jax.training.metrics import write_json

    config = cli.read_config(CONFIG)
    cases = [(batch, context) for batch in _numbers(BATCH) for context in _numbers(CONTEXT)]
    longest, limit = max(context for _, context in cases) + NEW.value, config.model.max_position_embeddings
    if longest > limit:
        raise ConfigError("--context", CONTEXT.value, f"with --new_tokens the longest has {longest} tokens; the model takes {limit}")
    check_outputs(JSON)
    if PEER.value:  # both sides have their weights on the same device
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    figures = measure(config, cases)
    print(render(figures))
    if JSON.value:
        write_json(Path(JSON.value), figures)
    return 0


def measure(config: Config, cases: list[tuple[int, int]]) -> dict[str, Any]:
    """Figures of every case, batch and context in the order of `cases`, of ours and of the peer where there is one."""
    import jax

    from dsv3_jax.inference.decode import at_rest
    from dsv3_jax.model.init import init_params, init_router_bias
    from dsv3_jax.model.transformer import Execution
    from experiments.bench.timing import copy_rate

    dtype, fp8 = config.train.compute_dtype, config.precision.policy == "fp8"
    execution, bias = Execution.of(config, 0), init_router_bias(config.model)
    masters = jax.jit(init_params, static_argnums=0)(config.model, jax.random.key(0))
    model = (at_rest(masters, execution), bias, config.model, execution)
    figures: dict[str, Any] = {
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()}), jax {jax.__version__}, {dtype}{', FP8' * fp8}",
        "copy_bytes_per_second": copy_rate(),
        "ours": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        peer = start_peer(config.model, masters, bias, Path(folder), dtype) if PEER.value else None
        del masters
        for batch, context in cases:
            prompts = _prompts(config.model, batch, context)
            limit = step_bytes(config.model, batch, context, dtype, fp8) / figures["copy_bytes_per_second"]
            ours = _measure_case(model, prompts)
            figures["ours"].append(ours | {"of_memory_limit": limit / ours["between_tokens_seconds"]})
            if peer:
                answer = peer.ask({"prompts": prompts.tolist(), "new_tokens": NEW.value, "repeats": REPEATS.value})
                theirs = _rates(batch, context, answer["first"], answer["between"]) | answer
                figures.setdefault("transformers", []).append(theirs)
        if peer:
            figures["peer"] = peer.introduction
            peer.leave()
    return figures


def start_peer(config: ModelConfig, masters: Any, bias: Any, folder: Path, dtype: str) -> Peer:
    """transformers with these weights in `dtype`, which travel through a public checkpoint below `folder`."""
    import jax

    from dsv3_jax.interop.export import export
    from dsv3_jax.interop.weights import ArraySource

    params = jax.tree.map(lambda p: p.astype(dtype), masters)
    export(ArraySource(config, params, bias), folder / "weights", "source", {}, folder)
    threads = len(os.sched_getaffinity(0))
    return Peer(
        PEER.value, "experiments.bench.decode_transformers", [f"--model={folder / 'weights'}", f"--dtype={dtype}", f"--threads={threads}"]
    )


def _prompts(config: ModelConfig, batch: int, context: int) -> "np.ndarray":
    import numpy as np

    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, context))


def _measure_case(model: tuple, prompts: "np.ndarray") -> dict[str, Any]:
    import jax
    import numpy as np

    from dsv3_jax.inference.decode import generate

    params, bias, config, execution = model
    first: list[float] = []
    between: list[float] = []
    tokens: list[np.ndarray] = []
    for _ in range(REPEATS.value + 1):
        started, seconds, tokens = time.perf_counter(), [], []
        steps = generate(params, bias, prompts.tolist(), config, execution,
                         max_new_tokens=NEW.value, temperature=0.0, top_p=1.0, key=jax.random.key(0))  # fmt: skip
        for token in steps:
            seconds.append(time.perf_counter() - started)
            tokens.append(token)
        first.append(seconds[0])
        between.append(float(np.median(np.diff(seconds))))
    batch, context = prompts.shape
    rates = _rates(batch, context, float(np.median(first[1:])), float(np.median(between[1:])))
    return rates | {"tokens": np.stack(tokens, 1).tolist()}


def _rates(batch: int, context: int, first: float, between: float) -> dict[str, Any]:
    rates = {"prefill_tokens_per_second": batch * context / first, "decode_tokens_per_second": batch / between}
    return {"batch": batch, "context": context, "first_token_seconds": first, "between_tokens_seconds": between, **rates}


def _numbers(flag: Any) -> list[int]:
    try:
        numbers = [int(text) for text in flag.value]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"--{flag.name}", ",".join(flag.value), "must be whole numbers from 1, with commas between them")
    return numbers


if __name__ == "__main__":
    cli.run(main)
