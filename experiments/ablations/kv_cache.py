"""What a token keeps for decoding: MLA against MHA, GQA and MQA with the same heads (V2, 2405.04434, sec. 2.1.4).

    uv run -m experiments.ablations.kv_cache --config=configs/v3_671b.py --workdir=runs/kv_cache

Counted from the shapes of the cache, nothing is trained. Published: MLA keeps as much as GQA with 2.25 groups. The
model has no attention but MLA, so the loss with the others is not compared.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.config import ConfigError
from dsv3_jax.training.accounting import cache_bytes_per_token, mha_bytes_per_token
from experiments import cli
from experiments.ablations import study
from experiments.output import gib

CONFIG = cli.define_config()
WORKDIR = study.define_workdir()
GROUPS = flags.DEFINE_integer("groups", 8, "Key-value heads of GQA; must divide the heads of the model.", lower_bound=1)
PUBLISHED = 2.25  # groups


def main() -> int:
    model = cli.read_config(CONFIG).model
    heads = model.num_attention_heads
    if heads % GROUPS.value:
        raise ConfigError("--groups", GROUPS.value, f"must divide model.num_attention_heads = {heads}")
    mla, of_group = cache_bytes_per_token(model), mha_bytes_per_token(model) // heads
    sizes = {"MHA": of_group * heads, f"GQA, {GROUPS.value} groups": of_group * GROUPS.value, "MQA": of_group, "MLA": mla}
    longest = model.max_position_embeddings
    figure, (ax,) = study.panels("Cache of one sequence, bf16")
    lengths = [length for length in (2**i for i in range(30)) if 64 <= length < longest] + [longest]
    for name, size in sizes.items():
        ax.loglog(lengths, [size * length / 2**30 for length in lengths], "o-", label=name, base=2)
    ax.set(xlabel="tokens", ylabel="GiB")
    ax.legend()
    header = ["attention", "numbers a token and layer", "bytes a token", f"cache of {longest} tokens", "over MLA"]
    layers = 2 * model.num_hidden_layers
    rows = [[name, f"{size // layers:,}", f"{size:,}", gib(size * longest), f"{size / mla:.2f}"] for name, size in sizes.items()]
    groups = mla / of_group
    verdict = (
        f"MLA keeps as much as GQA with {groups:.2f} groups would, 1/{sizes['MHA'] / mla:.1f} of MHA. "
        f"Published: as GQA with {PUBLISHED} groups, for V2. The loss is not compared."
    )
    result = {"bytes_per_token": sizes, "equal_groups": groups}
    study.finish(Path(WORKDIR.value), figure, study.markdown(header, rows), verdict, result)
    return 0


if __name__ == "__main__":
    cli.run(main)
