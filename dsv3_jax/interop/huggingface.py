"""A public checkpoint folder, as DeepSeek-V3's release and transformers write it: opened, checked, read part by part.

Everything that can be known without the values of the weights is checked when the folder is opened, so that
nobody starts to load or convert what cannot be finished. FP8 scales are small and are read then, too.
"""

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.interop.hf_config import model_config_from_hf
from dsv3_jax.interop.layout import SCALE, Piece, checkpoint_layout, is_shared_copy
from dsv3_jax.interop.safetensors import CheckpointError, read_folder
from dsv3_jax.interop.weights import FP8, Index, load_params
from dsv3_jax.json_object import read_object
from dsv3_jax.model.transformer import Params, RouterBias

_log = logging.getLogger(__name__)
_FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16, FP8))
PUBLIC_CONFIG = "config.json"


@runtime_checkable
class Tensor(Protocol):
    """A public tensor that can be read."""

    @property
    def dtype(self) -> np.dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> Path | None: ...
    def read(self) -> np.ndarray: ...


class ArrayTensor(NamedTuple):
    """A tensor that is in memory already."""

    values: np.ndarray
    file: Path | None = None

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self) -> np.ndarray:
        return self.values


class PublicCheckpoint:
    """Tensors by their public names, checked against the architecture; a `WeightSource` of our stacked parameters.

    Raises CheckpointError for a tensor that is missing, unknown or misshapen, has a dtype that differs within its
    stack, lacks its scales, or has scales that are not finite.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]):
        self.config, self.tensors = config, tensors
        self.pieces: dict[str, dict[tuple[int, ...], Piece]] = {}
        for piece in checkpoint_layout(config):
            self.pieces.setdefault(piece.path, {})[_stack_index(piece)] = piece
        self._check_shapes()
        self._check_dtypes()
        self._check_scales()
        self.copies = self._check_names()

    def stored_dtype(self, path: str) -> np.dtype:
        return self.tensors[next(iter(self.pieces[path].values())).tensor].dtype

    def read(self, path: str, index: Index) -> np.ndarray:
        return self._assemble(path, index, "")

    def read_scale(self, path: str, index: Index) -> np.ndarray:
        return self._assemble(path, index, SCALE)

    def _assemble(self, path: str, index: Index, suffix: str) -> np.ndarray:
        pieces = self.pieces[path]
        where = next(iter(pieces.values())).where
        axes = [axis for axis, at in enumerate(where) if isinstance(at, int)]
        kind = self.stored_dtype(path) if not suffix else np.dtype(np.float32)
        out = np.empty([s.stop - s.start for s in index], kind)
        inner = tuple(s for axis, s in enumerate(index) if axis not in axes)
        for key in itertools.product(*(range(index[axis].start, index[axis].stop) for axis in axes)):
            piece = pieces[key]
            values = self.tensors[piece.tensor + suffix].read()
            target: list[int | slice] = [slice(None)] * len(index)
            for axis, at in zip(axes, key, strict=True):
                target[axis] = at - index[axis].start
            out[tuple(target)] = (values.T if piece.transposed else values)[inner]
        return out

    def _check_shapes(self) -> None:
        for piece in self._all():
            tensor = self.tensors.get(piece.tensor)
            if tensor is None:
                raise CheckpointError(piece.tensor, f"is missing from the checkpoint; config.json asks for it with shape {piece.shape}")
            if tensor.shape != piece.shape:
                raise CheckpointError(piece.tensor, f"has shape {tensor.shape}, config.json asks for {piece.shape}", tensor.file)

    def _check_dtypes(self) -> None:
        for path, pieces in self.pieces.items():
            first = next(iter(pieces.values()))
            expected = self.tensors[first.tensor].dtype
            for piece in pieces.values():
                tensor = self.tensors[piece.tensor]
                if tensor.dtype not in _FLOATS:
                    raise CheckpointError(
                        piece.tensor, f"has dtype {tensor.dtype}; float32, bfloat16, float16 and FP8 E4M3 are read", tensor.file
                    )
                if tensor.dtype != expected:
                    raise CheckpointError(
                        piece.tensor,
                        f"is {tensor.dtype} where {first.tensor} is {expected}; tensors of one kind share a dtype",
                        tensor.file,
                    )
                if tensor.dtype == FP8 and (len(piece.shape) < 2 or path.startswith("params/embed")):
                    raise CheckpointError(piece.tensor, "is FP8; only weights of linear layers can be", tensor.file)

    def _check_scales(self) -> None:
        for piece in self._all():
            name, tensor = piece.tensor + SCALE, self.tensors[piece.tensor]
            scale = self.tensors.get(name)
            if tensor.dtype != FP8:
                if scale is not None:
                    raise CheckpointError(name, f"is there, but {piece.tensor} is {tensor.dtype} and needs no scales", scale.file)
                continue
            if scale is None:
                raise CheckpointError(name, f"is missing: {piece.tensor} is FP8 and needs its scales", tensor.file)
            if scale.shape != piece.scale().shape or scale.dtype != np.float32:
                raise CheckpointError(
                    name, f"is {scale.dtype} {scale.shape}; must be float32 {piece.scale().shape}, one scale per 128x128 block", scale.file
                )
            if not np.all(np.isfinite(scale.read())):
                raise CheckpointError(name, "holds a scale that is NaN or infinite", scale.file)

    def _check_names(self) -> dict[str, str]:
        """Refuses what the architecture does not have; returns the copies of other tensors that the checkpoint holds."""
        wanted = {piece.tensor for piece in self._all()}
        copies = {}
        for name, tensor in self.tensors.items():
            if name in wanted or (name.endswith(SCALE) and name.removesuffix(SCALE) in wanted):
                continue
            original = self._original(name)
            if original is None:
                raise CheckpointError(name, "is not a tensor of the architecture that config.json describes", tensor.file)
            if not _same(tensor, self.tensors[original]):
                raise CheckpointError(name, f"must be a copy of {original} and differs from it", tensor.file)
            copies[name] = original
        return copies

    def _original(self, name: str) -> str | None:
        """The tensor that `name` may be a copy of: the head of a tied model, or an MTP layer's embedding and head."""
        tied = self.config.tie_word_embeddings
        original = "model.embed_tokens.weight" if name == "lm_head.weight" and tied else None
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        first, depth = self.config.num_hidden_layers, self.config.num_nextn_predict_layers
        if layer is not None and first <= int(layer[1]) < first + depth:
            original = is_shared_copy(name)
        return "model.embed_tokens.weight" if original == "lm_head.weight" and tied else original

    def _all(self) -> Iterator[Piece]:
        return itertools.chain.from_iterable(pieces.values() for pieces in self.pieces.values())


