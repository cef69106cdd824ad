"""Costs of a compiled program on one device: FLOPs, HBM bytes and network bytes.

Counted from the compiled HLO text. Unlike XLA's cost_analysis(), a loop's body counts once per
iteration. Nothing is measured.

FLOPs: matrix products, and kernels with a CostEstimate; no elementwise work. HBM bytes: operands
and results of every instruction, only the slice for slices, without tile padding. Network: the
bytes that one device sends in a ring of n devices:

    all-gather          (n-1) * operand
    reduce-scatter      (n-1)/n * operand
    all-reduce          2 (n-1)/n * operand
    all-to-all          (n-1)/n * operand
    ragged-all-to-all   (n-1)/n * the smaller of operand and result; the larger one is a buffer for
                        twice the balanced load
    collective-permute  operand
"""

import dataclasses
import re
from collections.abc import Sequence

from finermoe_jax.analysis.causes import cause, op_name
from finermoe_jax.analysis.hlo import (
    Computation,
    Frame,
    Instruction,
    Leaf,
    Module,
    flops,
    library_flops,
    parse,
    replica_groups,
    source_targets,
    trips,
)

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# Instructions that move no data, or whose data is counted elsewhere.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "iota", "opt-barrier", "optimization-barrier", "add-dependency",
}  # fmt: skip
_FREE_TARGETS = {
    "AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding", "SliceId",
    "GatherScatterIndicesBitpacked", "AsyncCollectiveStart", "AsyncCollectiveDone",
    "ZeroCrop",
}  # fmt: skip
LARGEST = 100  # instructions that analyse() lists
_SLICES = ("dynamic-slice", "slice", "gather")
_STARTS = ("copy-start", "slice-start", "dynamic-slice-start")
_HOST = 5  # memory space


@dataclasses.dataclass
class Costs:
    """Costs per device and run of the program."""

    matmul_flops: float = 0.0
    kernel_flops: float = 0.0
    attention_flops: float = 0.0  # set by the caller: attention kernels report none
    hbm_bytes: float = 0.0
    sent_bytes: dict[str, float] = dataclasses.field(default_factory=dict)  # by collective
    crossing_bytes: dict[str, float] = dataclasses.field(default_factory=dict)  # between slices
    notes: list[str] = dataclasses.field(default_factory=list)
    bytes_by: dict[str, float] = dataclasses.field(default_factory=dict)  # by causes.Cause
    movers: dict[str, float] = dataclasses.field(default_factory=dict)  # by instruction

    @property
    def flops(self) -> float:
        """Sum of all FLOPs."""
        return self.matmul_flops + self.kernel_flops + self.attention_flops


def analyse(text: str, slices: Sequence[int] = (), fast_memory: bool = False) -> Costs:
    """Counts the costs of a compiled program.

    Args:
      text: `compiled.as_text()`.
      slices: slice index of each device, in the mesh's order; empty: a single slice.
      fast_memory: True if memory spaces other than 0 are on the chip (TPU).
    """
    walk = _Walk(parse(text), slices, fast_memory)
    entry = walk.module.computations[walk.module.entry]
    walk.run(Frame(entry, None, None), 1.0)
    walk.costs.notes = list(dict.fromkeys(walk.costs.notes))
    largest = sorted(walk.costs.movers.items(), key=lambda item: -item[1])
    walk.costs.movers = dict(largest[:LARGEST])
    return walk.costs


@dataclasses.dataclass
class Transfer:
    """A copy from host memory, and the work scheduled between its start and its end.

    Attributes:
      name: its start in the program.
      bytes: of the copy.
      times: runs per step, in a loop.
      flops: of products and kernels in between.
      hbm_bytes: HBM bytes in between.
    """

    name: str
    bytes: float
    times: float = 1.0
    flops: float = 0.0
    hbm_bytes: float = 0.0


