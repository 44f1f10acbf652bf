"""Reads compiled HLO text, `compiled.as_text()`: its computations, which calls which and how often, what depends on what."""

import dataclasses
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)
}
_HEADER = re.compile(r"^(?:ENTRY )?%?(?P<name>[^\s(]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?(?P<name>\S+) = (?P<rest>.*)$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([^\s,}]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def arrays(self) -> list[tuple[str, int]]:
        """Dtype and number of elements of each array of its result."""
        return [(dtype, _product(sizes)) for dtype, sizes in _ARRAY.findall(self.shape)]

    @property
    def bytes(self) -> int:
        """Bytes of its result. Raises KeyError for a dtype that is not known here."""
        return sum(_BITS[dtype] * elements for dtype, elements in self.arrays) // 8

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        return [name.strip().lstrip("%") for one, many in _CALLED.findall(self.attributes) for name in (many.split(",") if many else [one])]


@dataclasses.dataclass(frozen=True)
class Program:
    """A module's computations by name, each in the order of its text, which is the schedule where the module has one."""

    computations: dict[str, list[Instruction]]
    entry: str

    def executions(self) -> dict[str, int]:
        """How often each computation runs. A loop whose trip count XLA does not know counts once; of a conditional every branch counts."""
        times: dict[str, int] = {}

        def visit(name: str, count: int) -> None:
            times[name] = times.get(name, 0) + count
            for instruction in self.computations[name]:
                trips = _TRIPS.search(instruction.attributes) if instruction.opcode == "while" else None
                for called in instruction.called:
                    visit(called, count * int(trips.group(1)) if trips else count)

        visit(self.entry, 1)
        return times

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """Every instruction, with the name of its computation."""
        for name, lines in self.computations.items():
            yield from ((name, line) for line in lines)


def parse(text: str) -> Program:
    """The program of a module's text. Raises ValueError when there is no entry computation in it."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        header, instruction = _HEADER.match(line), _LINE.match(line)
        if header:
            lines = computations[header["name"]] = []
            entry = header["name"] if line.startswith("ENTRY") else entry
        elif instruction and computations:
            lines.append(_instruction(instruction["name"], re.sub(r"/\*.*?\*/", "", instruction["rest"])))
    if not entry:
        raise ValueError("this is no text of a compiled module: it has no ENTRY computation")
    return Program(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opening = rest.index("(", end)
    closing = _closing(rest, opening)
    operands = tuple(re.findall(r"%([^\s,)]+)", rest[opening:closing]))
    return Instruction(name, rest[:end], rest[end:opening].strip(), operands, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis at `opening` is closed."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"a parenthesis is not closed: {text}")


def _product(sizes: str) -> int:
    product = 1
    for size in filter(None, sizes.split(",")):
        product *= int(size)
    return product


def depends_on(lines: list[Instruction]) -> dict[str, set[str]]:
    """For each instruction of a computation all those of it that its result is made from."""
    sources: dict[str, set[str]] = {}
    for line in lines:  # operands come before their users
        sources[line.name] = set(line.operands).union(*(sources.get(name, set()) for name in line.operands))
    return sources
