"""Redundant experts: which expert each slot of each GPU holds, from measured loads (V3 sec. 3.4.1, 3.4.2).

A slot holds one *physical* expert, a copy (replica) of a *logical* one. The heaviest experts get the spare slots, and
the slots are packed so that GPUs carry equal loads; the tokens of an expert divide evenly over its replicas. Where the
routing groups divide by the nodes the packing is hierarchical: a group stays on one node, whole, so that node-limited
routing keeps its limit. Otherwise any expert may lie anywhere (global). NumPy in and out; the same input gives the same placement.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.optimize import linear_sum_assignment

from dsv3_jax.config import ConfigError


class Replicas(NamedTuple):
    """Where experts lie, one row a layer. Slots go GPU by GPU, `slots / gpus` each."""

    physical_to_logical: Int[np.ndarray, "l slots"]
    logical_to_physical: Int[np.ndarray, "l e most"]  # slots of each expert, ascending; -1 after the last
    replica_count: Int[np.ndarray, "l e"]


class _Shape(NamedTuple):
    slots: int
    groups: int
    nodes: int
    gpus: int


def place_experts(load: Num[np.ndarray, "l e"], replicas: int, groups: int, nodes: int, gpus: int) -> Replicas:
    """Places `replicas` physical experts on `gpus` GPUs of `nodes` nodes; `load` is in any unit.

    No layer is balanced worse than with every expert held once, in order. Raises ConfigError for sizes that do not divide.
    """
    shape = _checked_shape(load, replicas, groups, nodes, gpus)
    return index_replicas(np.stack([_place_layer(row, shape) for row in load.astype(np.float64)]), load.shape[1])


def replace_experts(
    load: Num[np.ndarray, "l e"], current: Int[np.ndarray, "l slots"], groups: int, nodes: int, gpus: int, threshold: float
) -> Replicas:
    """A new placement that moves little: a layer stays as in `current` (physical to logical) unless that pays.

    It pays when the imbalance falls by more than the share `threshold` of itself, and always where `current` breaks the
    hierarchy, that is where the groups divide by the nodes and one of them spans nodes. Nodes, GPUs and slots of a layer that does
    change are then named so that the fewest slots have to load another expert.
    """
    fresh = place_experts(load, current.shape[1], groups, nodes, gpus).physical_to_logical
    before, after = (imbalance(load, placed, gpus) for placed in (current, fresh))
    nodes = nodes if groups % nodes == 0 else 1
    pays = (after < before * (1 - threshold)) | _spans_nodes(current // (load.shape[1] // groups), nodes)
    rows = [
        _aligned(new.reshape(nodes, gpus // nodes, -1), old.reshape(nodes, gpus // nodes, -1)) if moves else old
        for new, old, moves in zip(fresh, current, pays, strict=True)
    ]
    return index_replicas(np.stack(rows), load.shape[1])


def index_replicas(physical_to_logical: Int[np.ndarray, "l slots"], experts: int) -> Replicas:
    """The other two tables of a placement. Raises ConfigError when an expert has no slot, or a slot no expert."""
    if physical_to_logical.min() < 0 or physical_to_logical.max() >= experts:
        raise ConfigError("physical_to_logical", int(physical_to_logical.max()), f"experts are numbered 0 to {experts - 1}")
    counts = np.stack([np.bincount(row, minlength=experts) for row in physical_to_logical])
    if not counts.all():
        layer, expert = np.argwhere(counts == 0)[0]
        raise ConfigError("physical_to_logical", f"layer {layer}", f"expert {expert} has no slot; every expert needs one")
    table = np.full((*counts.shape, counts.max()), -1)
    for layer, row in enumerate(physical_to_logical):
        order = np.argsort(row, kind="stable")
        number = np.arange(len(row)) - np.repeat(np.cumsum(counts[layer]) - counts[layer], counts[layer])
        table[layer, row[order], number] = order
    return Replicas(physical_to_logical, table, counts)


def gpu_loads(load: Num[np.ndarray, "l e"], physical_to_logical: Int[np.ndarray, "l slots"], gpus: int) -> Float[np.ndarray, "l gpus"]:
    """Load of each GPU, in the unit of `load`, when the tokens of an expert divide evenly over its replicas."""
    counts = index_replicas(physical_to_logical, load.shape[1]).replica_count
    share = np.take_along_axis(load / counts, physical_to_logical, axis=1)
    return share.reshape(len(load), gpus, -1).sum(-1)


def imbalance(load: Num[np.ndarray, "l e"], physical_to_logical: Int[np.ndarray, "l slots"], gpus: int) -> Float[np.ndarray, " l"]:
    """Load of the busiest GPU over the mean: 1 is perfect. A layer without load counts as balanced."""
    return busiest_over_mean(gpu_loads(load, physical_to_logical, gpus))


def busiest_over_mean(loads: Float[np.ndarray, "*l gpus"]) -> Float[np.ndarray, "*l"]:
    """Imbalance of loads that are already those of GPUs."""
    mean = loads.mean(-1)
    return np.where(mean > 0, loads.max(-1) / np.where(mean > 0, mean, 1), 1.0)


def plain_loads(load: Num[np.ndarray, "l e"], groups: int, nodes: int, gpus: int) -> Float[np.ndarray, "l gpus"]:
    """Load of each GPU when every expert is held once, in order; GPUs beyond the experts hold none."""
    nodes = nodes if groups % nodes == 0 else 1
    home = np.zeros((gpus, load.shape[1]))
    for gpu, experts in enumerate(_homes(load.shape[1], nodes, gpus)):
        home[gpu, experts] = 1
    return load @ home.T


def plain_imbalance(load: Num[np.ndarray, "l e"], groups: int, nodes: int, gpus: int) -> Float[np.ndarray, " l"]:
    """`imbalance` without redundant experts."""
    return busiest_over_mean(plain_loads(load, groups, nodes, gpus))


def moved_slots(old: Int[np.ndarray, "l slots"], new: Int[np.ndarray, "l slots"]) -> Int[np.ndarray, " l"]:
    """Slots of each layer that have to load another expert."""
    return (old != new).sum(1)


def replicate(load: Float[np.ndarray, " e"], slots: int) -> Int[np.ndarray, " e"]:
    """Replicas of each expert: one, and every slot that is left goes to the one with the most load a replica."""
    counts = np.ones(len(load), np.int64)
    for _ in range(slots - len(load)):
        counts[np.argmax(load / counts)] += 1
    return counts


def pack(weights: Float[np.ndarray, " n"], bins: int) -> Int[np.ndarray, "bins m"]:
    """Items of each bin, equally many in all: the heaviest item first, each into the lightest bin with room."""
    total, content = np.zeros(bins), np.zeros((bins, len(weights) // bins), np.int64)
    filled = np.zeros(bins, np.int64)
    for item in np.argsort(-weights, kind="stable"):
        target = np.argmin(np.where(filled < content.shape[1], total, np.inf))
        content[target, filled[target]] = item
        filled[target] += 1
        total[target] += weights[item]
    return content


def _place_layer(load: np.ndarray, shape: _Shape) -> np.ndarray:
    # Greedy packing can lose to a layout that happens to fit; the plain one is the promise of place_experts.
    candidates = [_packed(load, shape), _plain(load, shape)]
    return min(candidates, key=lambda slots: imbalance(load[None], slots[None], shape.gpus)[0])


def _packed(load: np.ndarray, shape: _Shape) -> np.ndarray:
    groups = np.arange(len(load)).reshape(shape.groups, -1)
    nodes = pack(load[groups].sum(1), shape.nodes)
    return np.concatenate([_pack_node(load, groups[np.sort(own)].ravel(), shape) for own in nodes])


def _pack_node(load: np.ndarray, experts: np.ndarray, shape: _Shape) -> np.ndarray:
    counts = replicate(load[experts], shape.slots // shape.nodes)
    copies, weights = np.repeat(experts, counts), np.repeat(load[experts] / counts, counts)
    return np.sort(copies[pack(weights, shape.gpus // shape.nodes)], axis=1).ravel()


def _plain(load: np.ndarray, shape: _Shape) -> np.ndarray:
    """Every expert at home, spare slots filled with more copies of a GPU's own; a GPU without any takes from the heaviest of its node."""
    slots = np.zeros((shape.gpus, shape.slots // shape.gpus), np.int64)
    homes = _homes(len(load), shape.nodes, shape.gpus)
    for gpu, own in enumerate(homes):
        node = np.split(np.arange(len(load)), shape.nodes)[gpu * shape.nodes // shape.gpus]
        slots[gpu] = np.sort(np.resize(own if len(own) else node[np.argmax(load[node])], slots.shape[1]))
    return slots.ravel()


def _homes(experts: int, nodes: int, gpus: int) -> list[np.ndarray]:
    """Experts of each GPU when each is held once, in order, node by node."""
    homes = []
    for own in np.split(np.arange(experts), nodes):
        each = -(-len(own) // (gpus // nodes))
        homes += [own[each * i : each * (i + 1)] for i in range(gpus // nodes)]
    return homes


def _spans_nodes(group_of_slot: np.ndarray, nodes: int) -> np.ndarray:
    """Whether a group of the layer lies on more than one node."""
    homes = group_of_slot.reshape(len(group_of_slot), nodes, -1)
    present = np.stack([(homes == group).any(-1).sum(-1) for group in range(group_of_slot.max() + 1)])
    return (present > 1).any(0)


def _aligned(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Slots of `new` [nodes, gpus, slots] with nodes, GPUs of a node and slots of a GPU in the order that agrees most with `old`."""
    nodes, gpus, slots = new.shape
    kept = _common(old.reshape(-1, slots), new.reshape(-1, slots)).reshape(nodes, gpus, nodes, gpus).swapaxes(1, 2)
    matchings = np.array([[_matching(pair) for pair in row] for row in kept])  # [old node, new node, old GPU]
    # A pair of nodes is worth what can stay on its GPUs; the experts that the whole nodes share may all lie on other GPUs.
    node_of = _matching(np.take_along_axis(kept, matchings[..., None], axis=3).sum((2, 3)))
    named = np.concatenate([new[node][matchings[place, node]] for place, node in enumerate(node_of)])
    return np.concatenate([_in_old_slots(*pair) for pair in zip(named, old.reshape(-1, slots), strict=True)])


def _common(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """How many experts each GPU of `old` shares with each of `new`, copies counted."""
    experts = max(new.max(), old.max()) + 1
    contents = [np.stack([np.bincount(row, minlength=experts) for row in rows]) for rows in (old, new)]
    return np.minimum(contents[0][:, None], contents[1][None]).sum(-1)


def _matching(kept: np.ndarray) -> np.ndarray:
    """For each row the column that takes its place, so that the most is kept."""
    return linear_sum_assignment(kept, maximize=True)[1]


def _in_old_slots(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """The experts of one GPU, each in its old slot where it had one."""
    left, slots = list(new), np.full(len(old), -1)
    for slot, expert in enumerate(old):
        if expert in left:
            left.remove(expert)
            slots[slot] = expert
    slots[slots < 0] = left
    return slots


def _checked_shape(load: np.ndarray, replicas: int, groups: int, nodes: int, gpus: int) -> _Shape:
    experts = load.shape[1]
    for field, value in (("replicas", replicas), ("groups", groups), ("nodes", nodes), ("gpus", gpus)):
        if value < 1:
            raise ConfigError(field, value, "must be at least 1")
    if not np.isfinite(load).all() or load.min() < 0:
        raise ConfigError("load", float(load.min()), "loads must be finite and not negative")
    if replicas < experts:
        raise ConfigError("replicas", replicas, f"is fewer than the {experts} experts; each needs a slot")
    if replicas % gpus:
        raise ConfigError("replicas", replicas, f"must be a multiple of gpus = {gpus}: every GPU has equally many slots")
    if gpus % nodes:
        raise ConfigError("gpus", gpus, f"must be a multiple of nodes = {nodes}")
    if experts % groups:
        raise ConfigError("groups", groups, f"must divide the {experts} experts")
    return _Shape(replicas, groups, nodes, gpus) if groups % nodes == 0 else _Shape(replicas, 1, 1, gpus)
