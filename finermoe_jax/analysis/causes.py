"""Names what causes an instruction's HBM bytes in a compiled program.

The model marks its parts with jax.named_scope. XLA keeps the scopes in each instruction's op_name,
with marks of the backward pass and of recomputation.
"""

import collections
import re
from typing import NamedTuple

from finermoe_jax.analysis.hlo import Computation, Instruction, Module

# Named scope → cause.
SCOPES = {
    "attention": "attention",
    "norms": "norms and residual",
    "shared_expert": "shared expert",
    "dense_ffn": "dense FFN",
    "routed_experts": "routed experts",
    "router": "router",
    "exchange": "exchange",
    "loss": "loss",
    "embedding": "embedding",
    "weights": "weights, cast and gathered",
    "sums": "sums over microbatches",
    "optimizer": "optimizer",
    "newton_schulz": "Newton-Schulz",
}
# Copies from HBM to HBM; and what a loop over layers slices from stacks or writes into them.
COPIES, STACKS, OTHER = "copies", "layer stacks", "other"
CAUSES = (*SCOPES.values(), STACKS, COPIES, OTHER)
PHASES = ("forward", "recompute", "backward", "update")

_SCOPE = re.compile(rf"(?:(?<=[/(])|^)({'|'.join(SCOPES)})(?=[/)]|$)")


class Cause(NamedTuple):
    """A cause (CAUSES) and a pass (PHASES)."""

    name: str
    phase: str

    def __str__(self) -> str:
        return f"{self.name}: {self.phase}"


def cause(instruction: Instruction, inside: Computation, module: Module) -> Cause:
    """Returns the cause of the bytes of an instruction of a computation.

    A fusion without a scope of its own gets the scope that most of its results have. The compiler's
    own instructions, such as copies to fast memory, get the scope of what reads their result, or
    else of their operand.
    """
    path = _path(instruction, module) or _neighbour(instruction, inside, module)
    scope = _scope(path)
    name = SCOPES[scope] if scope else OTHER
    if _copies(instruction):
        name = COPIES
    elif scope is None and re.search(r"while/body.*dynamic_(?:update_)?slice", path):
        name = STACKS
    return Cause(name, _phase(path, scope))


def _path(instruction: Instruction, module: Module) -> str:
    """Returns the op_name of an instruction or, if it has no scope, of most of its fusion."""
    path = op_name(instruction)
    if _scope(path) or instruction.opcode.removesuffix("-start") != "fusion":
        return path
    sizes: collections.Counter[str] = collections.Counter()
    for inner in module.computations[instruction.called[0]].instructions.values():
        if _scope(found := op_name(inner)):
            sizes[found] += 1 + int(sum(leaf.bytes for leaf in inner.leaves))
    return max(sizes, key=sizes.__getitem__) if sizes else path


def _neighbour(instruction: Instruction, inside: Computation, module: Module) -> str:
    """Returns the op_name of the nearest instruction with one: after it, else before it."""
    waiting, seen = list(inside.users.get(instruction.name, ())), set()
    while waiting:
        user = waiting.pop(0)
        if user.name in seen or user.opcode in ("tuple", "while"):
            continue
        seen.add(user.name)
        if path := _path(user, module):
            return path
        waiting += inside.users[user.name]
    while instruction.operands and (operand := inside.instructions.get(instruction.operands[0])):
        if path := _path(operand, module):
            return path
        instruction = operand
    return ""


def op_name(instruction: Instruction) -> str:
    """Returns the instruction's op_name, or ""."""
    return instruction.attribute(r'op_name="([^"]*)"') or ""


def _scope(path: str) -> str | None:
    """Returns the innermost scope of an op_name."""
    found = _SCOPE.findall(path)
    return found[-1] if found else None


def _phase(path: str, scope: str | None) -> str:
    if scope in ("optimizer", "newton_schulz", "sums"):
        return "update"
    if "rematted_computation" in path:
        return "recompute"
    return "backward" if "transpose(" in path else "forward"


def _copies(instruction: Instruction) -> bool:
    """Returns True for a copy whose source and result are both in HBM."""
    if instruction.opcode not in ("copy", "copy-start"):
        return False
    return all(leaf.space == 0 for leaf in instruction.leaves[:2] if leaf.dims)
