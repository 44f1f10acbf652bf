"""What experiments.bench.decode says of its figures: tables, ratios, and what a step has to read at least."""

from typing import Any

from dsv3_jax.config import ModelConfig
from experiments.output import table

IN_FP8 = ("attention", "feed-forward", "shared experts", "routed experts")


def step_bytes(config: ModelConfig, batch: int, context: int, dtype: str, fp8: bool = False) -> float:
    """Bytes that a decode step has to read: weights, of the routed experts those that a batch picks if all are as likely, and latents.

    In FP8 weights of linear layers are one byte; their scales, a two-thousandth of that, are left out.
    """
    import jax.numpy as jnp

    from dsv3_jax.training.accounting import cache_bytes_per_token, parameter_parts

    itemsize = jnp.dtype(dtype).itemsize
    unpicked = (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    held = {"routed experts": 1 - unpicked, "embedding": float(config.tie_word_embeddings)}  # an embedding is a row a token
    weights = sum(
        part.parameters * held.get(part.name, 1.0) * (1 if fp8 and part.name in IN_FP8 else itemsize)
        for part in parameter_parts(config)
        if part.section != "mtp"
    )
    return weights + batch * context * cache_bytes_per_token(config) * itemsize / 2  # those are bytes of bf16


def render(figures: dict[str, Any]) -> str:
    """The figures as text: a line a case and side, and below them ratios where there is a peer."""
    head = f"{figures['device']}; a copy runs at {figures['copy_bytes_per_second'] / 1e9:,.1f} GB/s, read and written"
    if "peer" not in figures:
        return f"{head}\n\n{_times(figures)}"
    return f"{head}\n{figures['peer']}\n\n{_times(figures)}\n\n{_ratios(figures)}"


def _times(figures: dict[str, Any]) -> str:
    rows = [("", "batch", "context", "first token", "between tokens", "prefill", "decode", "of memory limit")]
    for name in ("ours", "transformers"):
        for f in figures.get(name, ()):
            times = (f"{f['first_token_seconds'] * 1e3:,.1f} ms", f"{f['between_tokens_seconds'] * 1e3:,.2f} ms")
            rates = (f"{f['prefill_tokens_per_second']:,.0f} tokens/s", f"{f['decode_tokens_per_second']:,.0f} tokens/s")
            limit = f"{f['of_memory_limit']:.1%}" if name == "ours" else ""
            rows.append((name, f"{f['batch']}", f"{f['context']}", *times, *rates, limit))
    return table(rows, "<>>>>>>>")


def _ratios(figures: dict[str, Any]) -> str:
    rows = [("ours / transformers", "batch", "context", "prefill", "decode", "generation", "equal tokens", "experts of transformers")]
    for ours, theirs in zip(figures["ours"], figures["transformers"], strict=True):
        ratios = (f"{ours[name] / theirs[name]:.2f}x" for name in ("prefill_tokens_per_second", "decode_tokens_per_second"))
        whole = f"{generation_seconds(theirs) / generation_seconds(ours):.2f}x"
        equal = f"{equal_share(ours['tokens'], theirs['tokens']):.1%}"
        rows.append(("", f"{ours['batch']}", f"{ours['context']}", *ratios, whole, equal, theirs["experts"]))
    return table(rows, "<>>>>>><")


def generation_seconds(case: dict[str, Any]) -> float:
    """Time from the prompts to their last new token."""
    new_tokens = len(case["tokens"][0])
    return case["first_token_seconds"] + (new_tokens - 1) * case["between_tokens_seconds"]


def equal_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of generated tokens before and at which both sides have said the same; after a first difference texts go their own ways."""
    import numpy as np

    return float(np.cumprod(np.array(ours) == np.array(theirs), axis=1).mean())
