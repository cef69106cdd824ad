"""Parses XLA's HLO text of a compiled program (`compiled.as_text()`), as hlo_costs.py needs it."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0, "tf32": 32, "c64": 64, "c128": 128}


class Leaf(NamedTuple):
    """An array: element type, dimensions, and the memory space of its layout (0: HBM)."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Bytes of the elements, without tile padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.match(r"(?:bf|f|s|u)(\d+)", self.dtype)
            bits = int(found[1]) if found else 0
        return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: result arrays, operand names and attributes."""

    name: str
    opcode: str
    leaves: tuple[Leaf, ...]
    operands: tuple[str, ...]
    inside: str  # text in the parentheses, such as a constant's value or a parameter's number
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """Returns the first group of a pattern in the attributes, or None."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the called computations: calls, to_apply, body, condition, branches."""
        single = re.findall(
            r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)",
            self.attributes,
        )
        branches = self.attribute(r"branch_computations=\{([^}]*)\}")
        return (*single, *re.findall(r"%?([\w.\-]+)", branches or ""))


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.inside): i for i in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each instruction, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    entry: str
    computations: dict[str, Computation]
    partitions: int  # devices that run it


_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


def parse(text: str) -> Module:
    """Parses `compiled.as_text()`. Raises ValueError if there is no entry computation."""
    computations: dict[str, Computation] = {}
    entry = root = name = ""
    instructions: dict[str, Instruction] = {}
    for line in _whole_lines(text):
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            name, instructions, root = head[2], {}, ""
            entry = name if head[1] else entry
        elif line == "}" and name:
            computations[name] = Computation(
                name, instructions, root or next(reversed(instructions))
            )
            name = ""
        elif name and (found := re.match(_INSTRUCTION, line)):
            instructions[found[2]] = _instruction(found[2], line[found.end() :])
            root = found[2] if found[1] else root
    if not entry:
        raise ValueError("this text is not an HLO module with an entry computation")
    count = re.search(r"\bnum_partitions=(\d+)", text[:200_000])
    return Module(entry, computations, int(count[1]) if count else 1)


