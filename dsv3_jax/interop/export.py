"""Writes parameters as a public checkpoint folder, a tensor at a time."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dsv3_jax.interop.hf_config import model_config_to_hf
from dsv3_jax.interop.layout import SCALE, Piece, checkpoint_layout, leaf_shapes, piece_index, scale_shape
from dsv3_jax.interop.safetensors import TensorSpec, write_folder
from dsv3_jax.interop.store import copy_tokenizer, unfinished
from dsv3_jax.interop.weights import FP8, WeightSource, kept_dtype, read_as

SHARD_BYTES = 5 * 10**9


def export(
    source: WeightSource,
    target: Path,
    dtype: str,
    identity: dict[str, Any],
    tokenizer_folder: Path,
    public_config: Mapping[str, Any] | None = None,
    copies: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `source` to the new folder `target`: safetensors shards, index, config.json, the tokenizer's files.

    dtype: source (as kept, FP8 with its scales), float32 or bfloat16. `identity` says which weights these are, so
    that an interrupted export is only continued with the same. `public_config` is the config.json they came with;
    `copies` are tensors to write once more under another name. Raises ConfigError.
    """
    pieces = {piece.tensor: piece for piece in checkpoint_layout(source.config)}
    kept = {name: kept_dtype(source, piece.path, dtype) for name, piece in pieces.items()}
    config = _config_json(source, kept, public_config)
    with unfinished(target, identity | {"dtype": dtype, "shard_bytes": shard_bytes}) as draft:
        specs = _specs(pieces, kept, copies or {})
        read = functools.partial(_read, source, pieces, kept, copies or {})
        with tqdm(total=len(specs), desc="Exporting", unit="tensor", disable=None) as bar:
            write_folder(draft, specs, read, shard_bytes, lambda spec: bar.update())
        copy_tokenizer(tokenizer_folder, draft)
        (draft / "config.json").write_text(json.dumps(config, indent=2))


def _specs(pieces: dict[str, Piece], kept: dict[str, np.dtype], copies: Mapping[str, str]) -> list[TensorSpec]:
    """Every tensor to write, layer by layer."""
    specs = [TensorSpec(name, kept[name], piece.shape) for name, piece in pieces.items()]
    specs += [TensorSpec(name + SCALE, np.dtype(np.float32), piece.scale().shape) for name, piece in pieces.items() if kept[name] == FP8]
    specs += [TensorSpec(name, kept[original], pieces[original].shape) for name, original in copies.items()]
    return sorted(specs, key=lambda spec: [int(part) if part.isdigit() else -1 for part in re.split(r"\D+", spec.name)[1:2]])


def _read(source: WeightSource, pieces: dict[str, Piece], kept: dict[str, np.dtype], copies: Mapping[str, str], name: str) -> np.ndarray:
    name = copies.get(name, name)
    shapes = leaf_shapes(source.config)
    if name not in pieces:  # the scales of an FP8 weight
        piece = pieces[name.removesuffix(SCALE)]
        values = source.read_scale(piece.path, piece_index(piece, scale_shape(piece, shapes[piece.path])))
        return values.reshape(piece.scale().shape[::-1]).T
    piece = pieces[name]
    values = read_as(source, piece.path, piece_index(piece, shapes[piece.path]), kept[name])
    return values.reshape(piece.shape[::-1]).T if piece.transposed else values


def _config_json(source: WeightSource, kept: dict[str, np.dtype], public_config: Mapping[str, Any] | None) -> dict[str, Any]:
    is_fp8 = FP8 in kept.values()
    dtype = str(kept["model.norm.weight"])
    if public_config is None:
        return model_config_to_hf(source.config, dtype)
    if is_fp8:
        return dict(public_config)
    config = {name: value for name, value in public_config.items() if name != "quantization_config"}
    field = "dtype" if "dtype" in config else "torch_dtype"
    if field not in config and dtype == "float32":  # what its absence means
        return config
    return config | {field: dtype}
