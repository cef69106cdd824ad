"""Lists the matrix products that overlap with each exchange of rows in a compiled program.

    finermoe aot --config=… --topology=… --hlo=step.hlo
    python benchmarks/overlap.py step.hlo

For each exchange it prints the products between its start and its end in the compiler's schedule.
The rare later rounds are omitted. This is the compiler's plan; nothing is measured.
"""

import re
import sys
from pathlib import Path

from finermoe_jax.analysis.hlo import Computation, Instruction, Module, flops, parse


def products(instruction: Instruction, inside: Computation, module: Module) -> dict[str, float]:
    """FLOPs of an instruction's matrix products, by the einsum that they come from."""
    found: dict[str, float] = {}
    if amount := flops(instruction, inside):
        origin = instruction.attribute(r'op_name="([^"]*)"') or "?"
        einsum = re.search(r"[A-Z.]+,[A-Z.]+->[A-Z.]+", origin)
        found[einsum[0] if einsum else origin[-40:]] = amount
    if instruction.opcode == "fusion":
        fused = module.computations[instruction.called[0]]
        for inner in fused.instructions.values():
            for name, amount in products(inner, fused, module).items():
                found[name] = found.get(name, 0.0) + amount
    return found


def main() -> None:
    """Prints a line per exchange."""
    module, found = parse(Path(sys.argv[1]).read_text()), 0
    for computation in module.computations.values():
        order = list(computation.instructions.values())
        for begin, start in enumerate(order):
            origin = start.attribute(r'op_name="([^"]*)"') or ""
            if start.opcode not in ("ragged-all-to-all-start", "all-to-all-start"):
                continue
            if "shard_map/while" in origin:  # a later round
                continue
            end = next(i for i, other in enumerate(order) if start.name in other.operands)
            found += 1
            between: dict[str, float] = {}
            for other in order[begin + 1 : end]:
                for name, amount in products(other, computation, module).items():
                    between[name] = between.get(name, 0.0) + amount
            phase = "backward" if "transpose" in origin else "forward"
            phase = "recomputed" if "rematted" in origin else phase
            rows = "x".join(map(str, start.leaves[0].dims))
            listed = ", ".join(f"{name} {a / 1e9:,.0f} GFLOP" for name, a in between.items())
            print(f"{phase:<11} {start.opcode.removesuffix('-start')} of {rows}: {listed or '-'}")
    if not found:
        print("this program holds no exchange of rows")


if __name__ == "__main__":
    main()
