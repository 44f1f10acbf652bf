"""Times `generate` of transformers' DeepseekV3ForCausalLM, the peer that ours is compared with.

Runs in an environment of its own, with torch and transformers and without this project; experiments.bench.decode starts it:

    python -m experiments.bench.decode_transformers --model=FOLDER --dtype=float32

FOLDER is a public checkpoint. The first line that it prints says what it is. Then for every line of JSON that it reads,
`{"prompts": [[...]], "new_tokens": 32, "repeats": 3}`, it prints one: median seconds to the first token and between tokens, the tokens, and
the implementation of the experts. Greedy, on a GPU where torch has one, attention sdpa, with the cache that transformers uses by default. A
stopping criterion that never stops notes when each token is there. Every implementation of the experts is tried in every case, and the
faster one counts, for the first token and between tokens apart; one that has no memory for the prompts is tried between tokens only.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers
from transformers import DeepseekV3ForCausalLM, StoppingCriteriaList

from experiments.bench.train_step_transformers import EXPERTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ONE_BY_ONE = "eager"  # of EXPERTS, the one that needs the least memory
HOPELESS = 2.0  # an implementation this many times slower than another when both are warmed up is not timed


def token_seconds(
    model: DeepseekV3ForCausalLM, prompts: torch.Tensor, count: int, prefill: str, decode: str
) -> tuple[list[float], list[list[int]]]:
    """Seconds from the start of a generation to each of its `count` tokens, and the tokens, with two implementations of the experts."""
    seconds: list[float] = []
    model.set_experts_implementation(prefill)

    def note(input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        input_ids[:, -1].tolist()  # waits for it
        seconds.append(time.perf_counter() - started)
        if len(seconds) == 1:
            model.set_experts_implementation(decode)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=count,
            stopping_criteria=StoppingCriteriaList([note]),
        )
    return seconds, out[:, prompts.shape[1] :].tolist()


def medians(runs: list[list[float]]) -> tuple[float, float]:
    """Seconds to the first token and between tokens."""
    between = [statistics.median(later - earlier for earlier, later in itertools.pairwise(run)) for run in runs]
    return statistics.median(run[0] for run in runs), statistics.median(between)


def measure(model: DeepseekV3ForCausalLM, prompts: torch.Tensor, count: int, repeats: int) -> dict[str, Any]:
    """The answer to a question."""
    best: dict[str, tuple[float, str]] = {"first": (float("inf"), ""), "between": (float("inf"), "")}
    tokens: list[list[int]] = []
    for experts in EXPERTS:
        prefill = experts
        try:
            warm, said = token_seconds(model, prompts, count, prefill, experts)
        except torch.OutOfMemoryError:  # batched_mm copies the weights of every token's experts; one token a sequence may fit
            torch.cuda.empty_cache()
            prefill = ONE_BY_ONE
            warm, said = token_seconds(model, prompts, count, prefill, experts)
        if all(time > HOPELESS * best[name][0] for name, time in zip(best, medians([warm]), strict=True)):
            continue
        first, between = medians([token_seconds(model, prompts, count, prefill, experts)[0] for _ in range(repeats)])
        best = {"first": min(best["first"], (first, prefill)), "between": min(best["between"], (between, experts))}
        tokens = tokens or said
    implementations = ", then ".join(dict.fromkeys(experts for _, experts in best.values()))
    return {"first": best["first"][0], "between": best["between"][0], "tokens": tokens, "experts": implementations}


def load(folder: str, dtype: str) -> DeepseekV3ForCausalLM:
    """The model, which generates with a cache and never stops early."""
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(DEVICE).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with config.json and safetensors files")
    parser.add_argument("--dtype", default="float32", help="of weights and activations")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()  # MTP layers, which it does not load, are in the folder
    transformers.logging.disable_progress_bar()
    model = load(args.model, args.dtype)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {DEVICE}, {args.dtype}, {args.threads} threads", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        prompts = torch.tensor(question["prompts"], device=DEVICE)
        print(json.dumps(measure(model, prompts, question["new_tokens"], question["repeats"])), flush=True)


if __name__ == "__main__":
    main()
