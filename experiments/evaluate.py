"""Loss and bits per byte of a model on its held-out text, or on any text; or its logits for given tokens.

uv run -m experiments.evaluate --workdir=runs/tiny
uv run -m experiments.evaluate --workdir=runs/tiny --ema --data='text:docs/**/*.md'
uv run -m experiments.evaluate --hf=DeepSeek-V3 --tokens=tokens.npy --logits_out=logits.npy
"""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from dsv3_jax.config import ConfigError
from experiments import cli, sources
from experiments.output import check_outputs

if TYPE_CHECKING:
    from dsv3_jax.training.run import Run

SOURCE = sources.define_flags()
DATA = flags.DEFINE_string("data", None, "Text to evaluate on, all of it: stdlib, text:GLOB, jsonl:GLOB#field or parquet:GLOB#column. "
                           "Without it: the run's held-out documents.")  # fmt: skip
SEQUENCES = flags.DEFINE_integer("sequences", 512, "At most so many rows of the model's sequence length.", lower_bound=1)
TOKENS = flags.DEFINE_string("tokens", None, "File of token ids [B, T] (.npy); with --logits_out.")
LOGITS_OUT = flags.DEFINE_string("logits_out", None, "File to write the scores of the next token to, [B, T, V] float32 (.npy).")


def main() -> int:
    if (TOKENS.value is None) != (LOGITS_OUT.value is None):
        raise ConfigError("--tokens", TOKENS.value, "and --logits_out go together")
    check_outputs(LOGITS_OUT)
    run = SOURCE.open()
    if TOKENS.value is not None:
        from dsv3_jax.training.evaluate import write_logits

        write_logits(run.params, run.router_bias, Path(TOKENS.value), Path(LOGITS_OUT.value), run.config.model, run.execution)
        return 0
    print(json.dumps({"step": run.step, **_on_text(run)}, indent=2))
    return 0


def _on_text(run: "Run") -> dict[str, float | int | None]:
    import jax

    from dsv3_jax.training.corpus import open_corpus
    from dsv3_jax.training.data import validation_rows
    from dsv3_jax.training.evaluate import evaluate
    from dsv3_jax.training.step import make_eval_step

    data, train, vocabulary = run.config.data, run.config.train, run.vocabulary
    if DATA.value is None and run.step is None:
        raise ConfigError("--data", None, "a checkpoint has no held-out text of its own; give some, or --tokens and --logits_out")
    if DATA.value is None:
        documents = open_corpus(data).valid
    else:
        documents = open_corpus(dataclasses.replace(data, source=DATA.value, held_out=0.0)).train
    rows = validation_rows(documents, run.tokenizer, vocabulary, train.sequence_length, SEQUENCES.value)
    step = jax.jit(make_eval_step(run.config, run.execution))
    eos = run.execution.document_eos
    return evaluate(step, run.params, run.router_bias, rows, train.micro_batch_size, vocabulary.byte_lengths, eos)._asdict()


if __name__ == "__main__":
    cli.run(main)
