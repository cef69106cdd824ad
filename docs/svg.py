"""Parts of the drawings in SVG: boxes, texts, arrows. Colours and fonts: training/style.py."""

from finermoe_jax.training import style


def picture(width: float, height: float, about: str, parts: list[str]) -> str:
    """SVG of these parts on white, which a dark page needs, too. `about` is its title."""
    heads = "".join(head(c) for c in (style.INK, *(strong for strong, _ in style.SLOTS)))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="{style.FONTS}" role="img">',
            f"<title>{about}</title>",
            f"<defs>{heads}</defs>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def box(x: float, y: float, w: float, h: float, fill: str, stroke: str, width: float = 1.2) -> str:
    """A rounded rectangle."""
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="{width}"/>'
    )


def text(
    x: float, y: float, words: str, size: int = 14, anchor: str = "middle", **more: str
) -> str:
    """A line of text."""
    extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    fill = "" if "fill" in more else f' fill="{style.INK}"'
    place = f'x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place}{fill}{extra}>{words}</text>"


def arrow(
    points: list[tuple[float, float]], colour: str = style.INK, width: float = 1.6, dash: str = ""
) -> str:
    """A bent line with a head; dash is its pattern, such as "4 3"."""
    path = " ".join(f"{x},{y}" for x, y in points)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed} '
        f'marker-end="url(#head{colour[1:]})"/>'
    )


def node(x: float, y: float, sign: str, colour: str = style.INK) -> str:
    """A circle with an operator's sign."""
    circle = f'<circle cx="{x}" cy="{y}" r="14" fill="white" stroke="{colour}" stroke-width="1.6"/>'
    return circle + text(x, y + 6, sign, 18, fill=colour)


def head(colour: str) -> str:
    """The arrow head of a colour."""
    return (
        f'<marker id="head{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
    )
