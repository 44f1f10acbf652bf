"""Absorbed MLA decoding over a paged latent cache (V2 2405.04434 sec. 2.1.2; pages: 2309.06180).

All heads of a sequence attend over the same keys, `[c_kv ; k_r]`, whose first part are the values too, so every byte of
the cache is read once for up to 64 rows of (tokens x heads). `impl` is "reference" (plain JAX), "pallas" (the kernel for
Hopper GPUs) or "auto" (the kernel where there is a Hopper GPU). What the kernel cannot take raises `NotImplementedError`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.backend import sm_count, use_pallas
from pallas_kernels.mla_decode import reference
from pallas_kernels.mla_decode.sizes import DEFAULT, TILE, Sizes, TuningConfig
from pallas_kernels.mla_decode.splits import choose

MAX_TOKENS = 4


def mla_decode(
    q: Float[Array, "b t h w"],
    c_kv: Float[Array, "pages size r"],
    k_r: Float[Array, "pages size p"],
    table: Int32[Array, "b n"],
    lengths: Int32[Array, " b"],
    scale: float,
    scales: Float32[Array, "pages size tiles"] | None = None,
    impl: str = "auto",
) -> Float[Array, "b t h r"]:
    """`softmax(scale q [c_kv ; k_r]^T) c_kv` for the last t positions of each sequence, which are in the cache already.

    `q` is [q_c W_UK ; q_r], w = r + p wide. Page `table[b, i]` holds positions i * size to (i + 1) * size - 1 of sequence b;
    `lengths` counts positions with the t new ones, and query t sees those up to its own. What lies past the length, in pages or in
    the table, may be anything. A length of 0 gives zeros. `scales`: of an E4M3 `c_kv`, one for each position and 128 channels.
    """
    _check_queries(q, c_kv, k_r)
    if not use_pallas(impl):
        return reference.mla_decode(q, c_kv, k_r, table, lengths, scale, scales)
    reason = unsupported(q.shape[1], c_kv, k_r)
    if reason:
        raise NotImplementedError(f"{reason}; use impl='reference'")
    tiles = -(-q.shape[1] * q.shape[2] // TILE)
    splits = choose(len(lengths), tiles, c_kv.shape[-1], table.shape[1] * c_kv.shape[1], sm_count())
    return run(q, c_kv, k_r, table, lengths, scale, splits)


def run(
    q: Float[Array, "b t h w"],
    c_kv: Float[Array, "pages size r"],
    k_r: Float[Array, "pages size p"],
    table: Int32[Array, "b n"],
    lengths: Int32[Array, " b"],
    scale: float,
    splits: int,
    config: TuningConfig = DEFAULT,
) -> Float[Array, "b t h r"]:
    """The kernel, with positions cut into `splits` stretches whose results are then merged."""
    # Only here: Mosaic GPU takes a second to import, and on a CPU nobody calls it.
    from pallas_kernels.memory import whole_rows
    from pallas_kernels.mla_decode import hopper

    rows, tokens, heads, width = q.shape
    (_, page, rank), rope = c_kv.shape, k_r.shape[-1]
    sizes = Sizes(tokens, heads, rank, rope, page, splits, scale)
    queries = whole_rows(q.reshape(rows, tokens * heads, width), axis=1)
    partial, sums = hopper.attend(sizes, config, queries, c_kv.reshape(-1, rank), k_r.reshape(-1, rope), table, lengths)
    out = partial[0] if splits == 1 else merge(partial, sums)
    return out[:, : tokens * heads].reshape(rows, tokens, heads, rank).astype(q.dtype)


def merge(partial: Float32[Array, "s b m r"], sums: Float32[Array, "s b m"]) -> Float32[Array, "b m r"]:
    """Averages of stretches, weighted by their sums of exponentials, of which `sums` are the log2 (-inf where nothing was seen)."""
    weights = jnp.exp2(sums - jnp.maximum(sums.max(0), jnp.finfo(jnp.float32).min))
    weights /= jnp.maximum(weights.sum(0), jnp.finfo(jnp.float32).tiny)
    return jnp.sum(partial * weights[..., None], axis=0)


def unsupported(tokens: int, c_kv: Array, k_r: Array) -> str | None:
    """Why the kernel cannot take so many queries over this pool, whatever axes come before pages; None if it can."""
    (page, rank), rope, block = c_kv.shape[-2:], k_r.shape[-1], DEFAULT.block
    reasons = {
        f"c_kv: dtype {c_kv.dtype}: the Hopper kernel reads bfloat16 only": c_kv.dtype != jnp.bfloat16,
        f"q: {tokens} tokens of a sequence: the Hopper kernel takes 1 to {MAX_TOKENS}": not 1 <= tokens <= MAX_TOKENS,
        f"c_kv: {rank} columns: the Hopper kernel takes 256 or 512": rank not in (256, 512),
        f"k_r: {rope} columns: the Hopper kernel takes 64": rope != 64,
        f"pages of {page}: the Hopper kernel takes multiples of {block}": page % block != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _check_queries(q: Array, c_kv: Array, k_r: Array) -> None:
    if q.dtype != k_r.dtype:
        raise ValueError(f"q: dtype {q.dtype}, k_r has {k_r.dtype}; cast it")
    if q.shape[-1] != c_kv.shape[-1] + k_r.shape[-1]:
        raise ValueError(f"q: {q.shape[-1]} columns, c_kv and k_r have {c_kv.shape[-1]} and {k_r.shape[-1]}; pass [q_c W_UK ; q_r]")
