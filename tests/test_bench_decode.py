import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.inference.decode import at_rest
from dsv3_jax.model.transformer import Execution
from dsv3_jax.precision.policy import Recipe
from dsv3_jax.training.accounting import count_parameters
from experiments.bench.decode_report import equal_share, generation_seconds, step_bytes
from tests.small import MODEL, parameters
from tests.test_cli import TINY, assert_refused, run

# Stands for a Python with torch: says its first token as ours would not, and answers only where the weights are those of a public folder.
PEER = """#!{python}
import json, pathlib, sys
folder = pathlib.Path(next(a for a in sys.argv if a.startswith("--model=")).removeprefix("--model="))
assert json.loads((folder / "config.json").read_text())["model_type"] == "deepseek_v3" and list(folder.glob("*.safetensors"))
print("a peer", flush=True)
for line in sys.stdin:
    count = json.loads(line)["new_tokens"]
    print(json.dumps(dict(first=0.5, between=0.25, tokens=[[-1] * count for _ in json.loads(line)["prompts"]], experts="none")), flush=True)
"""


def test_rates_follow_from_the_times_and_a_peer_gets_the_same_weights_and_prompts(tmp_path: Path):
    sizes = ("--batch=2", "--context=16", "--new_tokens=3", "--repeats=1")
    peer = tmp_path / "peer"
    peer.write_text(PEER.format(python=sys.executable))
    peer.chmod(0o755)
    done = run("bench.decode", "--config=tests/micro_config.py", *sizes, f"--json={tmp_path}/speed.json", f"--peer_python={peer}")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "speed.json").read_text())
    (case,), (theirs,) = figures["ours"], figures["transformers"]
    assert case["prefill_tokens_per_second"] == pytest.approx(2 * 16 / case["first_token_seconds"])
    assert case["decode_tokens_per_second"] == pytest.approx(2 / case["between_tokens_seconds"])
    assert theirs["decode_tokens_per_second"] == 2 / 0.25 and np.shape(theirs["tokens"]) == np.shape(case["tokens"]) == (2, 3)
    assert generation_seconds(theirs) == 0.5 + 2 * 0.25 and f"{1 / generation_seconds(case):.2f}x" in done.stdout.splitlines()[-1]
    assert case["of_memory_limit"] > 0 and " 0.0%" in done.stdout.splitlines()[-1]  # no token is the same


def test_a_step_in_fp8_reads_a_byte_less_for_each_weight_that_is_quantized_at_rest():
    params = {name: part for name, part in parameters(MODEL)[0].items() if name != "mtp"}
    resting = jax.tree.leaves(at_rest(params, Execution("bfloat16", recipe=Recipe(fp8=True))))
    quantized = sum(leaf.size for leaf in resting if leaf.dtype.itemsize == 1)
    wide, narrow = (step_bytes(MODEL, 10**6, 0, "bfloat16", fp8) for fp8 in (False, True))
    assert wide - narrow == quantized > 0


def test_tokens_count_as_equal_up_to_the_first_difference():
    assert equal_share([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == 6 / 8


def test_a_step_reads_the_experts_that_a_batch_picks():
    whole = step_bytes(MODEL, 10**6, 0, "float32") / 4
    assert whole == count_parameters(MODEL).total - MODEL.vocab_size * MODEL.hidden_size
    assert step_bytes(MODEL, 1, 0, "bfloat16") / 2 == count_parameters(MODEL).activated - MODEL.vocab_size * MODEL.hidden_size
    assert step_bytes(MODEL, 1, 7, "bfloat16") - step_bytes(MODEL, 1, 0, "bfloat16") == 7 * 2 * 3 * (8 + 4)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [(["--batch=1,a"], ["--batch = '1,a'", "whole numbers"]), (["--context=500"], ["--context", "532 tokens", "takes 512"])],
)
def test_cases_that_cannot_run(arguments: list[str], parts: list[str]):
    assert_refused(run("bench.decode", TINY, *arguments), *parts)
