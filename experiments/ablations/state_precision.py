"""AdamW with float32 and with bfloat16 moments: the same seed and text (V3 sec. 3.3.3).

    uv run -m experiments.ablations.state_precision --config=configs/tiny.py --workdir=runs/moments

Published: bfloat16 moments without observable loss of quality; the master weights stay float32.
"""

from pathlib import Path

import numpy as np

from experiments import cli
from experiments.ablations import study
from experiments.output import panels

CONFIG = cli.define_config()
STEPS, WORKDIR = study.define_flags(steps=60)


def main() -> int:
    config = study.read_config(CONFIG, STEPS.value)
    kinds = ("float32", "bfloat16")
    workdir = Path(WORKDIR.value)
    curves = study.train_variants({kind: study.changed(config, optimizer={"moment_dtype": kind}) for kind in kinds}, workdir)
    smooth = {kind: study.smoothed(curve.loss) for kind, curve in curves.items()}
    error = 100 * np.abs(smooth["bfloat16"] / smooth["float32"] - 1)
    figure, (losses, errors) = panels("Moments of AdamW", 2)
    for kind in kinds:
        losses.plot(smooth[kind], label=f"{kind} moments", linewidth=1.2)
    losses.set(ylabel="training loss, nats (EMA 0.9)")
    losses.legend()
    errors.plot(error, color="tab:red", linewidth=1.2)
    errors.set(ylabel="relative difference, %", xlabel="step", ylim=(0, None))
    table = study.markdown(
        ["moments", "bytes a parameter", "training loss, smoothed", "validation loss"],
        [[kind, "8" if kind == "float32" else "4", f"{smooth[kind][-1]:.4f}", f"{curves[kind].val_loss:.4f}"] for kind in kinds],
    )
    difference = curves["bfloat16"].val_loss / curves["float32"].val_loss - 1
    verdict = (
        f"bfloat16 moments change the validation loss by {difference:+.3%} after {STEPS.value} steps, "
        f"the smoothed training loss by at most {error.max():.3f} %. Published: no observable loss."
    )
    study.finish(workdir, figure, table, verdict, {"val_loss_difference": difference, "largest_error_percent": error.max()})
    return 0


if __name__ == "__main__":
    cli.run(main)