def _whole_lines(text: str) -> Iterator[str]:
    """Yields lines, joining instructions that a kernel's metadata splits over several."""
    waiting = ""
    for line in text.splitlines():
        starts = line == "}" or line.endswith("{") or re.match(_INSTRUCTION, line)
        if waiting and not starts:
            waiting += line
            continue
        if waiting:
            yield waiting
        waiting = line
    yield waiting


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    opcode = rest[:opening]
    operands = () if opcode in ("constant", "parameter") else re.findall(r"%([\w.\-]+)", inside)
    return Instruction(name, opcode, leaves(shape), tuple(operands), inside, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def leaves(shape: str) -> tuple[Leaf, ...]:
    """Parses a shape's arrays, with tuples flattened."""
    found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", shape)
    return tuple(
        Leaf(
            dtype,
            tuple(int(size.lstrip("<=")) for size in dims.split(",") if size),
            int(space[1]) if (space := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for dtype, dims, layout in found
    )


def replica_groups(attributes: str, devices: int) -> list[list[int]] | None:
    """Parses the device groups of a collective; returns None for an unknown form.

    Known forms: {{0,1},{2,3}}; {} for one group of all; [2,4]<=[4,2]T(1,0); and
    mesh['x'=2,'y'=4] {'x'}, with devices numbered in row-major order.
    """
    if found := re.search(r"replica_groups=\{((?:\{[\d, ]*\},?)*)\}", attributes):
        groups = re.findall(r"\{([\d, ]*)\}", found[1])
        return [[int(d) for d in g.split(",")] for g in groups if g] or [list(range(devices))]
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, dims, axes = (
            [int(n) for n in part.split(",")] if part else None for part in found.groups()
        )
        assert shape is not None and dims is not None
        numbers = np.arange(math.prod(dims)).reshape(dims)
        return numbers.transpose(axes).reshape(shape).tolist()
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        named = re.findall(r"'([^']+)'", found[2])
        if ":(" in found[2] or not set(named) <= set(sizes):
            return None
        order = [n for n in sizes if n not in named] + named
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        numbers = numbers.transpose([list(sizes).index(n) for n in order])
        return numbers.reshape(-1, math.prod(sizes[n] for n in named)).tolist()
    return None


def source_targets(attributes: str) -> list[tuple[int, int]]:
    """Parses the (source, target) pairs of a collective-permute."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found[1] if found else "")
    return [(int(a), int(b)) for a, b in pairs]


# --- products ---------------------------------------------------------------------------


def flops(instruction: Instruction, inside: Computation) -> float:
    """Returns FLOPs of a dot or convolution, two per multiply-add; 0 for other instructions."""
    if instruction.opcode == "dot":
        return _product(instruction, inside, r"lhs_contracting_dims=\{([\d,]*)\}")
    if instruction.opcode == "convolution":
        return _convolution(instruction, inside)
    return 0.0


def library_flops(instruction: Instruction, inside: Computation) -> float:
    """Returns FLOPs of a cuBLAS call."""
    return _product(instruction, inside, r'"lhs_contracting_dimensions":\[([^\]]*)\]')


def _product(instruction: Instruction, inside: Computation, summed: str) -> float:
    """Returns FLOPs of a matrix product; `summed` is the pattern of the axes that it sums over."""
    lhs = inside.instructions[instruction.operands[0]].leaves[0].dims
    axes = instruction.attribute(summed) or ""
    depth = math.prod(lhs[int(axis)] for axis in re.findall(r"\d+", axes))
    return 2.0 * math.prod(instruction.leaves[0].dims) * depth


def _convolution(instruction: Instruction, inside: Computation) -> float:
    """Returns FLOPs of a convolution (XLA's products on TPU), without padding and dilation."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction
    lhs, rhs = (inside.instructions[name].leaves[0].dims for name in instruction.operands[:2])
    out = instruction.leaves[0].dims
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""

    def of(key: str, default: str) -> list[str]:
        found = re.search(rf"\b{key}=(\S+)", window)
        return found[1].split("x") if found else [default] * len(spatial)

    spatial = [label for label in labels[1] if label.isdigit()]
    size, stride = of("size", "1"), of("stride", "1")
    pad, lhs_dilate, rhs_dilate = of("pad", "0_0"), of("lhs_dilate", "1"), of("rhs_dilate", "1")
    pairs = 1
    for label in spatial:
        i = int(label)
        low = int(pad[i].partition("_")[0])
        base = (lhs[labels[1].index(label)] - 1) * int(lhs_dilate[i]) + 1
        pairs *= sum(
            0 <= at < base and at % int(lhs_dilate[i]) == 0
            for o in range(out[labels[3].index(label)])
            for k in range(int(size[i]))
            for at in (o * int(stride[i]) + k * int(rhs_dilate[i]) - low,)
        )
    batches = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    batch = lhs[labels[1].index("b")] // batches
    return 2.0 * pairs * batch * rhs[labels[2].index("i")] * rhs[labels[2].index("o")]


# --- loops ------------------------------------------------------------------------------


class Frame(NamedTuple):
    """A running computation and its caller."""

    computation: Computation
    argument: str | None  # name of a loop's initial tuple in `outer`
    outer: "Frame | None"


def trips(module: Module, loop: Instruction, frame: Frame) -> int | None:
    """Returns a loop's trip count; None if it depends on data."""
    if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = module.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
    compare = condition.instructions[condition.root]
    if compare.opcode == "fusion":  # operands in the fusion's order
        inner = module.computations[compare.called[0]]
        fused = inner.instructions[inner.root]
        numbers = [inner.instructions[name].inside for name in fused.operands]
        if not all(n.isdigit() for n in numbers):
            return None
        operands = [compare.operands[int(n)] for n in numbers]
        compare = dataclasses.replace(fused, operands=tuple(operands))
    direction = compare.attribute(r"direction=(\w+)")
    if compare.opcode != "compare" or direction not in ("LT", "GT"):
        return None
    inside = Frame(condition, loop.operands[0], frame)
    counter, bound = compare.operands if direction == "LT" else compare.operands[::-1]
    start, stop = constant(counter, inside), constant(bound, inside)
    if start is None or stop is None:
        return None
    place = condition.instructions[counter].attribute(r"index=(\d+)")
    body = module.computations[loop.attribute(r"body=%?([\w.\-]+)") or ""]
    return -(-max(0, stop - start) // (_step(body, int(place)) if place else 1))


def _step(body: Computation, place: int) -> int:
    """Returns the step of a loop's counter, an entry of its tuple; 2 if XLA unrolled it."""
    name, added = body.instructions[body.root].operands[place], 0
    while (found := body.instructions[name]).opcode in ("add", "copy", "bitcast"):
        numbers = [constant(operand, Frame(body, None, None)) for operand in found.operands]
        added += sum(number for number in numbers if number is not None)
        name = next((o for o, n in zip(found.operands, numbers, strict=True) if n is None), "")
        if not name:
            break
    return added or 1  # 1: the counter is inside a fusion


def constant(name: str, frame: Frame) -> int | None:
    """Returns an instruction's integer value, at the loop's start if it changes; else None."""
    found = frame.computation.instructions[name]
    if found.opcode == "constant":
        return int(found.inside) if re.fullmatch(r"-?\d+", found.inside) else None
    if found.opcode in ("copy", "copy-start", "copy-done", "bitcast", "reshape", "convert"):
        return constant(found.operands[0], frame)
    if found.opcode != "get-tuple-element":
        return None
    index = int(found.attribute(r"index=(\d+)") or -1)
    source = frame.computation.instructions[found.operands[0]]
    if source.opcode == "tuple":
        return constant(source.operands[index], frame)
    if source.opcode != "parameter" or frame.outer is None or frame.argument is None:
        return None
    given = frame.outer.computation.instructions[frame.argument]
    if given.opcode != "tuple":
        return None
    return constant(given.operands[index], frame.outer)
