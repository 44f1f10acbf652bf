"""Times `generate` of transformers' DeepseekV3ForCausalLM, the peer that ours is compared with.

Runs in an environment of its own, with torch and transformers and without this project; experiments.bench.decode starts it:

    python -m experiments.bench.decode_transformers --config_json=tiny.json --cases='[[1, 64]]'

Random weights and prompts, greedy, float32, with the cache that transformers uses by default. A stopping criterion that
never stops notes when each token is there.
Attention is sdpa; every implementation of the experts is tried on the first case, and the one that decodes fastest is used.

The last line is JSON: for each case the median seconds to the first token, and between tokens.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, StoppingCriteriaList

from experiments.bench.train_step_transformers import EXPERTS, Setting, peer_config


def token_seconds(model: DeepseekV3ForCausalLM, prompts: torch.Tensor, count: int) -> list[float]:
    """Seconds from the start of a generation to each of its `count` tokens."""
    seconds: list[float] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        seconds.append(time.perf_counter() - started)
        return torch.zeros(len(input_ids), dtype=torch.bool)

    started = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=count,
            stopping_criteria=StoppingCriteriaList([note]),
        )
    return seconds


def measure(model: DeepseekV3ForCausalLM, case: list[int], count: int, repeats: int) -> tuple[float, float]:
    """Median seconds to the first token and between tokens, after one generation to warm up; a case is [batch, context]."""
    prompts = torch.randint(model.config.vocab_size, tuple(case))
    runs = [token_seconds(model, prompts, count) for _ in range(repeats + 1)][1:]
    between = [statistics.median(later - earlier for earlier, later in itertools.pairwise(run)) for run in runs]
    return statistics.median(run[0] for run in runs), statistics.median(between)


def build(config: DeepseekV3Config) -> DeepseekV3ForCausalLM:
    """A model with random weights that generates with a cache and never stops early."""
    torch.manual_seed(0)
    config.use_cache, config.eos_token_id, config.pad_token_id = True, None, 0
    return DeepseekV3ForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_json", type=Path, required=True, help="configuration as JSON")
    parser.add_argument("--cases", type=json.loads, required=True, help="JSON list of [batch, context]")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3, help="timed generations of each case")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    section = json.loads(args.config_json.read_text())["model"]
    torch.set_num_threads(args.threads)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32, {args.threads} threads")
    models = [build(peer_config(section, Setting("sdpa", experts))) for experts in EXPERTS]
    between = [measure(model, args.cases[0], args.new_tokens, 1)[1] for model in models]
    fastest = between.index(min(between))
    print(f"experts {EXPERTS[fastest]}")
    print(json.dumps([measure(models[fastest], case, args.new_tokens, args.repeats) for case in args.cases]))


if __name__ == "__main__":
    main()
