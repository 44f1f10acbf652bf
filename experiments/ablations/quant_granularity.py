"""How coarse a scale may be: per tensor, 1x128, 128x128, for activations and for activation gradients (V3 appendix B.2).

    uv run -m experiments.ablations.quant_granularity --config=configs/tiny.py --workdir=runs/granularity

Trains each variant from the same seed on the same text. Then takes x, W and dy of every Linear of every layer from the
run without FP8, on one batch, and multiplies these operands with each kind of scale: the error of Fprop, Dgrad and
Wgrad by layer. Published: scaling activation gradients per 128x128 block diverged (16B parameters, 300B tokens); Dgrad
is the sensitive product.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.precision.policy import TILES, Recipe
from dsv3_jax.training.data import TrainLoader
from experiments import cli
from experiments.ablations import study
from experiments.ablations.products import GEMMS, errors_of, products_of

CONFIG = cli.define_config()
STEPS, WORKDIR = study.define_flags(steps=30)
COARSE = flags.DEFINE_list("coarse", ["128x128", "tensor"], "Tiles to compare with 1x128, which FP8 trains with.")
FINE = "activations-1x128"  # and gradients: the recipe

Errors = dict[str, np.ndarray]  # by layer and linear, "2 kv_a": [variants, GEMMS]


def main() -> int:
    config = study.read_config(CONFIG, STEPS.value)
    variants = _variants(config)
    fp8 = [name for name in variants if name != "none"]
    workdir, text = Path(WORKDIR.value), study.open_text(config, Path(WORKDIR.value))
    study.check_kept(variants, workdir)
    _, state = study.train_variant("none", variants["none"], text, workdir)
    curves = study.train_variants(variants, workdir, text=text)
    recipes = {name: dataclasses.replace(Recipe.of(variants[name].precision), impl="reference") for name in fp8}
    errors: Errors = {}
    for layer, products in enumerate(products_of(state, variants["none"], _rows(config, text))):
        for linear, product in products.items():
            errors[f"{layer} {linear}"] = np.array(list(errors_of(product, recipes).values()))
    losses = {name: curve.val_loss for name, curve in curves.items()}
    by_gemm = np.mean(list(errors.values()), axis=0)
    result = {"val_loss": losses, "gemms": GEMMS, "variants": fp8, "errors": {name: e.tolist() for name, e in errors.items()}}
    study.finish(workdir, _heat_maps(errors, fp8), _tables(losses, errors, fp8), _verdict(by_gemm, fp8), result)
    return 0


def _variants(config: Config) -> dict[str, Config]:
    """No FP8, FP8 as the recipe has it, and one kind of tensor with coarser scales."""
    unknown = [tile for tile in COARSE.value if tile not in TILES]
    if unknown or not COARSE.value:
        raise ConfigError("--coarse", ",".join(COARSE.value) or None, f"name some of {', '.join(TILES)}")
    fields: dict[str, dict[str, str]] = {FINE: {}}
    fields |= {f"activations-{tile}": {"activation_tile": tile} for tile in COARSE.value}
    fields |= {f"gradients-{tile}": {"gradient_tile": tile} for tile in COARSE.value}
    fp8 = {name: study.changed(config, precision={"policy": "fp8", **change}) for name, change in fields.items()}
    return {"none": study.changed(config, precision={"policy": "bf16"}), **fp8}


def _rows(config: Config, text: study.Text) -> jax.Array:
    loader = TrainLoader(text.corpus.train, text.tokenizer, text.vocabulary, config.data, config.train.sequence_length)
    rows = loader.next_batch(config.train.micro_batch_size)
    loader.close()
    return jnp.asarray(rows)


def _tables(losses: dict[str, float], errors: Errors, fp8: list[str]) -> str:
    """Loss and mean errors of every variant; then the mean errors of every layer."""
    layers = sorted({name.split()[0] for name in errors}, key=int)
    means = np.mean(list(errors.values()), axis=0)
    rows = [["none", f"{losses['none']:.4f}", *[""] * len(GEMMS)]]
    rows += [[name, f"{losses[name]:.4f}", *(f"{e:.2%}" for e in mean)] for name, mean in zip(fp8, means, strict=True)]
    by_layer = [
        [gemm, name, *(f"{np.mean([e[v, g] for key, e in errors.items() if key.split()[0] == layer]):.2%}" for layer in layers)]
        for g, gemm in enumerate(GEMMS)
        for v, name in enumerate(fp8)
    ]
    header = ["FP8 scales", "validation loss", *(f"error of {gemm}, mean" for gemm in GEMMS)]
    return f"{study.markdown(header, rows)}\n\n{study.markdown(['product', 'FP8 scales', *(f'layer {i}' for i in layers)], by_layer)}"


def _heat_maps(errors: Errors, fp8: list[str]) -> Figure:
    """A map for each product: layer and linear down, variants across."""
    figure = Figure(figsize=(4 + 1.6 * len(fp8), 1.5 + 0.24 * len(errors)), layout="constrained")
    figure.suptitle("Error of each product, %", x=0.01, ha="left", fontweight="bold")
    for g, (gemm, ax) in enumerate(zip(GEMMS, figure.subplots(1, len(GEMMS), sharey=True), strict=True)):
        values = 100 * np.array([e[:, g] for e in errors.values()])
        ax.imshow(values, cmap="viridis", aspect="auto")
        for row, column in np.ndindex(*values.shape):
            ax.text(column, row, f"{values[row, column]:.1f}", ha="center", va="center", color="w", fontsize=7)
        ax.set_title(gemm)
        ax.set_xticks(range(len(fp8)), fp8, rotation=45, ha="right", fontsize=7)
        ax.set_yticks(range(len(errors)), list(errors), fontsize=7)
    return figure


def _verdict(by_gemm: np.ndarray, fp8: list[str]) -> str:
    coarse = COARSE.value[0]
    fine, gradients, activations = (by_gemm[fp8.index(name)] for name in (FINE, f"gradients-{coarse}", f"activations-{coarse}"))
    return (
        f"Gradient scales per {coarse} give {gradients[1] / fine[1]:.2f} times the Dgrad error of 1x128 ({gradients[1]:.2%} against "
        f"{fine[1]:.2%}) and {gradients[2] / fine[2]:.2f} times the Wgrad error; activation scales per {coarse} "
        f"{activations[0] / fine[0]:.2f} times the Fprop error. Published: block-wise gradient scales diverged at 16B parameters "
        "and 300B tokens, far beyond this run, and Dgrad is the sensitive product."
    )


if __name__ == "__main__":
    cli.run(main)
