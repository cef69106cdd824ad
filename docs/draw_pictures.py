"""Draws cut, routing, upcycling, layer, pooling and route_ahead.svg in docs/.

python docs/draw_pictures.py
"""

import math
from pathlib import Path

from svg import arrow, box, node, picture, text

from finermoe_jax.training.style import GREY, INK, PLAIN, QUIET, SLOTS

SLICES = 8
FAINT = "#f7f8f9"


def funnel(top: tuple[float, float], y0: float, bottom: tuple[float, float], y1: float, fill: str):
    """The lines from a stretch at height y0 to one at y1: a product with all weights between."""
    (a, b), (c, d) = top, bottom
    return f'<polygon points="{a},{y0} {b},{y0} {d},{y1} {c},{y1}" fill="{fill}" opacity="0.55"/>'


def cut() -> str:
    """A dense FFN, an expert cut in one dimension, and one cut in two."""
    parts = []
    panels = (
        ("the dense FFN", "all inputs, channels and outputs", None, None),
        ("cut once: a usual fine expert", "a slice of channels, all outputs", 2, None),
        (
            "cut twice: an expert of FineRMoE",
            "a slice of channels, a slot of outputs",
            2,
            1,
        ),
    )
    width, cell, half = 256, 32, 128
    for number, (title, about, chosen, slot) in enumerate(panels):
        x = 28 + number * 308
        dark, light = SLOTS[1 if slot else 0]
        channels = (0, SLICES) if chosen is None else (chosen, chosen + 1)
        outputs = (0, width) if slot is None else (slot * half, slot * half + half)
        ends = x + channels[0] * cell, x + channels[1] * cell
        parts += [
            text(x + width / 2, 26, title, 15, font_weight="bold"),
            text(x + width / 2, 47, about, 13, fill=QUIET),
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
                text(x + o * half + half / 2, 276, f"slot {o}  [h/2]", 13,
                     fill=INK if on else QUIET),
            ]  # fmt: skip
        rows = "H" if chosen is None else f"H/{SLICES}"
        columns = "h" if slot is None else "h/2"
        parts += [
            text(x + width / 2, 134, f"gate, up: h × {rows}", 13),
            text(x + width / 2, 228, f"down: {rows} × {columns}", 13),
            text(x + width + 4, 182, "H", 13, "start"),
        ]
    about = "A dense FFN, an expert cut in one dimension, and one cut in two"
    return picture(940, 304, about, parts)


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

    parts = []
    for x, title, about in (
        (233, "1  Mark the best expert of a group", "the router's logit of every expert"),
        (505, "2  Keep a group per slot", "largest sum of all its logits"),
        (690, "3  Weights", "softmax of both"),
        (894, "4  Concatenate", "nothing is added across slots"),
    ):
        parts += [
            text(x, 28, title, 14, font_weight="bold"),
            text(x, 48, about, 13, fill=QUIET),
        ]
    cell, number = 78, 0
    for o, (dark, light) in enumerate(SLOTS):
        top = 66 + o * 136
        parts.append(text(12, top + 58, f"slot {o}", 14, "start", fill=dark, font_weight="bold"))
        for r in range(2):
            y = top + r * 58
            on = r == kept[o]
            parts.append(
                box(72, y, 4 * cell + 10, 48, light if on else FAINT, dark if on else GREY,
                    2 if on else 1)
            )  # fmt: skip
            for i in range(4):
                x, marked = 78 + i * cell, i == best[o][r]
                fill = dark if marked and on else "white"
                stroke = (dark, 3) if marked else (GREY, 1)
                ink = "white" if marked and on else INK
                logit = f"{LOGITS[o][r][i]:+.1f}".replace("-", "−")
                parts += [
                    box(x + 2, y + 5, cell - 6, 38, fill, *stroke),
                    text(x + cell / 2 - 1, y + 21, logit, 13, fill=ink),
                    text(x + cell / 2 - 1, y + 37, f"expert {number}", 12, fill=ink),
                ]
                number += 1
            words = f"sum {sums[o][r]:+.1f}" + ("  kept" if on else "")
            parts.append(
                text(412, y + 29, words, 14, "start", fill=dark if on else QUIET,
                     font_weight="bold" if on else "normal")
            )  # fmt: skip
        y = top + kept[o] * 58 + 24
        parts += [
            arrow([(546, y), (636, y)], dark),
            text(682, y - 4, f"exp({active[o]:.1f})", 13),
            text(682, y + 15, f"→ {weights[o]:.2f}", 15, fill=dark, font_weight="bold"),
            arrow([(726, y), (846 + o * 118, y), (846 + o * 118, (160, 234)[o])], dark),
        ]
    for o, (dark, light) in enumerate(SLOTS):
        expert = (o * 2 + kept[o]) * 4 + best[o][kept[o]]
        x = 788 + o * 118
        parts += [
            box(x, 162, 116, 70, light, dark, 1.6),
            text(x + 58, 184, f"{weights[o]:.2f} ×", 14),
            text(x + 58, 203, f"expert {expert}(x)", 14),
            text(x + 58, 222, f"slot {o}  [h/2]", 13, fill=QUIET),
        ]
    parts.append(text(748, 201, "y  [h]  =", 14))
    return picture(1030, 340, "The routing of one token", parts)