@dataclasses.dataclass
class Overlap:
    """All transfers from host memory of a step, and the step's work beside them.

    Attributes:
      transfers: in the program's order.
      hbm_bytes: of the step.
      covered_bytes: of these, while at least one transfer is in flight.
      most_in_flight: most bytes that are in flight at once.
    """

    transfers: list[Transfer] = dataclasses.field(default_factory=list)
    hbm_bytes: float = 0.0
    covered_bytes: float = 0.0
    most_in_flight: float = 0.0

    @property
    def moved_bytes(self) -> float:
        """Bytes from host memory per step."""
        return sum(each.times * each.bytes for each in self.transfers)


def host_overlap(text: str) -> Overlap:
    """Lists the transfers from host memory (space 5) of a program compiled for a TPU."""
    module, found = parse(text), Overlap()

    def visit(frame: Frame, times: float) -> None:
        going: dict[str, Transfer] = {}
        walk, chains = _Walk(module, (), True), set[str]()
        for instruction in frame.computation.instructions.values():
            ended = [going.pop(n) for n in instruction.operands if n in going]
            if ended and not instruction.opcode.endswith("-done"):
                raise ValueError(f"{instruction.name} reads a transfer that has not ended")
            if instruction.opcode == "while":
                body = module.computations[instruction.attribute(r"body=%?([\w.\-]+)") or ""]
                count = trips(module, instruction, frame) or 1
                visit(Frame(body, instruction.operands[0], frame), times * count)
            walk.costs = Costs()
            walk.one(instruction, frame, 1.0, chains)
            if instruction.opcode != "while":
                found.hbm_bytes += times * walk.costs.hbm_bytes
                found.covered_bytes += times * walk.costs.hbm_bytes * bool(going)
            for transfer in going.values():
                transfer.flops += walk.costs.flops
                transfer.hbm_bytes += walk.costs.hbm_bytes
            if instruction.opcode in _STARTS:
                source = frame.computation.instructions[instruction.operands[0]].leaves[0]
                if source.space == _HOST:
                    moved = walk.moved(instruction)
                    going[instruction.name] = Transfer(instruction.name, moved.bytes, times)
                    found.transfers.append(going[instruction.name])
            flying = sum(transfer.bytes for transfer in going.values())
            found.most_in_flight = max(found.most_in_flight, flying)

    visit(Frame(module.computations[module.entry], None, None), 1.0)
    return found


