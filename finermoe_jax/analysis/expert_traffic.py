"""HBM bytes of the experts' weights in a compiled program, compared with their minimum.

At the minimum, the forward pass reads each expert's weights once; the backward pass, with or
without recomputation, reads them once and writes their gradient once. Everything beyond that is
copies, which `finermoe aot` prints. Not counted: the gradient norm, the parameter update, and the
gradient sum over replicas.
"""

import dataclasses
import math

from finermoe_jax.analysis.hlo import Computation, Instruction, Leaf, Module, parse
from finermoe_jax.analysis.hlo_costs import Frame, trips
from finermoe_jax.config.model import ModelConfig

# Instructions and custom-call targets that move no data.
_FREE = {"tuple", "get-tuple-element", "parameter", "bitcast", "constant", "optimization-barrier"}
_FREE_TARGETS = {"AllocateBuffer", "Sharding", "LayoutConstraint"}


@dataclasses.dataclass
class Traffic:
    """HBM bytes of one device in one run of a program.

    Attributes:
      kernels: bytes that the experts' kernels read and write.
      in_loops: bytes that other instructions in loops move in arrays of a layer's experts.
      outside: the same outside loops, for instructions that write such an array.
      moved_by: locations and names of the instructions behind in_loops and outside.
    """

    kernels: float = 0.0
    in_loops: float = 0.0
    outside: float = 0.0
    moved_by: list[str] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> float:
        """Sum of all three."""
        return self.kernels + self.in_loops + self.outside


def expert_weights(config: ModelConfig, experts: int) -> int:
    """Returns the number of expert weights in all layers, with `experts` per layer."""
    layers = config.layer_kinds.count("moe")
    return layers * experts * sum(map(math.prod, _matrices(config)))


def expert_traffic(text: str, config: ModelConfig, experts: int, adds: bool = False) -> Traffic:
    """Counts expert traffic in a program compiled for a TPU; loops count once per iteration.

    Args:
      text: `compiled.as_text()`.
      config: the model's config.
      experts: experts per layer on one device.
      adds: True if the backward kernel reads gradient sums and adds to them.

    A loop with a data-dependent trip count (later rounds of the exchange) adds no bytes; its copies
    are listed.
    """
    walk = _Walk(parse(text), _matrices(config), experts, adds)
    entry = walk.module.computations[walk.module.entry]
    walk.run(Frame(entry, None, None), 1.0, "")
    return walk.traffic


def _matrices(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the shapes of an expert's gate_up and down."""
    f = config.expert_intermediate_size
    return (2 * f, config.hidden_size), (f, config.expert_output_size)


class _Walk:
    def __init__(
        self, module: Module, matrices: tuple[tuple[int, int], ...], experts: int, adds: bool
    ):
        self.module, self.experts, self.adds = module, experts, adds
        self.traffic = Traffic()
        self.matrices = {*matrices, *((b, a) for a, b in matrices)}

    def run(self, frame: Frame, times: float, loop: str) -> None:
        """Adds a computation that runs `times` times; `loop` names the innermost loop, or ""."""
        for instruction in frame.computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                body = self.module.computations[instruction.attribute(r"body=%?([\w.\-]+)") or ""]
                turns = trips(self.module, instruction, frame) or 0
                inner = Frame(body, instruction.operands[0], frame)
                self.run(inner, times * turns, instruction.name)
            elif opcode == "call":
                for name in instruction.called:
                    self.run(Frame(self.module.computations[name], None, None), times, loop)
            elif opcode not in _FREE and opcode != "conditional":  # the conditional is the update
                self._count(instruction, frame.computation, times, loop)

    def _count(
        self, instruction: Instruction, inside: Computation, times: float, loop: str
    ) -> None:
        target = instruction.attribute(r'custom_call_target="([^"]+)"')
        if target in _FREE_TARGETS or instruction.opcode.endswith("-done"):
            return
        operands = [inside.instructions[name] for name in instruction.operands]
        read = [leaf for operand in operands for leaf in operand.leaves if self._is_bank(leaf)]
        written = [leaf for leaf in _results(instruction) if self._is_bank(leaf)]
        if target == "tpu_custom_call" and "expert_ffn" in instruction.attributes:
            # Gradient buffers passed in, the last operands, are aliased to the results.
            moved = (read if self.adds else read[: len(read) - len(written)]) + written
            self.traffic.kernels += times * sum(map(self._window, moved))
            return
        if not loop and (not written or instruction.opcode.startswith("all-reduce")):
            return  # the gradient norm, or the gradient sum over devices
        size = sum(self._window(leaf) if loop else leaf.bytes for leaf in read + written)
        if size:
            if loop:
                self.traffic.in_loops += times * size
            else:
                self.traffic.outside += times * size
            self.traffic.moved_by.append(
                f"{loop or 'outside of loops'}: {instruction.opcode} {instruction.name} "
                f"{[leaf.dims for leaf in read + written]}"
            )

    def _is_bank(self, leaf: Leaf) -> bool:
        """Returns True for an array in HBM with the experts of one layer or several layers."""
        outer = math.prod(leaf.dims[:-2])
        return leaf.space == 0 and leaf.dims[-2:] in self.matrices and outer >= self.experts

    def _window(self, leaf: Leaf) -> float:
        """Returns the bytes of one layer's experts in the array."""
        return leaf.bytes * self.experts / math.prod(leaf.dims[:-2])


def _results(instruction: Instruction) -> tuple[Leaf, ...]:
    """Returns the arrays that an instruction writes; async copies also list their operand."""
    match instruction.opcode:
        case "copy-start":
            return instruction.leaves[:1]
        case "slice-start" | "dynamic-slice-start":
            return instruction.leaves[-2:-1]
    return instruction.leaves
