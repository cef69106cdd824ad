"""The paper's parameter counts, compared with this code's."""

import dataclasses

from finermoe_jax.analysis.params import paper_counts
from finermoe_jax.config.model import ModelConfig
from finermoe_jax.config.presets import QWEN2P5, architecture
from finermoe_jax.model.counts import Counts, true_counts
from finermoe_jax.weights.upcycle import upcycled_config


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: an architecture upcycled from a dense model, and the paper's billions."""

    table: int
    label: str
    size: str
    variant: str
    total: float
    active: float

    @property
    def model(self) -> ModelConfig:
        """The row's model."""
        dense, moe = QWEN2P5[self.size], architecture(self.variant).moe
        return dense if moe is None else upcycled_config(dense, moe)


def _table_1() -> list[Row]:
    sizes = ("0.5B", "1.5B", "7B")
    printed = {
        ("pt", "PT"): ((0.49, 0.49), (1.54, 1.54), (7.62, 7.62)),
        ("ct", "CT"): ((0.49, 0.49), (1.54, 1.54), (7.62, 7.62)),
        ("c32a2", "C32A2"): ((10.36, 0.95), (37.62, 2.94), (184.42, 13.33)),
        ("s16a4", "S16A4"): ((0.63, 0.40), (1.78, 0.91), (7.62, 3.34)),
        ("du", "DU"): ((2.83, 0.94), (9.87, 2.93), (47.54, 13.32)),
        ("nvshard", "NVShard"): ((2.83, 0.63), (9.88, 1.78), (47.55, 7.63)),
        ("inter_out_fg", "FineRMoE"): ((1.68, 0.65), (5.64, 1.85), (26.65, 7.94)),
    }
    return [
        Row(1, label, size, variant, *row[i])
        for i, size in enumerate(sizes)
        for (variant, label), row in printed.items()
    ]


# Upcycled from Qwen2.5-1.5B: (total, active) in billions, by table and variant.
_FROM_1_5B: dict[int, dict[str, tuple[float, float]]] = {
    2: {
        "no_fg": (4.09, 2.93),
        "inter_fg": (4.09, 1.82),
        "out_fg": (5.63, 3.70),
        "inter_out_fg": (5.64, 1.85),
    },
    4: {
        "2,2,1,2": (5.63, 2.74),
        "4,2,1,2": (5.63, 2.26),
        "4,4,1,2": (8.72, 2.65),
        "8,2,1,2": (5.63, 2.02),
        "8,4,1,2": (8.72, 2.22),
        "16,2,1,2": (5.64, 1.90),
        "16,4,1,2": (8.72, 2.00),
        "16,8,1,2": (14.90, 2.21),
        "32,2,1,2": (5.64, 1.85),
        "32,4,1,2": (8.74, 1.91),
        "32,8,1,2": (14.92, 2.03),
        "64,2,1,2": (5.65, 1.83),
        "64,4,1,2": (8.76, 1.88),
        "64,8,1,2": (14.97, 1.97),
    },
    8: {
        "32,2,1,2,2": (5.64, 1.91),
        "32,2,1,2,4": (5.64, 2.03),
        "32,2,2,2,1": (9.51, 1.86),
        "32,2,4,2,1": (17.24, 1.88),
        "32,2,1,4,1": (9.51, 1.86),
        "32,2,1,8,1": (17.24, 1.88),
    },
}
ROWS = (
    *_table_1(),
    *(
        Row(number, name, "1.5B", name, *counts)
        for number, rows in _FROM_1_5B.items()
        for name, counts in rows.items()
    ),
)


def _billions(total: float, active: float, digits: int) -> str:
    return f"{total:>9.{digits}f} /{active:>8.{digits}f}"


def agrees(row: Row, counts: Counts) -> bool:
    """Returns True if the counts match the paper's printed digits."""
    return (round(counts.total / 1e9, 2), round(counts.active / 1e9, 2)) == (row.total, row.active)


def text() -> str:
    """Formats Tables 1, 2, 4 and 8: the paper's counts, its formula's and the true ones."""
    head = (
        f"{'':<6}{'':<16}{'experts':>16}{'paper':>19}{'its formula':>19}{'true':>23}   "
        "billions, total / active"
    )
    lines: list[str] = []
    table = 0
    for row in ROWS:
        if row.table != table:
            table = row.table
            lines += ["", f"Table {table}", head]
        by_formula, true = paper_counts(row.model), true_counts(row.model)
        moe = row.model.moe
        experts = f"{moe.num_experts} ({moe.num_active} active)" if moe else "dense"
        lines.append(
            f"{row.size:<6}{row.label:<16}{experts:>16}{_billions(row.total, row.active, 2)}"
            f"{_billions(by_formula.total / 1e9, by_formula.active / 1e9, 2)}"
            f"{_billions(true.total / 1e9, true.active / 1e9, 4):>23}"
            + ("" if agrees(row, by_formula) else "   DIFFERS from the paper")
        )
    return "\n".join(lines[1:])