def upcycling() -> str:
    """The source of each expert's weights: the cells of one dense down-projection."""
    cell, tall = 34, 34
    parts = [
        text(150, 28, "the dense FFN", 15, font_weight="bold"),
        text(150, 47, "channels in 8 slices, outputs in 2", 13, fill=QUIET),
        text(650, 28, "the experts", 15, font_weight="bold"),
        text(650, 47, "a number is the slice; copies are equal at the start", 13, fill=QUIET),
    ]
    for i in range(SLICES):
        y = 78 + i * tall
        for o, (dark, light) in enumerate(SLOTS):
            x = 40 + o * 112
            strong = i == 5
            parts += [
                box(x, y + 2, 106, tall - 4, dark if strong else light, dark, 1),
                text(x + 53, y + 22, f"slice {i}, half {o}", 13,
                     fill="white" if strong else INK),
            ]  # fmt: skip
    for o, (dark, light) in enumerate(SLOTS):
        top = 66 + o * 118
        x0 = 470
        parts.append(text(x0 - 14, top + 51, f"slot {o}", 14, "end", fill=dark,
                          font_weight="bold"))  # fmt: skip
        for r in range(2):
            y = top + r * 50
            parts.append(box(x0, y, SLICES * cell + 10, 44, FAINT, dark, 1.2))
            parts.append(text(x0 + SLICES * cell + 18, y + 27, f"candidate {r}", 13, "start"))
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
    about = "Upcycling: the parts of a dense FFN that each expert starts as"
    return picture(940, 364, about, parts)


CHOSEN = ((0, 2), (1, 5))  # (candidate, expert) of each slot


def layer() -> str:
    """The whole layer: router, experts, routing weights, slots, shared expert."""
    parts = [
        text(454, 24, "each group holds an expert for every slice of the FFN", 13),
        box(10, 188, 74, 44, PLAIN, INK),
        text(47, 215, "x  [h]"),
        box(112, 36, 132, 48, PLAIN, INK),
        text(178, 56, "router"),
        text(178, 75, "a logit per expert", 13, fill=QUIET),
        arrow([(47, 188), (47, 60), (111, 60)]),
        arrow([(84, 210), (304, 210), (304, 74), (326, 74)]),
        arrow([(304, 210), (304, 334), (326, 334)]),
        text(180, 229, "x goes to the active", 13, fill=QUIET),
        text(180, 247, "experts only", 13, fill=QUIET),
        arrow([(244, 60), (280, 60), (280, 94), (326, 94)], width=1.2, dash="4 3"),
        arrow([(280, 94), (280, 314), (326, 314)], width=1.2, dash="4 3"),
        arrow([(280, 190), (632, 190)], width=1.2, dash="4 3"),
        text(456, 184, "logits of the active experts", 13, fill=QUIET),
        box(634, 158, 152, 64, PLAIN, INK),
        text(710, 178, "softmax of both", 13),
        text(710, 196, "active logits:", 13),
        text(710, 214, "w0 + w1 = 1", 13),
    ]
    cell, across = 30, SLICES * 30 + 12
    for o, (dark, light) in enumerate(SLOTS):
        top = 60 + o * 180
        parts.append(
            text(328, top - 9, f"slot {o}: candidate groups 0 and 1", 14, "start", fill=dark,
                 font_weight="bold")
        )  # fmt: skip
        for candidate in range(2):
            y, kept = top + candidate * 60, candidate == CHOSEN[o][0]
            edge = (dark, 2) if kept else ("#d3d9de", 1)
            parts.append(box(328, y, across, 48, light if kept else FAINT, *edge))
            for expert in range(SLICES):
                active = kept and expert == CHOSEN[o][1]
                fill = dark if active else ("white" if kept else PLAIN)
                x = 335 + expert * cell
                parts.append(box(x + 1, y + 8, cell - 4, 32, fill, dark if kept else GREY, 1))
        y = top + CHOSEN[o][0] * 60 + 24
        parts += [
            arrow([(328 + across, y), (694, y)], dark),
            node(710, y, "×", dark),
            arrow([(710, (158, 222)[o]), (710, y + (15, -15)[o])], dark),
            text(720, (130, 270)[o], f"w{o}", 14, "start", fill=dark, font_weight="bold"),
            arrow([(725, y), (760, y)], dark),
            box(762, y - 30, 58, 60, light, dark, 1.6),
            text(791, y - 3, f"slot {o}", 13, fill=dark, font_weight="bold"),
            text(791, y + 17, "[h/2]", 13),
            arrow([(821, y), (864, y), (864, (169, 211)[o])]),
        ]
    return picture(990, 500, "One FineRMoE layer", [*parts, *_sum_of_layer()])


