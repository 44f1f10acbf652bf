"""Dynamic redundancy: a GPU hosts more experts than it runs, and which of them run is planned for every step (V3 sec. 3.4.1).

The report explores 16 hosted and 9 active experts a GPU: once the routers have spoken, and before tokens are dispatched, a
plan says which replicas are active and how many tokens each takes. The first `active` slots of a GPU are a static placement, so
a plan always exists; the others stand by. NumPy in and out. Loads are tokens of one step.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Num

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.placement import place_experts

SWEEPS = 6  # of the sharing below; more change the busiest GPU by less than 1 % at 256 experts on 32 GPUs


def host_experts(
    load: Num[np.ndarray, "l e"], hosted: int, active: int, groups: int, nodes: int, gpus: int
) -> Int[np.ndarray, "l gpus hosted"]:
    """Experts that each GPU hosts: the static placement of `active` a GPU, then those that stand by, on GPUs that have them not yet."""
    if not active <= hosted <= load.shape[1]:
        raise ConfigError("hosted", hosted, f"must lie between active = {active} and the {load.shape[1]} experts")
    static = place_experts(load, active * gpus, groups, nodes, gpus)
    rows = [
        _with_standby(row.reshape(gpus, active), counts, layer_load, hosted)
        for row, counts, layer_load in zip(static.physical_to_logical, static.replica_count, load.astype(np.float64), strict=True)
    ]
    return np.stack(rows)


def _with_standby(static: np.ndarray, counts: np.ndarray, load: np.ndarray, hosted: int) -> np.ndarray:
    """Fills slot after slot of all GPUs: each takes the expert with the most load a host among those it has not."""
    content, hosts = [list(row) for row in static], counts.astype(np.float64)
    for _ in range(hosted - static.shape[1]):
        for row in content:
            candidates = (load + 1e-9 * load.sum() + 1e-30) / hosts  # an expert without load still is better held twice than thrice
            candidates[row] = -1
            row.append(int(np.argmax(candidates)))
            hosts[row[-1]] += 1
    return np.array(content)


def plan_step(load: Num[np.ndarray, " e"], hosted: Int[np.ndarray, "gpus hosted"], active: int) -> Float[np.ndarray, "gpus hosted"]:
    """Tokens that every slot takes in this step, at most `active` slots of a GPU any: all tokens of all experts are taken.

    Every expert keeps one static slot, the one on the GPU with the least to do. The slots that are then left relieve the
    busiest GPU, one after the other. The busiest GPU ends with no more to do than with the static slots alone.
    """
    static = np.broadcast_to(np.arange(hosted.shape[1]) < active, hosted.shape)
    chosen = _one_slot_each(load, hosted, static)
    shares = share_tokens(load, hosted, chosen)
    while (slot := _relief(shares, hosted, chosen, active)) is not None:
        chosen[slot] = True
        shares = share_tokens(load, hosted, chosen, shares)
    return min(shares, share_tokens(load, hosted, static), key=lambda plan: plan.sum(1).max())


def _one_slot_each(load: np.ndarray, hosted: np.ndarray, static: np.ndarray) -> np.ndarray:
    chosen, busy = np.zeros(hosted.shape, bool), np.zeros(len(hosted))
    for expert in np.argsort(-load, kind="stable"):
        gpus, slots = np.nonzero((hosted == expert) & static)
        best = np.argmin(busy[gpus])
        chosen[gpus[best], slots[best]] = True
        busy[gpus[best]] += load[expert]
    return chosen


def _relief(shares: np.ndarray, hosted: np.ndarray, chosen: np.ndarray, active: int) -> tuple[int, int] | None:
    """The idle slot, on the least busy GPU that has room, of an expert of the busiest GPU; None where no expert of it can move."""
    busy = shares.sum(1)
    busiest = np.argmax(busy)
    moving = hosted[busiest][shares[busiest] > 0]
    running = (hosted[:, :, None] == np.where(chosen, hosted, -1)[:, None]).any(-1)  # this GPU runs a copy of the slot's expert
    useful = np.isin(hosted, moving) & ~running & (chosen.sum(1) < active)[:, None] & (busy < busy[busiest])[:, None]
    if not useful.any():
        return None
    gpu, slot = divmod(int(np.argmin(np.where(useful, busy[:, None], np.inf))), hosted.shape[1])
    return gpu, slot


def share_tokens(
    load: Num[np.ndarray, " e"],
    hosted: Int[np.ndarray, "gpus hosted"],
    slots: Bool[np.ndarray, "gpus hosted"],
    start: Float[np.ndarray, "gpus hosted"] | None = None,
) -> Float[np.ndarray, "gpus hosted"]:
    """Divides the tokens of every expert over its slots so that the busiest GPU has little to do.

    Experts in turn fill up the least busy of their GPUs, given what the others take. Each turn lowers the sum of squares of
    the GPUs' loads, whose minimum also has the smallest largest load; `SWEEPS` rounds come close to it. `start`: a sharing
    over fewer slots to go on from.
    """
    shares = np.zeros(hosted.shape) if start is None else start.copy()
    busy = shares.sum(1)
    places = [_one_a_gpu(*np.nonzero((hosted == expert) & slots)) for expert in range(len(load))]
    for sweep in range(SWEEPS):
        for expert in np.argsort(-np.asarray(load), kind="stable"):
            gpus, own = places[expert]
            if len(gpus) == 1 and (sweep or start is not None):  # nothing to divide
                continue
            others = busy[gpus] - shares[gpus, own]
            shares[gpus, own] = _fill(others, float(load[expert]))
            busy[gpus] = others + shares[gpus, own]
    return shares


def _one_a_gpu(gpus: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first = np.unique(gpus, return_index=True)[1]
    return gpus[first], slots[first]


def _fill(levels: np.ndarray, amount: float) -> np.ndarray:
    """What to add to each level so that the lowest ones become equal and `amount` is used up."""
    rising = np.sort(levels)
    surface = (np.cumsum(rising) + amount) / np.arange(1, len(levels) + 1)
    return np.maximum(surface.min() - levels, 0.0)
