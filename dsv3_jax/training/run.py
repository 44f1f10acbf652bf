"""A trained run, opened for use: configuration, tokenizer, and the parameters of its newest checkpoint."""

from pathlib import Path
from typing import NamedTuple

import jax
from tokenizers import Tokenizer

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.model.init import init_router_bias, parameter_shapes
from dsv3_jax.model.transformer import Execution, Params, RouterBias
from dsv3_jax.parallel.mesh import make_mesh, replicated
from dsv3_jax.training.checkpoint import abstract_like, newest_sound_step, restore_model
from dsv3_jax.training.tokenizer import Vocabulary
from dsv3_jax.training.workdir import CHECKPOINT_DIR, TOKENIZER_FILE, load_config


class Run(NamedTuple):
    """What inference and evaluation need of a run."""

    config: Config
    execution: Execution
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    params: Params
    router_bias: RouterBias
    step: int


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
    abstract = abstract_like(shapes, replicated(make_mesh(config.parallel.mesh)))
    params, bias = restore_model(directory, step, abstract, ema)
    return Run(config, Execution.of(config, vocabulary.eos_id), tokenizer, vocabulary, params, bias, step)
