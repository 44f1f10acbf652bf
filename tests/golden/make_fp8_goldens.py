"""Makes the golden files whose weights are stored as in DeepSeek-V3's release: FP8 with a scale for every 128x128 block.

Runs like make_goldens.py, in the same environment:

    python tests/golden/make_fp8_goldens.py

In the release the matrices of attention, MLPs and experts are float8_e4m3fn, with `NAME_scale_inv` in float32
beside each; the true weight is their product. The router bias is float32, all else bfloat16. The outputs are
those of the stored values, multiplied out and evaluated in float32.
"""

import json
import re
from typing import Any

import numpy as np
import torch
from make_goldens import BASE, checked_outputs, contents, random_model, tensors_of, write_files

BLOCK = 128
# No width is a multiple of BLOCK, and the larger matrices have two blocks a side: edge blocks are smaller than the others.
WIDE: dict[str, Any] = dict(
    vocab_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=40,
    qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=36, n_routed_experts=4, num_experts_per_tok=2,
    quantization_config={"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "fp8": dict(
        hidden_size=160, intermediate_size=200, moe_intermediate_size=136, n_group=2, topk_group=1, num_nextn_predict_layers=1
    ),
    "fp8_uncompressed": dict(
        hidden_size=136, intermediate_size=150, moe_intermediate_size=24, n_group=1, topk_group=1, q_lora_rank=None
    ),
}  # fmt: skip
# The matrices that the release has in FP8: not the router, the head, the embedding, nor eh_proj of the MTP layer.
QUANTIZED = re.compile(r"\.(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
KEPT = 0.25  # of the elements of the matrices; the others are zero, so that the files compress
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def each_element(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of every element from that of every block."""
    rows, columns = shape
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 values and scales at which every block fills the range of FP8."""
    largest = [[block.abs().max() for block in rows.split(BLOCK, 1)] for rows in weight.split(BLOCK)]
    scale = torch.tensor(largest) / LARGEST
    return (weight / each_element(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def thin_out(tensors: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """Zeros most elements of the FP8 matrices and of eh_proj; the others grow, so that products keep their size."""
    for name, value in tensors.items():
        if QUANTIZED.search(name) or "eh_proj" in name:
            value.mul_((torch.rand(value.shape, generator=generator) < KEPT) / KEPT**0.5)


def store(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a file keeps of the tensors, by its keys. Changes them in place, models included, to the values that it keeps."""
    stored = {}
    for name, value in tensors.items():
        if QUANTIZED.search(name):
            fp8, scale = quantized(value)
            value.copy_(fp8.float() * each_element(scale, value.shape))
            stored |= {f"tensor_fp8/{name}": fp8.view(torch.uint8), f"tensor/{name}_scale_inv": scale}
        elif name.endswith("e_score_correction_bias"):
            stored[f"tensor/{name}"] = value
        else:
            value.copy_(value.bfloat16().float())
            stored[f"tensor_bf16/{name}"] = value.bfloat16().view(torch.uint16)
    return stored


def make(name: str, seed: int) -> dict[str, np.ndarray]:
    """The contents of one file."""
    fields = BASE | WIDE | CASES[name]
    generator = torch.Generator().manual_seed(seed)
    # transformers is to see plain weights.
    model, mtp = random_model({key: value for key, value in fields.items() if key != "quantization_config"}, generator)
    with torch.no_grad():
        tensors = tensors_of(model, mtp)
        thin_out(tensors, generator)
        stored = store(tensors)
    ids = torch.randint(fields["vocab_size"], (2, 17), generator=generator)
    return contents(json.dumps(fields), ids, checked_outputs(model, mtp, ids) | stored)


if __name__ == "__main__":
    write_files(CASES, make)