def _sum_of_layer() -> list[str]:
    """Parts of the layer's picture: the concatenation, the shared expert, the sum, the rules."""
    return [
        box(824, 171, 80, 38, PLAIN, INK),
        text(864, 195, "concat"),
        arrow([(905, 190), (922, 190)]),
        node(938, 190, "+"),
        arrow([(953, 190), (984, 190)]),
        text(966, 172, "y [h]"),
        text(454, 374, "kept: the group with the largest sum of logits in its slot", 13),
        text(454, 393, "active: the largest logit of the kept group (T_I = 1; with", 13),
        text(454, 412, "more, a slot is the sum of its weighted experts)", 13),
        box(304, 430, 300, 52, PLAIN, INK),
        text(454, 452, "shared expert: the whole FFN"),
        text(454, 471, "× sigmoid(x · v), a gate per token", 13, fill=QUIET),
        arrow([(47, 232), (47, 456), (302, 456)]),
        arrow([(605, 456), (938, 456), (938, 206)]),
    ]


def pooling() -> str:
    """Four layers with four experts each: alone, and in groups of two that share them."""
    cell, left, right, pool = 44, 134, 370, 520
    parts = [
        text(170, 26, "experts_across = 1", 15, font_weight="bold"),
        text(640, 26, "experts_across = 2", 15, font_weight="bold"),
        text(170, 47, "each layer routes to its own experts", 13, fill=QUIET),
        text(640, 47, "two layers route to the experts of both", 13, fill=QUIET),
    ]
    for o in range(2):
        parts += [
            text(left + (1 + 2 * o) * cell, 76, f"slot {o}", 13, fill=QUIET),
            text(pool + (2 + 4 * o) * cell, 76, f"slot {o}", 13, fill=QUIET),
        ]
    for number in range(4):
        dark, light = SLOTS[number % 2]
        y = 90 + 66 * number
        for x in (20, right):
            parts += [
                box(x, y, 88, 40, PLAIN, dark, 1.6),
                text(x + 44, y + 25, f"layer {number}", 14, fill=dark),
            ]
        parts.append(arrow([(109, y + 20), (left - 3, y + 20)], dark))
        parts += _experts(left, y, [(e, dark, light) for e in range(4)])
        if number % 2:
            continue
        middle = y + 53
        for j, (strong, _) in enumerate(SLOTS):
            ends = (right + 89, y + 20 + 66 * j), (pool - 3, middle - 8 + 16 * j)
            parts.append(arrow([*ends], strong))
        parts += _experts(pool, middle - 20, [(p // 2, *SLOTS[p % 2]) for p in range(8)])
        for p in range(8):
            parts.append(text(pool + (p + 0.5) * cell, middle + 38, f"{p}", 12, fill=QUIET))
        parts.append(text(pool - 12, middle + 38, "p =", 12, "end", fill=QUIET))
    return picture(900, 358, "The experts that each layer reads", parts)


def route_ahead() -> str:
    """Four layers: each router reads its own layer's FFN input, or that of the layer before."""
    parts = []
    for ahead, about in enumerate(("its own layer's input", "the input of the layer before")):
        x = 30 + 450 * ahead
        parts += [
            text(x + 195, 26, f"route_ahead = {ahead}", 15, font_weight="bold"),
            text(x + 195, 47, f"each router reads {about}", 13, fill=QUIET),
        ]
        for number in range(4):
            y = 70 + 74 * number
            dark, light = SLOTS[number % 2]
            for at, width, words in (
                (0, 120, "FFN input"),
                (170, 90, "router"),
                (300, 90, "experts"),
            ):
                fill = light if at == 0 else PLAIN
                parts += [
                    box(x + at, y, width, 40, fill, dark, 1.6),
                    text(x + at + width / 2, y + 25, f"{words} {number}", 14, fill=dark),
                ]
            # The chosen experts, then the input that they compute on.
            parts.append(arrow([(x + 261, y + 14), (x + 297, y + 14)], dark))
            below = [(x + 60, y + 41), (x + 60, y + 54), (x + 345, y + 54), (x + 345, y + 43)]
            parts.append(arrow(below, dark, dash="4 3"))
            if not ahead or not number:
                parts.append(arrow([(x + 121, y + 14), (x + 167, y + 14)], dark))
            if ahead and number < 3:
                bend = [(x + 121, y + 26), (x + 144, y + 26), (x + 144, y + 88), (x + 167, y + 88)]
                parts.append(arrow(bend, dark))
    return picture(900, 370, "The input that each router reads", parts)


def _experts(x: float, y: float, experts: list[tuple[int, str, str]]) -> list[str]:
    """A row of boxes with experts' numbers, in the colours of their layers."""
    parts = []
    for place, (number, dark, light) in enumerate(experts):
        parts += [
            box(x + 44 * place + 2, y, 40, 40, light, dark),
            text(x + 44 * place + 22, y + 25, f"{number}", 14, fill=dark),
        ]
    return parts


DRAWN = {
    "cut": cut, "routing": routing, "upcycling": upcycling, "layer": layer, "pooling": pooling,
    "route_ahead": route_ahead,
}  # fmt: skip

if __name__ == "__main__":
    for name, drawn in DRAWN.items():
        Path(__file__).with_name(f"{name}.svg").write_text(drawn())
