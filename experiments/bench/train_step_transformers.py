"""Times a training step of transformers' DeepseekV3ForCausalLM, the peer that ours is compared with.

Runs in an environment of its own, with torch and transformers and without this project; experiments.bench.train_step starts it:

    python -m experiments.bench.train_step_transformers < tiny.json

The first line that it prints says what it is. A line that it reads is a whole configuration, `json.dumps(dsv3_jax.config.to_dict(config))`;
the batch is `train.micro_batch_size` rows of `train.sequence_length` random tokens. A step is forward, backward,
clipping to norm 1, and AdamW (torch's fused one), in float32. Every attention and expert implementation
that transformers offers here is tried. A table on standard error has the loss after the last step, on which they must agree.

transformers trains the main model alone. For equal work, the fastest setting is timed again with MTP
modules: transformers' own, made for drafting, put into the loss here. torch.compile is tried too, which
needs a C++ compiler and a minute or two; `--no-compile` leaves it out.

The answer is a line of JSON: `fastest` lists the fastest setting as it comes, the fastest compiled, and the faster of the
two with MTP modules, each with `tokens_per_second`, `implementation` and `mtp`.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

ATTENTION = ("sdpa", "eager")
EXPERTS = ("eager", "batched_mm", "grouped_mm")


class Setting(NamedTuple):
    """One way to run the peer."""

    attention: str
    experts: str
    compiled: bool = False
    mtp: bool = False

    def __str__(self) -> str:
        extras = "".join(f", {name}" for name, on in (("torch.compile", self.compiled), ("MTP", self.mtp)) if on)
        return f"attention {self.attention}, experts {self.experts}{extras}"


class Measurement(NamedTuple):
    """Median seconds of a step, and the loss of the last one in nats a token."""

    seconds: float
    loss: float


def peer_config(model: dict[str, Any], setting: Setting) -> DeepseekV3Config:
    """The model section of a configuration as transformers takes it."""
    if model["scoring_func"] != "sigmoid":
        raise SystemExit(f"model.scoring_func = {model['scoring_func']!r}: transformers has only sigmoid")
    if model["num_experts_per_tok"] // model["topk_group"] != 2 and model["n_group"] > model["topk_group"]:
        note("note: transformers scores a group by its best 2 experts, this model by its best num_experts_per_tok // topk_group")
    fields = {name: value for name, value in model.items() if name not in ("rope_scaling", "scoring_func", "aux_loss_alpha")}
    scaling = model["rope_scaling"]
    if scaling["type"] == "yarn":
        fields["rope_scaling"] = scaling
    elif scaling["type"] == "linear":
        fields["rope_scaling"] = {"type": "linear", "factor": scaling["factor"]}
    implementations = {"attn_implementation": setting.attention, "experts_implementation": setting.experts}
    return DeepseekV3Config(**fields, num_key_value_heads=model["num_attention_heads"], use_cache=False, **implementations)


def loss_function(model: DeepseekV3ForCausalLM, mtp: MtpModel | None, mtp_weight: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mean cross-entropy of the next token over rows of T+1 tokens, plus that of the MTP modules (V3 eq. 21-25)."""

    def head_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())

    def loss(rows: torch.Tensor) -> torch.Tensor:
        hidden = model.model(rows[:, :-1]).last_hidden_state
        total = head_loss(hidden, rows[:, 1:])
        if mtp is None:
            return total
        for k in range(mtp.num_mtp_layers):
            hidden = hidden[:, : rows.shape[1] - 2 - k]  # the positions with a token to predict at this depth
            ahead, targets = rows[:, k + 1 : -1], rows[:, k + 2 :]
            hidden = mtp.forward_layer(k, hidden, torch.arange(hidden.shape[1])[None], None, input_ids=ahead)
            total = total + mtp_weight / mtp.num_mtp_layers * head_loss(hidden, targets)
        return total

    return loss


def measure(config: dict[str, Any], setting: Setting, warmup: int, steps: int) -> Measurement:
    """Builds the model and times its steps, the first `warmup` apart."""
    torch.manual_seed(0)
    train, optim = config["train"], config["optimizer"]
    model = DeepseekV3ForCausalLM(peer_config(config["model"], setting)).train()
    mtp = MtpModel(model, config["model"]["num_nextn_predict_layers"]).train() if setting.mtp else None
    if mtp is not None:
        mtp.layers.apply(model._init_weights)  # on its own MtpModel leaves routers and experts without values: it is made to load them
    parameters = list(model.parameters()) + (list(mtp.layers.parameters()) if mtp is not None else [])
    optimizer = torch.optim.AdamW(
        parameters, lr=optim["peak_lr"], betas=(optim["beta1"], optim["beta2"]), eps=optim["eps"],
        weight_decay=optim["weight_decay"], fused=True,
    )  # fmt: skip
    rows = torch.randint(model.config.vocab_size, (train["micro_batch_size"], train["sequence_length"] + 1))
    compute_loss = loss_function(model, mtp, train["mtp_loss_weight"])
    if setting.compiled:
        compute_loss = torch.compile(compute_loss)
    seconds = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = compute_loss(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim["clip_norm"])
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return Measurement(statistics.median(seconds[warmup:]), loss.item())


def note(text: str) -> None:
    """Says something on standard error; standard output is for answers."""
    print(text, file=sys.stderr, flush=True)


def report(config: dict[str, Any], settings: list[Setting], warmup: int, steps: int) -> tuple[float, Setting]:
    """Measures and prints every setting; returns the fastest with its tokens a second."""
    tokens = config["train"]["micro_batch_size"] * config["train"]["sequence_length"]
    results = []
    for setting in settings:
        measured = measure(config, setting, warmup, steps)
        rate = tokens / measured.seconds
        results.append((rate, setting))
        note(f"{setting!s:58} {measured.seconds * 1e3:8.0f} ms {rate:8.0f} tokens/s   loss {measured.loss:.5f}")
    return max(results, key=lambda result: result[0])


def answer(config: dict[str, Any], warmup: int, steps: int, compile: bool) -> list[tuple[float, Setting]]:
    """The fastest settings, each with its tokens a second."""
    if missing := {"model", "train", "optimizer"} - set(config):
        raise SystemExit(f"the configuration has no sections {', '.join(sorted(missing))}; write dsv3_jax.config.to_dict(config)")
    settings = [Setting(attention, experts) for attention, experts in itertools.product(ATTENTION, EXPERTS)]
    fastest = [report(config, settings, warmup, steps)]
    if compile:
        compiled = [Setting("sdpa", experts, compiled=True) for experts in ("eager", "grouped_mm")]
        fastest.append(report(config, compiled, warmup, steps))
    if config["model"]["num_nextn_predict_layers"]:
        with_mtp = max(fastest)[1]._replace(mtp=True)
        fastest.append(report(config, [with_mtp], warmup, steps))
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="timed steps, of which the median counts")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="try torch.compile as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, float32, {args.threads} threads", flush=True)
    for line in sys.stdin:
        fastest = answer(json.loads(line), args.warmup, args.steps, args.compile)
        figures = [{"tokens_per_second": rate, "implementation": str(setting), "mtp": setting.mtp} for rate, setting in fastest]
        print(json.dumps({"fastest": figures}), flush=True)


if __name__ == "__main__":
    main()
