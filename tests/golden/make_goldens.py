"""Makes the golden files of tests/model/test_parity.py: tiny DeepSeek-V3 models as transformers computes them.

Runs in an environment of its own, with torch and transformers and without this project (README.md beside it):

    python tests/golden/make_goldens.py

A file holds a config.json, every tensor by its public name, token ids, and what torch makes of them in
float32. Weights are rounded to values that bfloat16 can hold, so that the files compress to half.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

BASE: dict[str, Any] = dict(
    model_type="deepseek_v3", vocab_size=43, hidden_size=20, intermediate_size=29, moe_intermediate_size=5,
    num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=11, kv_lora_rank=9,
    qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=7, n_shared_experts=1, n_routed_experts=12, num_experts_per_tok=4,
    n_group=4, topk_group=2, scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, num_nextn_predict_layers=0,
    rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, rope_interleave=True, max_position_embeddings=64,
    hidden_act="silu", attention_bias=False, tie_word_embeddings=False,
)  # fmt: skip
# Widths, theta and lengths for which the ramp of YaRN has pairs on it, so that both betas and their rounding matter.
YARN: dict[str, Any] = dict(
    type="yarn", factor=4.0, original_max_position_embeddings=8, beta_fast=0.9, beta_slow=0.25, mscale=1.0, mscale_all_dim=1.0
)
BEYOND = dict(rope_theta=100.0, qk_rope_head_dim=16, rope_scaling=YARN)
RELEASE_YARN = {**YARN, "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}

# What differs from BASE. transformers scores a group by its best 2 experts whatever K and M are, so K // M = 2 here.
CASES: dict[str, dict[str, Any]] = {
    "compressed_grouped": dict(),
    "uncompressed_ungrouped": dict(q_lora_rank=None, n_group=1, topk_group=1, num_experts_per_tok=3),
    "yarn": dict(rope_scaling=RELEASE_YARN, qk_rope_head_dim=16, max_position_embeddings=163840, rms_norm_eps=1e-2),
    "yarn_unequal_mscales": BEYOND | dict(rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, rope_interleave=False),
    "yarn_no_mscales": BEYOND | dict(rope_scaling={**YARN, "mscale": None, "mscale_all_dim": None}, num_experts_per_tok=2, topk_group=1),
    "linear_rope": dict(rope_scaling=dict(type="linear", factor=4.0), q_lora_rank=None, num_experts_per_tok=5),
    "half_rope_theta": dict(rope_interleave=False, rope_theta=500.0, num_experts_per_tok=6, topk_group=3),
    "unnormalised_gates": dict(norm_topk_prob=False, routed_scaling_factor=1.3, first_k_dense_replace=2),
    "tied_shared_experts": dict(tie_word_embeddings=True, n_shared_experts=3, n_group=3, num_experts_per_tok=4, topk_group=2),
    "gradients": BEYOND,
    "mtp": BEYOND | dict(num_nextn_predict_layers=1, num_hidden_layers=2),
}
MTP_LOSS_WEIGHT = 0.3
TOKENS = {"yarn": (1, 61), "mtp": (2, 15)}  # rows, tokens a row; (2, 17) elsewhere
WITH_GRADIENTS = ("gradients", "mtp")
# Files whose config.json has the layout that transformers 5 writes; the others have the release's.
TRANSFORMERS_LAYOUT = ("uncompressed_ungrouped", "yarn_unequal_mscales", "yarn_no_mscales", "linear_rope", "tied_shared_experts")

Make = Callable[[str, int], dict[str, np.ndarray]]  # the contents of a file from its name and a seed


class NearTieError(RuntimeError):
    """Weights at which some token is about to choose other experts."""


class Mtp(torch.nn.Module):
    """The MTP module of V3 sec. 2.2 in plain torch, with the names of the public checkpoint."""

    def __init__(self, config: DeepseekV3Config):
        super().__init__()
        d = config.hidden_size
        self.enorm, self.hnorm, norm = (DeepseekV3RMSNorm(d, eps=config.rms_norm_eps) for _ in range(3))
        self.shared_head = torch.nn.ModuleDict({"norm": norm})
        self.eh_proj = torch.nn.Linear(2 * d, d, bias=False)
        self.mtp_block = DeepseekV3DecoderLayer(config, config.num_hidden_layers)

    def forward(self, model: DeepseekV3ForCausalLM, ids: torch.Tensor) -> torch.Tensor:
        """Logits of t_{i+2} at the positions i that have a token t_{i+1}."""
        hidden = model.model(ids).last_hidden_state[:, :-1]
        embedding = model.model.embed_tokens(ids[:, 1:])
        x = self.eh_proj(torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1))
        t = x.shape[1]
        rope = model.model.rotary_emb(x, torch.arange(t)[None])
        mask = torch.full((t, t), -torch.inf).triu(1)[None, None]
        block = self.mtp_block(x, attention_mask=mask, position_embeddings=rope)
        return model.lm_head(self.shared_head["norm"](block))


def public_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits transformers' fused experts into the tensors of the public checkpoint."""
    public = {}
    for name, value in state.items():
        stem, _, kind = name.partition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            public[name] = value
            continue
        for expert, weight in enumerate(value):
            parts = zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True) if kind == "gate_up_proj" else [(kind, weight)]
            public |= {f"{stem}.experts.{expert}.{part}.weight": w for part, w in parts}
    return public


