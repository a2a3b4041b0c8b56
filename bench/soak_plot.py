"""The picture of a soak: memory, descriptors and streams of each hop over time. SVG, written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, TOP, GAP = 640, 130, 64, 56, 58
COLOURS = ("#c2410c", "#0e7490", "#4d7c0f", "#7c3aed", "#475569", "#be185d")

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1e293b }
.heading { font-weight: 600 } .note { fill: #64748b; font-size: 11px }
path { fill: none; stroke-width: 1.6 } .axis { stroke: #94a3b8; stroke-width: 1 }
@media (prefers-color-scheme: dark) { text { fill: #e2e8f0 } .note { fill: #94a3b8 } }
"""


def text(x: float, y: float, content: str, css: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{css}" text-anchor="{anchor}">{escape(content)}</text>'


def panel(y: float, title: str, times: Sequence[float], lines: Mapping[str, Sequence[float]]) -> list[str]:
    """One diagram from zero up; ``lines`` by the name that gives a line its colour."""
    most = max(max(values) for values in lines.values()) or 1
    parts = [
        text(LEFT, y - 8, title, "heading"),
        f'<path class="axis" d="M{LEFT} {y} V{y + HEIGHT} H{LEFT + WIDTH}"/>',
        text(LEFT - 6, y + 8, f"{most:,.0f}", "note", "end"),
        text(LEFT - 6, y + HEIGHT, "0", "note", "end"),
        text(LEFT + WIDTH, y + HEIGHT + 15, f"{times[-1] / 60:.1f} min", "note", "end"),
    ]
    for colour, values in zip(COLOURS, lines.values(), strict=False):
        points = " L".join(
            f"{LEFT + WIDTH * at / times[-1]:.1f} {y + HEIGHT * (1 - value / most):.1f}"
            for at, value in zip(times, values, strict=True)
        )
        parts.append(f'<path stroke="{colour}" d="M{points}"/>')
    return parts


def plot(seen: Mapping[str, Any]) -> str:
    """The samples of a soak as an SVG document."""
    samples = seen["samples"]
    times = [sample["seconds"] for sample in samples]
    hops = sorted(samples[0]["hops"])
    parts, x = [text(LEFT, 18, f"{seen['seconds'] / 60:.1f} minutes of mixed load, {seen['machine']}", "heading")], LEFT
    for colour, hop in zip(COLOURS, hops, strict=False):
        parts += [f'<path stroke="{colour}" d="M{x} 33 h16"/>', text(x + 20, 37, hop)]
        x += 44 + 7 * len(hop)
    panels = {
        "resident memory, MiB": {h: [s["hops"][h]["rss"] / 2**20 for s in samples] for h in hops},
        "open descriptors": {h: [s["hops"][h]["descriptors"] for s in samples] for h in hops},
        "streams in the runner's tables": {"streams": [s["traffic"]["streams"] for s in samples]},
    }
    y = TOP + 20.0
    for title, lines in panels.items():
        parts += panel(y, title, times, lines)
        y += HEIGHT + GAP
    body = "\n".join(parts)
    size = f'width="{LEFT + WIDTH + 24}" height="{y - GAP + 30:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'