def _stack_index(piece: Piece) -> tuple[int, ...]:
    return tuple(index for index in piece.where if isinstance(index, int))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    rows = max(1, 2**24 // max(1, a.dtype.itemsize * int(np.prod(a.shape[1:]))))
    left, right = a.read(), b.read()
    return all(left[i : i + rows].tobytes() == right[i : i + rows].tobytes() for i in range(0, a.shape[0], rows))


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a public folder. Raises CheckpointError when there is none or it is no JSON object."""
    return read_beside(folder, PUBLIC_CONFIG)


def read_beside(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object beside the weights. Raises CheckpointError when there is none."""
    try:
        return read_object(folder / name)
    except ValueError as error:
        raise CheckpointError(name, str(error), folder) from error


def open_public(folder: Path) -> PublicCheckpoint:
    """Opens and checks a public folder. Raises CheckpointError or ConfigError with one line that names what is wrong.

    A folder without any tensor of an MTP layer is opened as a model without MTP modules, whatever its config.json
    says: transformers drops these layers when it saves.
    """
    config = model_config_from_hf(read_config(folder))
    tensors = read_folder(folder)
    first = config.num_hidden_layers
    layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    if config.num_nextn_predict_layers and not any(layer >= first for layer in layers):
        _log.warning("%s holds no MTP layer, though its config.json names %d; opened without", folder, config.num_nextn_predict_layers)
        config = dataclasses.replace(config, num_nextn_predict_layers=0)
    if not config.num_nextn_predict_layers and any(layer >= first for layer in layers):
        remedy = f"the folder holds layers beyond num_hidden_layers = {first}; set it to their number to load them"
        raise ConfigError("num_nextn_predict_layers", 0, remedy)
    return PublicCheckpoint(config, tensors)


def params_from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> tuple[Params, RouterBias]:
    """Parameters and router bias, float32, from public tensors that are in memory. Raises CheckpointError."""
    public = PublicCheckpoint(config, {name: ArrayTensor(np.asarray(values)) for name, values in tensors.items()})
    return load_params(public, "float32", jax.sharding.SingleDeviceSharding(jax.devices()[0]))
