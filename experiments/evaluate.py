"""Loss and bits per byte of a trained model on its held-out text, or on any text.

uv run -m experiments.evaluate --workdir=runs/tiny
uv run -m experiments.evaluate --workdir=runs/tiny --ema --data='text:docs/**/*.md'
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of experiments.pretrain.", required=True)
DATA = flags.DEFINE_string("data", None, "Text to evaluate on, all of it: stdlib, text:GLOB, jsonl:GLOB#field or parquet:GLOB#column. "
                           "Without it: the run's held-out documents.")  # fmt: skip
SEQUENCES = flags.DEFINE_integer("sequences", 512, "At most so many rows of the model's sequence length.", lower_bound=1)
EMA = flags.DEFINE_bool("ema", False, "Use the moving average of the parameters.")


def main() -> int:
    import jax

    from dsv3_jax.training.corpus import open_corpus
    from dsv3_jax.training.data import validation_rows
    from dsv3_jax.training.evaluate import evaluate
    from dsv3_jax.training.run import load_run
    from dsv3_jax.training.step import make_eval_step

    run = load_run(Path(WORKDIR.value), EMA.value)
    data = run.config.data
    if DATA.value is None:
        documents = open_corpus(data).valid
    else:
        documents = open_corpus(dataclasses.replace(data, source=DATA.value, held_out=0.0)).train
    train = run.config.train
    rows = validation_rows(documents, run.tokenizer, run.vocabulary, train.sequence_length, SEQUENCES.value)
    step = jax.jit(make_eval_step(run.config, run.execution))
    result = evaluate(step, run.params, run.router_bias, rows, train.micro_batch_size, run.vocabulary.byte_lengths,
                      run.execution.document_eos)  # fmt: skip
    print(json.dumps({"step": run.step, **result._asdict()}, indent=2))
    return 0


if __name__ == "__main__":
    cli.run(main)
