"""A new run that starts from given weights instead of random ones: `init_from`, a converted or public checkpoint."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.interop.store import open_weights
from dsv3_jax.interop.weights import load_params
from dsv3_jax.model.transformer import Params, RouterBias
from dsv3_jax.parallel.sharding import place
from dsv3_jax.training.tokenizer import FILE_NAME

# Fields of the model that training goes on with may differ in: none of them shapes a parameter.
_FREE = frozenset(("aux_loss_alpha", "initializer_range", "max_position_embeddings", "rope_scaling"))


def with_tokenizer_of(config: Config) -> Config:
    """The configuration with the checkpoint's own tokenizer, where it has one and `data.tokenizer` names no other."""
    tokenizer = Path(config.init_from) / FILE_NAME
    if not config.init_from or config.data.tokenizer or not tokenizer.is_file():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(tokenizer)))


def check_initial(config: Config) -> None:
    """Raises ConfigError where the checkpoint's architecture is another than the configuration's; CheckpointError where it is broken."""
    theirs = open_weights(Path(config.init_from)).config
    for field in dataclasses.fields(theirs):
        ours, value = getattr(config.model, field.name), getattr(theirs, field.name)
        if ours != value and field.name not in _FREE:
            raise ConfigError(f"config.model.{field.name}", ours, f"{config.init_from} was made with {value!r}; give that value")


def load_initial(config: Config, mesh: Mesh) -> tuple[Params, RouterBias]:
    """The checkpoint's parameters as float32 masters on their devices, and its router bias."""

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        kind, _, name = path.partition("/")
        return NamedSharding(mesh, place(name, shape, mesh).master if kind == "params" else P())

    return load_params(open_weights(Path(config.init_from)), "float32", sharding)
