"""Flags that say which model to use: a run, a converted checkpoint, or a public folder."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from dsv3_jax.config import ConfigError, ModelConfig

if TYPE_CHECKING:
    from dsv3_jax.training.run import Run

flags.disclaim_key_flags()  # the flags belong to the experiment that defines them, and show in its --help


class Source(NamedTuple):
    """The flags, to be read once they are parsed."""

    workdir: flags.FlagHolder
    checkpoint: flags.FlagHolder
    hf: flags.FlagHolder
    ema: flags.FlagHolder
    dtype: flags.FlagHolder

    def open(self) -> "Run":
        """The model that the flags name. Raises ConfigError or CheckpointError."""
        given = [flag for flag in (self.workdir, self.checkpoint, self.hf) if flag.value is not None]
        if len(given) != 1:
            names = " ".join(f"--{flag.name}" for flag in given)
            raise ConfigError("model", names or None, "give exactly one of --workdir, --checkpoint and --hf")
        from dsv3_jax.training.run import load_checkpoint, load_run

        if given[0] is self.workdir:
            if self.dtype.value is not None:
                raise ConfigError("--dtype", self.dtype.value, "is for --checkpoint and --hf; a run has train.compute_dtype")
            return load_run(Path(self.workdir.value), self.ema.value)
        if self.ema.value:
            raise ConfigError("--ema", True, "only a --workdir has a moving average")
        return load_checkpoint(Path(given[0].value), self.dtype.value)


def define_flags() -> Source:
    """Defines --workdir, --checkpoint, --hf, --ema and --dtype."""
    return Source(
        flags.DEFINE_string("workdir", None, "Folder of a run of experiments.pretrain."),
        flags.DEFINE_string("checkpoint", None, "Checkpoint made by experiments.convert."),
        flags.DEFINE_string("hf", None, "Folder in the public layout: config.json and .safetensors files."),
        flags.DEFINE_bool("ema", False, "Use the moving average of a run's parameters."),
        flags.DEFINE_enum(
            "dtype", None, ["float32", "bfloat16"], "Compute dtype with --checkpoint or --hf; without it bfloat16 on a GPU, else float32."
        ),
    )


def define_speculative() -> flags.FlagHolder:
    """Defines --speculative, for `check_drafts`."""
    text = "Tokens that MTP modules draft and the model verifies in one pass; 0: none. The text follows the same distribution."
    return flags.DEFINE_integer("speculative", 0, text, lower_bound=0)


def check_drafts(drafts: int, model: ModelConfig) -> None:
    """Raises ConfigError when --speculative asks for drafts of a model that has nothing to draft with."""
    if drafts and not model.num_nextn_predict_layers:
        raise ConfigError("--speculative", drafts, "this model has no MTP modules to draft with; leave it out")
