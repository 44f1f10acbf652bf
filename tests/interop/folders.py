"""Public checkpoint folders made from the golden files."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.export import export
from dsv3_jax.interop.safetensors import TensorSpec, write_folder
from dsv3_jax.interop.weights import ArraySource
from tests.small import parameters

GOLDEN = Path(__file__).parents[1] / "golden"
_STORED = {"tensor/": None, "tensor_bf16/": np.dtype(ml_dtypes.bfloat16), "tensor_fp8/": np.dtype(ml_dtypes.float8_e4m3fn)}


def golden(case: str) -> dict[str, np.ndarray]:
    """The arrays of a golden file."""
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as file:
        return dict(file)


def tensors_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights by their public names, in the dtype that they are stored in."""
    return {
        key.removeprefix(prefix): value if dtype is None else value.view(dtype)
        for key, value in arrays.items()
        for prefix, dtype in _STORED.items()
        if key.startswith(prefix)
    }


def write_public(folder: Path, config: dict, tensors: dict[str, np.ndarray], shard_bytes: int = 50_000) -> Path:
    """A public folder of several shards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    specs = [TensorSpec(name, value.dtype, value.shape) for name, value in tensors.items()]
    write_folder(folder, specs, tensors.__getitem__, shard_bytes)
    return folder


def public_folder(folder: Path, case: str) -> Path:
    """The public folder of a golden file."""
    arrays = golden(case)
    return write_public(folder, json.loads(str(arrays["config"])), tensors_of(arrays))


def write_random(folder: Path, config: ModelConfig) -> Path:
    """A public folder with random weights."""
    export(ArraySource(config, *parameters(config)), folder, "source", {}, folder.parent)
    return folder
