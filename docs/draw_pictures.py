"""Draws docs/cut.svg, routing.svg and upcycling.svg: python docs/draw_pictures.py"""

import math
from pathlib import Path

from draw_layer import GREY, INK, SLOT_COLOURS, arrow, box, head, text

PLAIN, QUIET = "#eef1f4", "#52606d"
SLICES = 8


def picture(width: int, height: int, parts: list[str]) -> str:
    """SVG of these parts on white."""
    heads = "".join(head(c) for c in (INK, *(dark for dark, _ in SLOT_COLOURS)))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="Helvetica, Arial, sans-serif">',
            f"<defs>{heads}</defs>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def funnel(top: tuple[float, float], y0: float, bottom: tuple[float, float], y1: float, fill: str):
    """What connects a stretch at height y0 with one at y1: a product with all weights between."""
    (a, b), (c, d) = top, bottom
    return f'<polygon points="{a},{y0} {b},{y0} {d},{y1} {c},{y1}" fill="{fill}" opacity="0.55"/>'


def cut() -> str:
    """A dense FFN, an expert cut in one dimension, and one cut in two."""
    parts = []
    panels = (
        ("the dense FFN", "every input · every channel · every output", None, None),
        ("cut once: a usual fine expert", "a slice of the channels, all outputs", 2, None),
        (
            "cut twice: an expert of FineRMoE",
            "a slice of the channels, a slot of the outputs",
            2,
            1,
        ),
    )
    width, cell, half = 256, 32, 128
    for number, (title, about, chosen, slot) in enumerate(panels):
        x = 28 + number * 308
        dark, light = SLOT_COLOURS[1 if slot else 0]
        channels = (0, SLICES) if chosen is None else (chosen, chosen + 1)
        outputs = (0, width) if slot is None else (slot * half, slot * half + half)
        ends = x + channels[0] * cell, x + channels[1] * cell
        parts += [
            text(x + width / 2, 26, title, 15, font_weight="bold"),
            text(x + width / 2, 46, about, 12, fill=QUIET),
            funnel((x, x + width), 98, ends, 162, light),
            funnel(ends, 192, (x + outputs[0], x + outputs[1]), 256, light),
            box(x, 68, width, 30, light, dark),
            text(x + width / 2, 88, "input  [h]", 13),
        ]
        for i in range(SLICES):
            on = channels[0] <= i < channels[1]
            fill, stroke = (dark, dark) if on else (PLAIN, GREY)
            parts.append(box(x + i * cell + 2, 162, cell - 4, 30, fill, stroke, 1))
        for o in range(2):
            on = slot in (None, o)
            fill, stroke = (light, dark) if on else (PLAIN, GREY)
            parts += [
                box(x + o * half + 2, 256, half - 4, 30, fill, stroke),
                text(x + o * half + half / 2, 276, f"slot {o + 1}  [h/2]", 12,
                     fill=INK if on else GREY),
            ]  # fmt: skip
        rows = "H" if chosen is None else f"H/{SLICES}"
        columns = "h" if slot is None else "h/2"
        parts += [
            text(x + width / 2, 134, f"gate, up: h × {rows}", 13),
            text(x + width / 2, 228, f"down: {rows} × {columns}", 13),
            text(x + width + 4, 182, "H", 13, "start"),
        ]
    return picture(940, 304, parts)


LOGITS = (
    ((0.9, -0.4, 0.3, 0.5), (1.6, -0.9, -0.2, 0.1)),
    ((0.2, 0.4, -0.6, 0.1), (-0.3, 0.8, 1.2, 0.6)),
)


