"""Holds an exported checkpoint and the logits that we say it has against transformers.

Runs in the environment of make_goldens.py (README.md beside it), without this project:

    python tests/golden/check_export.py FOLDER TOKENS.npy LOGITS.npy

FOLDER has a config.json and safetensors files with the public names, TOKENS ids [rows, tokens], LOGITS ours of
every position. All is computed in float32. Exit status 1: they differ by more than TOLERANCE, or the folder lacks
tensors, has others, or has some of another shape. MTP layers, which transformers does not load, may be there.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

TOLERANCE = 1e-4
SCALE = "_scale_inv"


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder. An index, where there is one, must say the same as the files."""
    tensors, places = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        content = load_file(file)
        if twice := sorted(tensors.keys() & content.keys()):
            sys.exit(f"{file.name}: has tensors that another file has too: {twice[:5]}")
        tensors |= content
        places |= dict.fromkeys(content, file.name)
    index = folder / "model.safetensors.index.json"
    if index.exists() and json.loads(index.read_text())["weight_map"] != places:
        sys.exit(f"{index.name}: does not say where the tensors are")
    return tensors


def dequantized(tensors: dict[str, torch.Tensor], block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Float32 weights from FP8 ones and the scales of their blocks; refuses one without the other."""
    plain = {name: value for name, value in tensors.items() if not name.endswith(SCALE)}
    fp8 = {name for name, value in plain.items() if value.dtype == torch.float8_e4m3fn}
    if odd := sorted(fp8 ^ {name.removesuffix(SCALE) for name in tensors.keys() - plain.keys()}):
        sys.exit(f"FP8 weights without scales, or scales without FP8 weights: {odd[:5]}")
    return plain | {name: multiplied_out(name, plain[name], tensors[name + SCALE], block) for name in fp8}


def multiplied_out(name: str, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The product; blocks at the edges may be cut short."""
    grid = tuple(-(-size // side) for size, side in zip(weight.shape, block, strict=True))
    if scale.dtype != torch.float32 or tuple(scale.shape) != grid:
        sys.exit(f"{name}{SCALE}: is {scale.dtype} {tuple(scale.shape)}, should be float32 {grid}")
    rows, columns = (torch.arange(size) // side for size, side in zip(weight.shape, block, strict=True))
    return weight.float() * scale[rows][:, columns]


def load(folder: Path) -> DeepseekV3ForCausalLM:
    """The model, in float32. Exits where the folder's tensors are not those of the model."""
    config_json = json.loads((folder / "config.json").read_text())
    quantization = config_json.pop("quantization_config", None)
    options: dict[str, Any] = dict(dtype=torch.float32, output_loading_info=True)
    options |= dict(attn_implementation="eager", experts_implementation="eager")  # others want sizes that tiny models lack
    if quantization is None:
        print("weights: loaded from the folder by transformers")
        model, info = DeepseekV3ForCausalLM.from_pretrained(folder, **options)
    else:
        # transformers' own dequantization divides a matrix evenly among its scales: wrong where the last block is cut short.
        if quantization["quant_method"] != "fp8":
            sys.exit(f"quant_method {quantization['quant_method']!r}: only 'fp8' is known here")
        print("weights: FP8 dequantized here with plain torch, then given to transformers")
        tensors = dequantized(stored_tensors(folder), tuple(quantization["weight_block_size"]))
        config = DeepseekV3Config(**config_json)
        model, info = DeepseekV3ForCausalLM.from_pretrained(None, config=config, state_dict=tensors, **options)
    refuse_other_tensors(info, model.config.num_hidden_layers)
    return model.eval()


def refuse_other_tensors(info: dict[str, Any], num_layers: int) -> None:
    """Exits unless the folder's tensors were the model's, apart from layers after the last."""
    layer = re.compile(r"model\.layers\.(\d+)\.")
    after = {name for name in info["unexpected_keys"] if (m := layer.match(name)) and int(m[1]) >= num_layers}
    problems = {**info, "unexpected_keys": info["unexpected_keys"] - after}
    if any(problems.values()):
        sys.exit("\n".join(f"{kind}: {sorted(names)}" for kind, names in problems.items() if names))
    print(f"tensors: all of them, none unknown; {len(after)} of MTP layers left out")


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    folder, tokens, ours = Path(sys.argv[1]), np.load(sys.argv[2]), np.load(sys.argv[3]).astype(np.float64)
    theirs = load(folder)(torch.from_numpy(tokens.astype(np.int64))).logits.double().numpy()
    if ours.shape != theirs.shape:
        sys.exit(f"logits: ours have shape {ours.shape}, theirs {theirs.shape}")
    difference = ours - theirs
    largest = np.abs(difference).max() / np.abs(theirs).max()
    frobenius = np.linalg.norm(difference) / np.linalg.norm(theirs)
    print(f"logits: largest difference {largest:.2e} of the largest logit, Frobenius norm of the difference {frobenius:.2e}")
    if not max(largest, frobenius) <= TOLERANCE:  # NaN is a difference too
        sys.exit(f"more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
