"""What a compiled program sends between devices: every collective, along which mesh axes, how many bytes, how often.

Bytes are those that one device sends, as the fastest algorithm does, for groups of g devices: (g - 1) / g of an all-to-all's
or an all-gather's result, (g - 1) / g of a reduce-scatter's operand, twice that of an all-reduce. A byte counts for
the outermost mesh axis that its sender and its receiver differ in, so bytes between devices of a node are `gpu` alone.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.bench.hlo import Instruction, Program

KINDS = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str  # one of KINDS
    dtype: str  # of its largest array
    axes: tuple[str, ...]  # that the devices of its groups differ in
    sent: dict[str, float]  # bytes that a device sends each time, by mesh axis
    times: int  # in one run of the program; see `Program.executions`
    source: str  # the operation of the traced program


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives of a program that was compiled for a mesh of these sizes, whose axes are given outermost first."""
    times = program.executions()
    return [
        _collective(start, done, mesh, times[name])
        for name, lines in program.computations.items()
        if name in times
        for start, done in pairs(lines)
    ]


def pairs(lines: list[Instruction]) -> list[tuple[Instruction, Instruction]]:
    """The collectives of a computation: where each starts and where it is done, the same instruction where it is not asynchronous."""
    done = {line.operands[0]: line for line in lines if line.opcode.endswith("-done")}
    return [(line, done.get(line.name, line)) for line in lines if line.opcode.removesuffix("-start") in KINDS]


def _collective(start: Instruction, done: Instruction, mesh: Mapping[str, int], times: int) -> Collective:
    kind, groups = start.opcode.removesuffix("-start"), device_groups(start.attributes, mesh)
    if kind == "collective-permute":  # a list of senders and receivers
        peers, block = _peers(groups[:, 0], groups[:, 1], mesh), float(done.bytes)
    else:
        factor = {"reduce-scatter": groups.shape[1], "all-reduce": 2}.get(kind, 1)
        peers, block = _peers(groups[:, :, None], groups[:, None], mesh), factor * done.bytes / groups.shape[1]
    operation = re.search(r'op_name="([^"]*)"', start.attributes)
    dtype = max(done.arrays, key=lambda array: array[1])[0]
    sent = {axis: count * block for axis, count in peers.items()}
    return Collective(kind, dtype, tuple(peers), sent, times, operation.group(1) if operation else "")


def device_groups(attributes: str, mesh: Mapping[str, int]) -> Int[np.ndarray, "groups size"]:
    """Devices that exchange with each other, numbered along the mesh, its last axis fastest. Raises ValueError for a form not known."""
    numbers = np.arange(math.prod(mesh.values()))
    if named := _NAMED.search(attributes):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
        along = re.findall(r"'(\w+)'", named.group(2))
        order = [list(sizes).index(axis) for axis in [*(a for a in sizes if a not in along), *along]]
        return numbers.reshape(tuple(sizes.values())).transpose(order).reshape(-1, math.prod(sizes[axis] for axis in along))
    if iota := _IOTA.search(attributes):
        shape, bounds, axes = (tuple(map(int, filter(None, (part or "").split(",")))) for part in iota.groups())
        return numbers.reshape(bounds).transpose(axes or range(len(bounds))).reshape(shape)
    if listed := _LISTED.search(attributes):
        return np.array([list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed.group(1))])
    raise ValueError(f"replica groups in a form that is not known: {attributes[:200]}")


def _peers(senders: np.ndarray, receivers: np.ndarray, mesh: Mapping[str, int]) -> dict[str, float]:
    """Receivers of a device, a mean over all, by the outermost axis in which they differ from it."""
    sizes = tuple(mesh.values())
    differ = np.stack([a != b for a, b in zip(np.unravel_index(senders, sizes), np.unravel_index(receivers, sizes), strict=True)], -1)
    outermost = differ & (differ.cumsum(-1) == 1)
    counts = outermost.reshape(-1, len(sizes)).sum(0) / math.prod(sizes)
    return {axis: float(count) for axis, count in zip(mesh, counts, strict=True) if count}


def totals(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Bytes that a device sends in one run of the program, by kind and mesh axis."""
    sums: dict[str, dict[str, float]] = {}
    for one in found:
        for axis, sent in one.sent.items():
            of_kind = sums.setdefault(one.kind, {})
            of_kind[axis] = of_kind.get(axis, 0.0) + one.times * sent
    return sums


class Hidden(NamedTuple):
    """How many all-to-alls of a program are asynchronous, and how many of these have matrix products between start and done."""

    all: int
    started: int
    beside_products: int
    beside_other_pass: int  # products of a backward pass for one of a forward pass, or the reverse: DualPipe's overlapped pairs


def hidden(program: Program, kind: str = "all-to-all") -> Hidden:
    """What the order of a scheduled program lets run beside its all-to-alls; each is counted once, however often a loop runs it."""
    counts = np.zeros(4, int)
    for lines in program.computations.values():
        position = {line.name: i for i, line in enumerate(lines)}
        for start, done in pairs(lines):
            if start.opcode.removesuffix("-start") == kind:
                between = lines[position[start.name] + 1 : position[done.name]]
                beside = {_pass_of(line) for line in between if is_product(line, program)}
                others = beside - {_pass_of(start), ""}
                counts += 1, done is not start, bool(beside), bool(_pass_of(start) and others)
    return Hidden(*counts.tolist())


def _pass_of(line: Instruction) -> str:
    """The pass of a pipeline's tick that an instruction belongs to: "forward", "backward", or "" outside of both."""
    found = re.search(r'op_name="[^"]*jit\(_(forward|backward)\)', line.attributes)
    return found.group(1) if found else ""


def is_product(line: Instruction, program: Program) -> bool:
    """Whether an instruction is a matrix product, or has one inside."""
    if line.opcode in ("dot", "convolution") or "gemm" in line.attributes or "cublas" in line.attributes:
        return True
    return any(is_product(inner, program) for name in line.called for inner in program.computations[name])
