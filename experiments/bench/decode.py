"""Speed of generation over the latent cache: prefill and decode tokens/s, time to first token, time between tokens.

    uv run -m experiments.bench.decode --config=configs/tiny.py
    uv run -m experiments.bench.decode --config=configs/tiny.py --batch=1,8 --context=128,384 --peer_python=PYTHON_WITH_TORCH

Random weights and random prompts of equal length, greedy. Each token is fetched before the next is computed, as in serving. The
time to the first token is the prefill with the choice of the token; compilation is apart. With --peer_python, a Python that has torch and
transformers, `generate` of transformers' model of the same configuration is timed on the same machine after it.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.config import ConfigError
from experiments import cli
from experiments.output import check_output, table

CONFIG = cli.define_config()
BATCH = flags.DEFINE_list("batch", ["1", "8"], "Batch sizes, with commas between them.")
CONTEXT = flags.DEFINE_list("context", ["64", "256"], "Lengths of the prompts, with commas between them.")
NEW = flags.DEFINE_integer("new_tokens", 32, "Tokens to generate.", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed generations of each case after one to warm up; medians count.", lower_bound=1)
PEER = flags.DEFINE_string("peer_python", None, "A Python interpreter with torch and transformers to compare with.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file.")

ROOT = Path(__file__).parents[2]  # the peer's script runs as a module: by its path, the files beside it would hide packages of their names


def main() -> int:
    from dsv3_jax.training.metrics import write_json

    config = cli.read_config(CONFIG)
    cases = [(batch, context) for batch in _numbers(BATCH) for context in _numbers(CONTEXT)]
    longest, limit = max(context for _, context in cases) + NEW.value, config.model.max_position_embeddings
    if longest > limit:
        raise ConfigError("--context", CONTEXT.value, f"with --new_tokens the longest has {longest} tokens; the model takes {limit}")
    if JSON.value:
        check_output("--json", JSON.value)
    figures = {"ours": measure(config, cases)}
    if PEER.value:
        figures["transformers"] = peer(config, cases)
    print(_table(figures))
    if JSON.value:
        write_json(Path(JSON.value), figures)
    return 0


def measure(config: Any, cases: list[tuple[int, int]]) -> list[dict[str, float]]:
    """Seconds of every case, batch and context in the order of `cases`."""
    import jax

    from dsv3_jax.model.init import init_params, init_router_bias
    from dsv3_jax.model.transformer import Execution

    params = jax.jit(lambda key: init_params(config.model, key))(jax.random.key(0))
    model = (params, init_router_bias(config.model), config.model, Execution.of(config, 0))
    return [_measure_case(model, *case) for case in cases]


def _measure_case(model: tuple, batch: int, context: int) -> dict[str, float]:
    import jax
    import numpy as np

    from dsv3_jax.inference.decode import generate

    params, bias, config, execution = model
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch, context)).tolist()
    first, between = [], []
    for _ in range(REPEATS.value + 1):
        started, seconds = time.perf_counter(), []
        steps = generate(params, bias, prompts, config, execution,
                         max_new_tokens=NEW.value, temperature=0.0, top_p=1.0, key=jax.random.key(0))  # fmt: skip
        for _ in steps:
            seconds.append(time.perf_counter() - started)
        first.append(seconds[0])
        between.append(float(np.median(np.diff(seconds))))
    return _figures(batch, context, float(np.median(first[1:])), float(np.median(between[1:])))


def _figures(batch: int, context: int, first: float, between: float) -> dict[str, float]:
    rates = {"prefill_tokens_per_second": batch * context / first, "decode_tokens_per_second": batch / between}
    return {"batch": batch, "context": context, "first_token_seconds": first, "between_tokens_seconds": between, **rates}


def peer(config: Any, cases: list[tuple[int, int]]) -> list[dict[str, float]]:
    """The same figures of transformers, from the script beside this one."""
    from dsv3_jax.config import to_dict

    script = "experiments.bench.decode_transformers"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(to_dict(config)))
        sizes = [f"--new_tokens={NEW.value}", f"--repeats={REPEATS.value}", f"--cases={json.dumps(cases)}"]
        done = subprocess.run(
            [PEER.value, "-m", script, f"--config_json={path}", *sizes], capture_output=True, text=True, check=False, cwd=ROOT
        )
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stderr[-2000:]}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    return [_figures(*case, *pair) for case, pair in zip(cases, seconds, strict=True)]


def _table(figures: dict[str, list[dict[str, float]]]) -> str:
    rows = [("", "batch", "context", "first token", "between tokens", "prefill", "decode")]
    for name, cases in figures.items():
        for f in cases:
            times = (f"{f['first_token_seconds'] * 1e3:,.1f} ms", f"{f['between_tokens_seconds'] * 1e3:,.2f} ms")
            rates = (f"{f['prefill_tokens_per_second']:,.0f} tokens/s", f"{f['decode_tokens_per_second']:,.0f} tokens/s")
            rows.append((name, f"{f['batch']}", f"{f['context']}", *times, *rates))
    return table(rows, "<>>>>>>")


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