def mtp_names(state: dict[str, torch.Tensor], config: DeepseekV3Config) -> dict[str, torch.Tensor]:
    """The names of the MTP module's tensors in the public checkpoint: a layer after the last."""
    return {f"model.layers.{config.num_hidden_layers}.{name.removeprefix('mtp_block.')}": value for name, value in state.items()}


def draw(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Random values at which every part matters: norms around 1, biases from -3 to 0, affinities far from 0 and 1."""
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.3 * noise
        elif name.endswith("e_score_correction_bias"):
            noise = -3 * torch.rand(value.shape, generator=generator) ** 2
        elif "embed_tokens" not in name:
            noise = noise * 1.5 / value.shape[-1] ** 0.5
        value.copy_(noise.bfloat16().float())


def tensors_of(model: torch.nn.Module, mtp: Mtp | None) -> dict[str, torch.Tensor]:
    """Every tensor by its public name; a tied head is not stored."""
    tied = model.config.tie_word_embeddings
    state = {name: value for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    return public_names(state | (mtp_names(mtp.state_dict(), model.config) if mtp else {}))


def gradients_of(model: torch.nn.Module, mtp: Mtp | None) -> dict[str, torch.Tensor]:
    """Gradient of every parameter by its public name."""
    state = {name: value.grad for name, value in model.named_parameters()}
    return public_names(state | (mtp_names({n: p.grad for n, p in mtp.named_parameters()}, model.config) if mtp else {}))


def loss_of(model: DeepseekV3ForCausalLM, mtp: Mtp | None, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, plus the weighted one of the token after it where there is an MTP module."""
    loss = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    if mtp is None:
        return loss
    return loss + MTP_LOSS_WEIGHT * cross_entropy(mtp(model, ids)[:, :-1].flatten(0, 1), ids[:, 2:].flatten())


@torch.no_grad()
def check_against_transformers_mtp(mtp: Mtp, model: DeepseekV3ForCausalLM, ids: torch.Tensor) -> None:
    """transformers has an MTP model too, for drafting: the two must agree."""
    theirs = MtpModel(model, 1).eval()
    theirs.layers[0].load_state_dict({name.replace("shared_head.norm", "post_norm"): value for name, value in mtp.state_dict().items()})
    positions = torch.arange(1, ids.shape[1])[None]
    hidden = theirs.forward_layer(0, model.model(ids).last_hidden_state[:, :-1], positions, None, input_ids=ids[:, 1:])
    torch.testing.assert_close(model.lm_head(hidden), mtp(model, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_far_from_ties(model: DeepseekV3ForCausalLM, mtp: Mtp | None, ids: torch.Tensor, result: dict[str, torch.Tensor]) -> None:
    """A slight change of the weights must change the outputs slightly: no token may sit where its choice of experts flips."""
    modules = [m for m in (model, mtp) if m is not None]
    saved = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    for seed in range(8):
        noise = torch.Generator().manual_seed(seed)
        for module, state in zip(modules, saved, strict=True):
            for name, value in module.state_dict().items():
                value.copy_(state[name] * (1 + 2e-5 * torch.randn(value.shape, generator=noise)))
        for name, value in outputs_of(model, mtp, ids).items():
            change = (value - result[name]).abs().max() / result[name].abs().max()
            if change > 5e-3:
                raise NearTieError(f"{name} moves by {change:.1e}")
    for module, state in zip(modules, saved, strict=True):
        module.load_state_dict(state)


@torch.no_grad()
def outputs_of(model: DeepseekV3ForCausalLM, mtp: Mtp | None, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of the main model, and of the MTP module where there is one."""
    return {"logits": model(ids).logits} | ({"mtp_logits": mtp(model, ids)} if mtp else {})


def random_model(fields: dict[str, Any], generator: torch.Generator) -> tuple[DeepseekV3ForCausalLM, Mtp | None]:
    """A model with random weights, and its MTP module where the fields ask for one."""
    config = DeepseekV3Config(**fields, attn_implementation="eager", experts_implementation="eager")
    model = DeepseekV3ForCausalLM(config).eval()
    mtp = Mtp(config).eval() if config.num_nextn_predict_layers else None
    with torch.no_grad():
        for module in (model, mtp):
            if module is not None:
                draw(module, generator)
    return model, mtp


def checked_outputs(model: DeepseekV3ForCausalLM, mtp: Mtp | None, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs, if they are fit to be held against: raises NearTieError where rounding could change them much."""
    result = outputs_of(model, mtp, ids)
    check_far_from_ties(model, mtp, ids, result)
    if mtp is not None:
        check_against_transformers_mtp(mtp, model, ids)
    return result


def contents(config_json: str, ids: torch.Tensor, result: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """One file's arrays by their keys."""
    arrays = {key: value.detach().contiguous().numpy() for key, value in result.items()}
    return arrays | {"config": np.array(config_json), "input_ids": ids.numpy().astype(np.int32)}


def make(name: str, seed: int) -> dict[str, np.ndarray]:
    """The contents of one file."""
    fields = BASE | CASES[name]
    generator = torch.Generator().manual_seed(seed)
    model, mtp = random_model(fields, generator)
    ids = torch.randint(fields["vocab_size"], TOKENS.get(name, (2, 17)), generator=generator)
    result = checked_outputs(model, mtp, ids)
    result |= {f"tensor/{n}": value for n, value in tensors_of(model, mtp).items()}
    if name in WITH_GRADIENTS:
        loss_of(model, mtp, ids).backward()
        result |= {f"gradient/{n}": value for n, value in gradients_of(model, mtp).items()}
    return contents(model.config.to_json_string() if name in TRANSFORMERS_LAYOUT else json.dumps(fields), ids, result)


def make_without_ties(make_one: Make, name: str, seed: int, step: int) -> dict[str, np.ndarray]:
    """The contents of one file, from the first of a row of seeds that is good for it."""
    while True:
        try:
            return make_one(name, seed)
        except NearTieError as error:
            print(f"{name}: seed {seed} has a near tie ({error})")
            seed += step


def write_files(names: Iterable[str], make_one: Make) -> None:
    """A file beside this script for every name."""
    torch.set_num_threads(1)
    folder, names = Path(__file__).parent, list(names)
    for seed, name in enumerate(names):
        target = folder / f"{name}.npz"
        temporary = folder / f"{name}.partial.npz"
        np.savez_compressed(temporary, **make_without_ties(make_one, name, seed, len(names)))
        os.replace(temporary, target)
        print(f"{target.name}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    write_files(CASES, make)
