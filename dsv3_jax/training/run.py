"""A model, opened for use: configuration, tokenizer, parameters; from a run, a converted checkpoint or a public folder."""

from pathlib import Path
from typing import NamedTuple

import jax
from tokenizers import Tokenizer

from dsv3_jax.config import Config, ConfigError, MeshConfig, default_config, from_config_dict, to_dict
from dsv3_jax.interop.huggingface import PUBLIC_CONFIG, read_beside
from dsv3_jax.interop.safetensors import CheckpointError
from dsv3_jax.interop.store import open_weights
from dsv3_jax.interop.weights import load_params
from dsv3_jax.model.init import init_router_bias, parameter_shapes
from dsv3_jax.model.transformer import Execution, Params, RouterBias
from dsv3_jax.parallel.mesh import make_mesh, replicated
from dsv3_jax.training.checkpoint import abstract_like, newest_sound_step, restore_model
from dsv3_jax.training.tokenizer import Vocabulary
from dsv3_jax.training.workdir import CHECKPOINT_DIR, TOKENIZER_FILE, load_config


class Run(NamedTuple):
    """What inference and evaluation need of a model."""

    folder: Path
    config: Config
    execution: Execution
    params: Params
    router_bias: RouterBias
    step: int | None  # None: not from a run
    eos_ids: tuple[int, ...]  # tokens that end a text

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ConfigError where the folder has none."""
        path = self.folder / TOKENIZER_FILE
        if not path.is_file():
            raise ConfigError("tokenizer", str(path), "is missing; put the model's tokenizer.json there")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ConfigError("tokenizer", str(path), f"is no tokenizer.json that can be read: {error}") from error

    @property
    def vocabulary(self) -> Vocabulary:
        """Raises ConfigError for a tokenizer that is not byte-level or does not fit the model's data settings."""
        return Vocabulary.from_tokenizer(self.tokenizer, self.config.data)


def load_run(workdir: Path, ema: bool) -> Run:
    """Opens a workdir. Raises ConfigError when it holds no run, no checkpoint, or no moving average where one is asked for."""
    config = load_config(workdir)
    if ema and config.train.ema_decay == 0:
        raise ConfigError("--ema", ema, f"{workdir} was trained with train.ema_decay = 0 and has no moving average")
    directory = workdir / CHECKPOINT_DIR
    step = newest_sound_step(directory)
    if step is None:
        raise ConfigError("--workdir", str(workdir), "holds no checkpoint yet; let experiments.pretrain reach its first")
    tokenizer = Tokenizer.from_file(str(workdir / TOKENIZER_FILE))
    vocabulary = Vocabulary.from_tokenizer(tokenizer, config.data)
    shapes = (parameter_shapes(config.model), jax.eval_shape(lambda: init_router_bias(config.model)))
    abstract = abstract_like(shapes, replicated(make_mesh(MeshConfig())))  # one device, whatever it was trained on
    params, bias = restore_model(directory, step, abstract, ema)
    return Run(workdir, config, Execution.of(config, vocabulary.eos_id), params, bias, step, (vocabulary.eos_id,))


def load_checkpoint(folder: Path, dtype: str | None) -> Run:
    """Opens a converted checkpoint or a public folder; `dtype` None: bfloat16 on a GPU, else float32.

    Raises CheckpointError or ConfigError for a folder that cannot be used.
    """
    source = open_weights(folder)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    settings = default_config()
    settings.model.update(to_dict(source.config))
    settings.train.update(sequence_length=min(source.config.max_position_embeddings, 4096), compute_dtype=dtype)
    settings.data.fim_rate = 0.0  # evaluation needs no fill-in-the-middle tokens
    config = from_config_dict(settings)
    params, bias = load_params(source, dtype, replicated(make_mesh(MeshConfig())))
    return Run(folder, config, Execution.of(config, 0), params, bias, None, _eos_ids(folder))


def _eos_ids(folder: Path) -> tuple[int, ...]:
    """End tokens by generation_config.json or config.json, which hold one id or a list."""
    for name in ("generation_config.json", PUBLIC_CONFIG):
        ids = read_beside(folder, name).get("eos_token_id") if (folder / name).is_file() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(token) is int for token in ids):
                raise CheckpointError("eos_token_id", f"is {ids!r}; must be a token's id, or a list of them", folder / name)
            return tuple(ids)
    return ()
