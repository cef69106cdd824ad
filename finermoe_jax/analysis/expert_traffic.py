"""HBM bytes of the experts' weights in a compiled program, against the least that they can be.

A pass reads the weights of every expert of a layer once; training reads them a second time in the
backward pass, whether it recomputes or not, and writes their gradient once. What is beyond that are
copies: `finermoe aot` prints them, tests/analysis looks for them. Not counted are the norm of the
gradients and the update, which read and write every parameter alike, and the sum of gradients over
devices that hold the same experts, once a step.
"""

import dataclasses
import math

from finermoe_jax.analysis.hlo import Computation, Instruction, Leaf, Module, parse
from finermoe_jax.analysis.hlo_costs import Frame, trips
from finermoe_jax.config.model import ModelConfig

# Instructions that move nothing.
_FREE = {"tuple", "get-tuple-element", "parameter", "bitcast", "constant", "optimization-barrier"}
# By name: buffers without a value, and checks of a layout.
_FREE_TARGETS = {"AllocateBuffer", "Sharding", "LayoutConstraint"}


@dataclasses.dataclass
class Traffic:
    """Of one device and run of a program, in bytes.

    Attributes:
      kernels: that the experts' kernels read and write.
      in_loops: that everything else in a loop's body moves of arrays as large as a layer's experts.
      outside: likewise outside of loops, where such an array is made.
      moved_by: the instructions behind both: where they are, and what they are called.
    """

    kernels: float = 0.0
    in_loops: float = 0.0
    outside: float = 0.0
    moved_by: list[str] = dataclasses.field(default_factory=list)

    @property
    def total(self) -> float:
        """Of all three."""
        return self.kernels + self.in_loops + self.outside


def expert_weights(config: ModelConfig, experts: int) -> int:
    """Their number in all layers, of so many experts of each."""
    layers = config.layer_kinds.count("moe")
    return layers * experts * sum(map(math.prod, _matrices(config)))


def expert_traffic(text: str, config: ModelConfig, experts: int, adds: bool = False) -> Traffic:
    """Counts in the text of a program compiled for a TPU; loops as often as they turn.

    Args:
      text: `compiled.as_text()`.
      config: of the model.
      experts: of each layer on a device.
      adds: the backward kernel adds to sums, which it reads.

    A loop whose turns are known only at run time (the exchange's later rounds) adds no bytes; its
    copies are named.
    """
    walk = _Walk(parse(text), _matrices(config), experts, adds)
    entry = walk.module.computations[walk.module.entry]
    walk.run(Frame(entry, None, None), 1.0, "")
    return walk.traffic


def _matrices(config: ModelConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of an expert's gate_up and down."""
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
        """Adds a computation that runs `times` times; loop: the innermost around it, or nothing."""
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
            elif opcode not in _FREE and opcode != "conditional":  # that is the update
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
            # Stacks of gradients that go in are those that come out; they come last.
            moved = (read if self.adds else read[: len(read) - len(written)]) + written
            self.traffic.kernels += times * sum(map(self._window, moved))
            return
        if not loop and (not written or instruction.opcode.startswith("all-reduce")):
            return  # read for the norm of the gradients, or summed over devices
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
        """Says that an array in HBM is as large as a layer's experts, or holds several layers'."""
        outer = math.prod(leaf.dims[:-2])
        return leaf.space == 0 and leaf.dims[-2:] in self.matrices and outer >= self.experts

    def _window(self, leaf: Leaf) -> float:
        """Bytes of one layer's experts."""
        return leaf.bytes * self.experts / math.prod(leaf.dims[:-2])


def _results(instruction: Instruction) -> tuple[Leaf, ...]:
    """The arrays that an instruction writes. An asynchronous copy's type also lists its operand."""
    match instruction.opcode:
        case "copy-start":
            return instruction.leaves[:1]
        case "slice-start" | "dynamic-slice-start":
            return instruction.leaves[-2:-1]
    return instruction.leaves
