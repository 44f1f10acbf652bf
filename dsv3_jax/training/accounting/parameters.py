"""Parameters of a model, by section and part: counted from the shapes that `init` fills and not from a formula."""

import functools
import math
from collections import Counter
from typing import NamedTuple

import jax

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.init import parameter_shapes

# Top-level entries of the parameters, in the order that a token meets them.
SECTIONS = ("embed", "dense", "moe", "norm", "lm_head", "mtp")
# Names on the path of a parameter, and the part that the first of them puts it in; scales are "norms" wherever they are.
_PARTS = {
    "embed": "embedding",
    "lm_head": "output head",
    "eh_proj": "input projection",
    "self_attn": "attention",
    "router": "router",
    "shared_experts": "shared experts",
    "experts": "routed experts",
    "mlp": "feed-forward",
}
_ORDER = (*_PARTS.values(), "norms")


class Part(NamedTuple):
    """Parameters of one part of all layers of a kind."""

    section: str  # one of SECTIONS
    name: str  # one of _ORDER
    layers: int
    parameters: int  # all layers together
    activated: int  # of these, the parameters that work on a token


class ParameterCounts(NamedTuple):
    """`total` and `activated` are of the main model; `mtp` leaves out the embedding and head that it shares."""

    total: int
    activated: int
    mtp: int


@functools.cache
def parameter_parts(model: ModelConfig) -> tuple[Part, ...]:
    """Every parameter of the main model and the MTP modules, by section and part."""
    counts: Counter[tuple[str, str]] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(model)):
        names = [entry.key for entry in path]
        counts[names[0], _part_name(names)] += math.prod(leaf.shape)
    ordered = sorted(counts.items(), key=lambda item: (SECTIONS.index(item[0][0]), _ORDER.index(item[0][1])))
    return tuple(
        Part(section, name, layers_of(model)[section], count, _activated(model, name, count)) for (section, name), count in ordered
    )


def _part_name(names: list[str]) -> str:
    if names[-1] in ("scale", "norm"):
        return "norms"
    return next(part for name, part in _PARTS.items() if name in names)


def _activated(model: ModelConfig, part: str, parameters: int) -> int:
    return parameters // model.n_routed_experts * model.num_experts_per_tok if part == "routed experts" else parameters


def layers_of(model: ModelConfig) -> dict[str, int]:
    """How many layers each section has."""
    stacks = {"dense": model.num_dense_layers, "moe": model.num_moe_layers, "mtp": model.num_nextn_predict_layers}
    return {section: stacks.get(section, 1) for section in SECTIONS}


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Counts as the report states them: both embedding and head are activated, and only the picked experts."""
    parts = parameter_parts(model)
    main = [part for part in parts if part.section != "mtp"]
    mtp = sum(part.parameters for part in parts if part.section == "mtp")
    return ParameterCounts(sum(part.parameters for part in main), sum(part.activated for part in main), mtp)