def routing() -> str:
    """One token's way: the best of each group, the best group of each slot, weights, outputs."""
    best = [[max(range(4), key=group.__getitem__) for group in slot] for slot in LOGITS]
    sums = [[sum(group) for group in slot] for slot in LOGITS]
    kept = [max(range(2), key=slot.__getitem__) for slot in sums]
    active = [LOGITS[o][kept[o]][best[o][kept[o]]] for o in range(2)]
    weights = [math.exp(a) / sum(map(math.exp, active)) for a in active]

    parts = [
        text(200, 28, "1  The best expert of each group is marked", 13.5, font_weight="bold"),
        text(200, 46, "the router's logit of every expert", 12, fill=QUIET),
        text(458, 28, "2  Each slot keeps a group", 13.5, font_weight="bold"),
        text(458, 46, "the larger sum of all its logits", 12, fill=QUIET),
        text(626, 28, "3  Weights", 13.5, font_weight="bold"),
        text(626, 46, "one softmax", 12, fill=QUIET),
        text(816, 28, "4  Side by side", 13.5, font_weight="bold"),
        text(816, 46, "nothing is added across slots", 12, fill=QUIET),
    ]
    cell, number = 62, 0
    for o, (dark, light) in enumerate(SLOT_COLOURS):
        top = 66 + o * 136
        parts.append(
            text(16, top + 62, f"slot {o + 1}", 14, "start", fill=dark, font_weight="bold")
        )
        for r in range(2):
            y = top + r * 58
            on = r == kept[o]
            parts.append(
                box(72, y, 4 * cell + 10, 48, light if on else "#f7f8f9", dark if on else GREY,
                    2 if on else 1)
            )  # fmt: skip
            for i in range(4):
                x, marked = 78 + i * cell, i == best[o][r]
                fill = dark if marked and on else "white"
                stroke = (dark, 3) if marked else (GREY, 1)
                ink = "white" if marked and on else INK
                parts += [
                    box(x + 2, y + 6, cell - 6, 36, fill, *stroke),
                    text(x + cell / 2 - 1, y + 22, f"{LOGITS[o][r][i]:+.1f}", 13, fill=ink),
                    text(x + cell / 2 - 1, y + 37, f"expert {number}", 10, fill=ink),
                ]
                number += 1
            relation = "kept" if on else ""
            parts.append(
                text(400, y + 29, f"sum {sums[o][r]:+.1f}  {relation}", 14, "start",
                     fill=dark if on else GREY, font_weight="bold" if on else "normal")
            )  # fmt: skip
        y = top + kept[o] * 58 + 24
        parts += [
            arrow([(500, y), (580, y)], dark),
            text(626, y - 4, f"exp({active[o]:.1f})", 13),
            text(626, y + 15, f"→ {weights[o]:.2f}", 15, fill=dark, font_weight="bold"),
            arrow([(668, y), (785 + o * 96, y), (785 + o * 96, (160, 232)[o])], dark),
        ]
    for o, (dark, light) in enumerate(SLOT_COLOURS):
        expert = (o * 2 + kept[o]) * 4 + best[o][kept[o]]
        x = 738 + o * 96
        parts += [
            box(x, 162, 94, 68, light, dark, 1.6),
            text(x + 47, 184, f"{weights[o]:.2f} ×", 14),
            text(x + 47, 203, f"expert {expert}(x)", 13),
            text(x + 47, 221, "h/2", 12, fill=QUIET),
        ]
    parts.append(text(704, 201, "y  [h]  =", 14))
    return picture(940, 340, parts)


def upcycling() -> str:
    """Where each expert's weights come from: the cells of one dense down-projection."""
    cell, tall = 34, 34
    parts = [
        text(150, 28, "the dense FFN", 15, font_weight="bold"),
        text(150, 46, "its channels in 8 slices, its outputs in 2", 12, fill=QUIET),
        text(650, 28, "the experts", 15, font_weight="bold"),
        text(650, 46, "a number is the slice; copies are equal at the start", 12, fill=QUIET),
    ]
    for i in range(SLICES):
        y = 78 + i * tall
        for o, (dark, light) in enumerate(SLOT_COLOURS):
            x = 40 + o * 112
            strong = i == 5
            parts += [
                box(x, y + 2, 106, tall - 4, dark if strong else light, dark, 1),
                text(x + 53, y + 22, f"slice {i}, half {o + 1}", 12,
                     fill="white" if strong else INK),
            ]  # fmt: skip
    for o, (dark, light) in enumerate(SLOT_COLOURS):
        top = 66 + o * 118
        x0 = 470
        parts.append(text(x0 - 14, top + 51, f"slot {o + 1}", 14, "end", fill=dark,
                          font_weight="bold"))  # fmt: skip
        for r in range(2):
            y = top + r * 50
            parts.append(box(x0, y, SLICES * cell + 10, 44, "#f7f8f9", dark, 1.2))
            parts.append(text(x0 + SLICES * cell + 18, y + 27, f"candidate {r}", 12, "start"))
            for i in range(SLICES):
                fill, ink = (dark, "white") if i == 5 else (light, INK)
                parts += [
                    box(x0 + 6 + i * cell, y + 7, cell - 4, 30, fill, dark, 1),
                    text(x0 + 4 + i * cell + cell / 2, y + 27, f"{i}", 13, fill=ink),
                ]
        middle = top + 46
        way = ((93, 78), (93, 64), (330, 64), (330, middle)) if o == 0 else ((264, middle),)
        parts.append(arrow([*way, (404, middle)], dark))
    parts += [
        box(470, 310, 282, 34, PLAIN, INK),
        text(611, 332, "shared expert: all of it, unchanged", 13),
        text(770, 332, "router: new, random", 13, "start", fill=QUIET),
    ]
    return picture(940, 364, parts)


if __name__ == "__main__":
    for name, drawn in (("cut", cut), ("routing", routing), ("upcycling", upcycling)):
        Path(__file__).with_name(f"{name}.svg").write_text(drawn())
