"""Draws docs/layer.svg, the README's picture of the layer: python docs/draw_layer.py"""

from pathlib import Path

SLOT_COLOURS = (("#1f5f99", "#dbe9f6"), ("#b45309", "#fdebd3"))
GREY, INK = "#9aa3ad", "#1f2933"
SLICES, CANDIDATES = 8, 2
CHOSEN = ((0, 2), (1, 5))  # (candidate, expert) of each slot


def box(x: float, y: float, w: float, h: float, fill: str, stroke: str, width: float = 1.2) -> str:
    """A rounded rectangle."""
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{width}"/>'
    )


def text(x: float, y: float, words: str, size: int = 14, anchor: str = "middle", **style: str):
    """A line of text."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in style.items())
    fill = "" if "fill" in style else f' fill="{INK}"'
    place = f'x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place}{fill}{extra}>{words}</text>"


def arrow(points: list[tuple[float, float]], colour: str = INK, width: float = 1.6) -> str:
    """A bent line with a head."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
        f'marker-end="url(#head{colour[1:]})"/>'
    )


def head(colour: str) -> str:
    """The arrow head of a colour."""
    return (
        f'<marker id="head{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
    )


def draw() -> str:
    """The whole picture, as SVG."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 440" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<defs>" + "".join(head(c) for c in (INK, *(s[0] for s in SLOT_COLOURS))) + "</defs>",
        '<rect width="940" height="440" fill="white"/>',
        box(20, 190, 74, 44, "#eef1f4", INK),
        text(57, 217, "x  [h]"),
        box(140, 40, 120, 44, "#eef1f4", INK),
        text(200, 60, "router"),
        text(200, 76, "one logit per expert", 11, fill="#52606d"),
        arrow([(57, 190), (57, 62), (139, 62)]),
        text(470, 24, "groups: candidates for a slot, each with every slice of the FFN", 13),
    ]
    cell, top = 34, 44
    for slot, (dark, light) in enumerate(SLOT_COLOURS):
        y0 = top + slot * 150
        parts.append(
            text(722, (84, 314)[slot], f"slot {slot + 1}", 13, fill=dark, font_weight="bold")
        )
        for candidate in range(CANDIDATES):
            y = y0 + 4 + candidate * 60
            kept = candidate == CHOSEN[slot][0]
            parts.append(
                box(330, y, SLICES * cell + 12, 48, light if kept else "#f7f8f9",
                    dark if kept else "#d3d9de", 2 if kept else 1)
            )  # fmt: skip
            for expert in range(SLICES):
                x = 336 + expert * cell
                active = kept and expert == CHOSEN[slot][1]
                fill = dark if active else ("white" if kept else "#eef1f4")
                parts.append(box(x + 2, y + 8, cell - 6, 32, fill, dark if kept else GREY, 1))
                if active:
                    end = 700
                    lane = y0 + 66
                    parts.append(
                        arrow([(614, y + 24), (650, y + 24), (650, lane), (end, lane)], dark)
                    )
        y = (86, 268)[slot]
        dashed = '<polyline stroke-dasharray="4 3"'
        line = arrow([(260, 62), (282, 62), (282, y), (328, y)], INK, 1.2)
        parts.append(line.replace("<polyline", dashed))
    parts += [
        text(470, 338, "kept group: largest sum of logits in its slot (sparse concatenation)", 12),
        text(470, 354, "active expert: largest logit in its group (sparse sum)", 12),
        box(702, 92, 40, 74, SLOT_COLOURS[0][1], SLOT_COLOURS[0][0], 1.6),
        text(722, 133, "h/2", 13),
        box(702, 222, 40, 104 - 30, SLOT_COLOURS[1][1], SLOT_COLOURS[1][0], 1.6),
        text(722, 263, "h/2", 13),
        arrow([(743, 129), (790, 129), (790, 180)]),
        arrow([(743, 259), (790, 259), (790, 214)]),
        box(752, 181, 76, 32, "#eef1f4", INK),
        text(790, 202, "concat", 13),
        box(330, 378, 284, 44, "#eef1f4", INK),
        text(472, 397, "shared expert: the whole dense FFN"),
        text(472, 413, "times sigmoid(x · w)", 11, fill="#52606d"),
        arrow([(57, 234), (57, 400), (328, 400)]),
        arrow([(615, 400), (866, 400), (866, 214)]),
        arrow([(829, 197), (851, 197)]),
        '<circle cx="866" cy="197" r="14" fill="white" stroke="#1f2933" stroke-width="1.4"/>',
        text(866, 203, "+", 18),
        arrow([(881, 197), (928, 197)]),
        text(906, 188, "y [h]", 13),
        arrow([(94, 212), (306, 212), (306, 72), (328, 72)]),
        arrow([(306, 212), (306, 282), (328, 282)]),
        text(196, 204, "to the active experts only", 11, fill="#52606d"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("layer.svg").write_text(draw())