class _Walk:
    def __init__(self, module: Module, slices: Sequence[int], fast_memory: bool):
        self.module, self.slices, self.fast = module, slices, fast_memory
        self.costs = Costs()

    # --- control flow -----------------------------------------------------------------------

    def run(self, frame: Frame, times: float) -> None:
        """Adds the costs of a computation that runs `times` times."""
        chains: set[str] = set()
        for instruction in frame.computation.instructions.values():
            self.one(instruction, frame, times, chains)

    def one(self, instruction: Instruction, frame: Frame, times: float, chains: set[str]) -> None:
        """Adds the costs of an instruction and of what it calls."""
        opcode = instruction.opcode
        if opcode == "while":
            self._loop(instruction, frame, times)
        elif opcode == "conditional":
            self._branches(instruction, frame, times)
        elif opcode == "call" or (opcode == "async-start" and instruction.called):
            for name in instruction.called:
                self.run(Frame(self.module.computations[name], None, None), times)
        else:
            self._count(instruction, frame.computation, times, chains)

    def _branches(self, instruction: Instruction, frame: Frame, times: float) -> None:
        self.costs.notes.append("conditionals count as their branch with the most HBM bytes")
        branches = []
        for name in instruction.called:
            walk = _Walk(self.module, self.slices, self.fast)
            walk.run(Frame(self.module.computations[name], None, None), times)
            branches.append(walk.costs)
        self._add(max(branches, key=lambda costs: (costs.hbm_bytes, costs.flops)))

    def _add(self, other: Costs) -> None:
        for field in dataclasses.fields(Costs):
            mine, theirs = getattr(self.costs, field.name), getattr(other, field.name)
            if isinstance(mine, dict):
                for key, value in theirs.items():
                    mine[key] = mine.get(key, 0.0) + value
            else:
                setattr(self.costs, field.name, mine + theirs)

    def _loop(self, loop: Instruction, frame: Frame, times: float) -> None:
        body = self.module.computations[loop.attribute(r"body=%?([\w.\-]+)") or ""]
        inner = Frame(body, loop.operands[0], frame)
        count = trips(self.module, loop, frame)
        if count is None:
            where = loop.attribute(r'op_name="([^"]*)"') or loop.name
            place = "/".join(part for part in where.split("/") if "(" not in part)
            self.costs.notes.append(
                f"a loop with a data-dependent trip count is not counted: {place}"
            )
            return
        self.run(inner, times * count)

    # --- one instruction --------------------------------------------------------------------

    def _count(
        self, instruction: Instruction, inside: Computation, times: float, chains: set[str]
    ) -> None:
        opcode, costs = instruction.opcode, self.costs
        kind = opcode.removesuffix("-start")
        if opcode.endswith("-done") or opcode.endswith("-update") or opcode in _FREE:
            return
        target = instruction.attribute(r'custom_call_target="([^"]+)"')
        if opcode == "custom-call" and target in _FREE_TARGETS:
            return
        if opcode in ("send", "recv"):
            self._between_slices(instruction, inside, times)
            return
        if kind in COLLECTIVES:
            self._collective(kind, instruction, inside, times)
        elif kind == "fusion":
            fused = self.module.computations[instruction.called[0]]
            self._fused(fused, times, chains)
            self._moves(instruction, inside, times, self._fusion_bytes(instruction, inside, fused))
            return
        elif opcode == "custom-call":
            self._kernel(target or "", instruction, inside, times)
            return
        costs.matmul_flops += times * flops(instruction, inside)
        self._moves(instruction, inside, times, self._plain_bytes(instruction, inside))

    def _moves(
        self, instruction: Instruction, inside: Computation, times: float, size: float
    ) -> None:
        """Adds HBM bytes of an instruction that runs `times` times, by their cause."""
        if not size:
            return
        moved, why = times * size, str(cause(instruction, inside, self.module))
        shapes = " ".join(f"{leaf.dtype}{list(leaf.dims)}" for leaf in instruction.leaves[:3])
        line = f"{why}: {times:g} x {instruction.name} {shapes} {op_name(instruction)[-80:]}"
        self.costs.hbm_bytes += moved
        for totals, key in ((self.costs.bytes_by, why), (self.costs.movers, line)):
            totals[key] = totals.get(key, 0.0) + moved

    def _kernel(
        self, target: str, instruction: Instruction, inside: Computation, times: float
    ) -> None:
        estimate = instruction.attribute(r'"cost_estimate":\{([^}]*)\}')
        if estimate:
            numbers = {k: float(v) for k, v in re.findall(r'"(\w+)":"?(\d+)', estimate)}
            self.costs.kernel_flops += times * numbers.get("flops", 0.0)
            self._moves(instruction, inside, times, numbers.get("bytes_accessed", 0.0))
            return
        if "cublas" in target:
            self.costs.matmul_flops += times * library_flops(instruction, inside)
        else:
            self.costs.notes.append(
                f"{target} has no CostEstimate: its operands and results are counted, its FLOPs "
                "are not"
            )
        self._moves(instruction, inside, times, self._plain_bytes(instruction, inside))

    def _collective(
        self, kind: str, instruction: Instruction, inside: Computation, times: float
    ) -> None:
        sent, crossing = self._sent(kind, instruction, inside)
        for totals, amount in (
            (self.costs.sent_bytes, sent),
            (self.costs.crossing_bytes, crossing),
        ):
            if amount:
                totals[kind] = totals.get(kind, 0.0) + times * amount

    def _between_slices(self, transfer: Instruction, inside: Computation, times: float) -> None:
        """Counts a TPU's send or recv: transfers between slices go through the hosts."""
        kind = transfer.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        if transfer.opcode == "recv" or kind is None:
            self._moves(transfer, inside, times, transfer.leaves[0].bytes)
            return
        kind = kind.lower().replace("_", "-")
        size = inside.instructions[transfer.operands[0]].leaves[0].bytes
        amount = _ring(kind, len(set(self.slices)), size) if kind in COLLECTIVES else size
        self.costs.crossing_bytes[kind] = self.costs.crossing_bytes.get(kind, 0.0) + times * amount
        self._moves(transfer, inside, times, size)

    def _sent(
        self, kind: str, instruction: Instruction, inside: Computation
    ) -> tuple[float, float]:
        """Returns the bytes that a device sends inside its slice and to other slices."""
        operands = [inside.instructions[name] for name in instruction.operands]
        size = sum((leaf.bytes for operand in operands for leaf in operand.leaves), 0.0)
        if kind == "collective-permute":
            pairs = [(a, b) for a, b in source_targets(instruction.attributes) if a != b]
            crosses = any(self._slice(a) != self._slice(b) for a, b in pairs)
            size = operands[0].leaves[0].bytes if pairs else 0.0
            return (0.0, size) if crosses else (size, 0.0)
        if kind == "ragged-all-to-all":
            self.costs.notes.append(
                "ragged-all-to-all is counted at balanced load, not at its buffers' full size"
            )
            size = min(operand.leaves[0].bytes for operand in operands[:2])
        groups = replica_groups(instruction.attributes, self.module.partitions)
        if groups is None:
            self.costs.notes.append(
                f"{kind} has replica groups of an unknown form and is counted over all devices"
            )
            groups = [list(range(self.module.partitions))]
        parts = len(groups[0])
        spanned = max(len({self._slice(d) for d in group}) for group in groups)
        if spanned == 1:
            return _ring(kind, parts, size), 0.0
        # Hierarchical: between slices each device sends only its own part of the data, the rest
        # stays inside the slice.
        near = parts // spanned
        match kind:
            case "all-reduce" | "reduce-scatter":
                return _ring(kind, near, size), _ring(kind, spanned, size / near)
            case "all-gather":
                return _ring(kind, near, size * spanned), _ring(kind, spanned, size)
        away = (parts - near) / parts * size
        return max(0.0, _ring(kind, parts, size) - away), away

    def _slice(self, device: int) -> int:
        single = self.module.partitions < len(self.slices)  # the program covers one slice
        return 0 if single or not self.slices else self.slices[device]

    # --- fusions ----------------------------------------------------------------------------

    def _fused(self, fused: Computation, times: float, chains: set[str]) -> None:
        """Counts products and collectives in a fusion; TPU fusions of one share a chain_id."""
        for instruction in fused.instructions.values():
            self.costs.matmul_flops += times * flops(instruction, fused)
            if instruction.opcode == "fusion":
                self._fused(self.module.computations[instruction.called[0]], times, chains)
            elif (kind := instruction.opcode.removesuffix("-start")) in COLLECTIVES:
                chain = instruction.attribute(r'chain_id="([^"]+)"')
                if chain is not None and chain in chains:
                    continue
                chains.add(chain or instruction.name)
                moved = self._plain_bytes(instruction, fused)
                if fused.name.startswith("all-reduce-scatter"):
                    # On TPU a reduce-scatter is an all-reduce whose fusion keeps a slice.
                    kind, moved = "reduce-scatter", moved - self._bytes(instruction)
                self._collective(kind, instruction, fused, times)
                self._moves(instruction, fused, times, moved)

    def _fusion_bytes(self, fusion: Instruction, inside: Computation, fused: Computation) -> float:
        total = 0.0
        for number, name in enumerate(fusion.operands):
            leaves = inside.instructions[name].leaves
            if number in fused.parameters and any(self._slow(leaf.space) for leaf in leaves):
                total += self._read(fused.parameters[number], fused)
        root = fused.instructions[fused.root]
        results = root.operands if root.opcode == "tuple" else (fused.root,)
        for name in results:
            result = fused.instructions[name]
            while result.opcode == "bitcast":
                result = fused.instructions[result.operands[0]]
            if result.opcode == "parameter" or result.opcode in COLLECTIVES:
                continue  # passed through, or counted as a collective
            if result.opcode == "custom-call" and "AsyncCollective" in result.attributes:
                continue
            if result.opcode == "dynamic-update-slice":
                update = fused.instructions[result.operands[1]].leaves[0]
                total += update.bytes * self._slow(result.leaves[0].space)
            else:
                total += self._bytes(result)
        return total

    def _read(self, parameter: Instruction, fused: Computation) -> float:
        """Returns the bytes of a parameter that a fusion reads: only the slices if it slices it."""
        whole = sum((leaf.bytes for leaf in parameter.leaves), 0.0)
        read, waiting, seen = 0.0, [parameter.name], set()
        while waiting:
            name = waiting.pop()
            for user in fused.users[name]:
                if user.name in seen:
                    continue
                seen.add(user.name)
                if user.opcode == "bitcast":
                    waiting.append(user.name)
                elif user.opcode in _SLICES and user.operands[0] == name:
                    read += sum(leaf.bytes for leaf in user.leaves)
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    continue
                elif user.opcode == "fusion":
                    inner = self.module.computations[user.called[0]]
                    for number, operand in enumerate(user.operands):
                        if operand == name and _is_bitcast(inner, number):
                            waiting.append(user.name)
                        elif operand == name:
                            read += self._read(inner.parameters[number], inner)
                elif user.opcode in COLLECTIVES or user.opcode in ("tuple", "custom-call"):
                    continue
                else:
                    return whole
        return min(read, whole)

    # --- bytes ------------------------------------------------------------------------------

    def moved(self, start: Instruction) -> Leaf:
        """Returns what a copy or slice that `start` begins writes."""
        return start.leaves[-2] if start.opcode != "copy-start" else start.leaves[0]

    def _slow(self, space: int) -> bool:
        return space == 0 or not self.fast

    def _bytes(self, instruction: Instruction) -> float:
        return sum((leaf.bytes for leaf in instruction.leaves if self._slow(leaf.space)), 0.0)

    def _plain_bytes(self, instruction: Instruction, inside: Computation) -> float:
        """Returns HBM bytes of operands and results of an instruction other than a fusion."""
        operands = [inside.instructions[name] for name in instruction.operands]
        opcode = instruction.opcode
        if opcode in _STARTS:
            moved = self.moved(instruction)
            reads = self._slow(operands[0].leaves[0].space)
            return moved.bytes * (reads + self._slow(moved.space))
        if opcode in _SLICES:
            size = self._bytes(instruction)
            reads = self._slow(operands[0].leaves[0].space)
            taken = sum(leaf.bytes for leaf in instruction.leaves)
            return size + taken * reads + sum(map(self._bytes, operands[1:]))
        if opcode == "dynamic-update-slice":
            return 2 * operands[1].leaves[0].bytes * self._slow(instruction.leaves[0].space)
        if opcode == "scatter":
            return 3 * self._bytes(operands[-1]) + self._bytes(operands[len(operands) // 2])
        read = sum(map(self._bytes, operands), 0.0)
        if opcode.removesuffix("-start") in COLLECTIVES and opcode.endswith("-start"):
            # The result includes the operands.
            return read + max(0.0, self._bytes(instruction) - read)
        return read + self._bytes(instruction)


def _is_bitcast(fused: Computation, number: int) -> bool:
    """Returns True if a fusion only renames its parameter, as around a product's operands."""
    root = fused.instructions[fused.root]
    while root.opcode == "bitcast":
        root = fused.instructions[root.operands[0]]
    return root is fused.parameters.get(number)


def _ring(kind: str, parts: int, size: float) -> float:
    """Returns the bytes that one of `parts` devices sends; `size`: bytes of its operand."""
    factor = {"all-gather": parts, "all-reduce": 2}.get(kind, 1)
    return factor * (parts - 1) / parts * size
