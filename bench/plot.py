"""The picture of a chain run: one panel for each measure, one bar for each contender. SVG, written by hand."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from bench.measures import HEADLINES, MEASURES

if TYPE_CHECKING:
    from bench.chain import Results

COLUMNS = 3
PANEL_WIDTH, BAR_WIDTH, BAR_HEIGHT, HEADING = 260, 165, 18, 34
COLOURS = ("#c2410c", "#ea9a6b", "#475569", "#94a3b8", "#0e7490")

STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1e293b }
.heading { font-weight: 600 } .note { fill: #64748b; font-size: 11px }
@media (prefers-color-scheme: dark) { text { fill: #e2e8f0 } .note { fill: #94a3b8 } }
"""


def text(x: float, y: float, content: str, css: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}"{f" class={css!r}" if css else ""}>{escape(content)}</text>'


def bar(x: float, y: float, width: float, colour: str) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{max(width, 1):.1f}" height="{BAR_HEIGHT - 4}" rx="2" fill="{colour}"/>'
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def panel(x: float, y: float, measure: str, values: dict[str, float], colours: dict[str, str]) -> list[str]:
    meaning = MEASURES[measure]
    better = "more is better" if meaning.higher_is_better else "less is better"
    parts = [text(x, y + 12, measure, "heading"), text(x, y + 27, f"{meaning.unit}, {better}", "note")]
    longest = max(values.values())
    for index, (name, value) in enumerate(values.items()):
        top, width = y + HEADING + index * BAR_HEIGHT, BAR_WIDTH * value / longest
        parts += [bar(x, top, width, colours[name]), text(x + width + 6, top + 11, number(value))]
    return parts


def legend(titles: dict[str, str], colours: dict[str, str]) -> tuple[list[str], int]:
    """Who has which colour, in as many lines as that takes, and where the panels begin below it."""
    parts, x, y = [], 16, 16
    for name, title in titles.items():
        width = 40 + 7 * len(title)
        if x + width > COLUMNS * PANEL_WIDTH:
            x, y = 16, y + BAR_HEIGHT
        parts += [bar(x, y, 14, colours[name]), text(x + 20, y + 11, title)]
        x += width
    return parts, y + 36


def ratio_plot(results: Results, titles: dict[str, str]) -> str:
    """The medians of `results` as an SVG document; `titles` names the contenders in the order of their bars."""
    machine = f"All processes on one machine with {os.cpu_count()} cores, over loopback, in turns. Medians."
    colours = dict(zip(titles, COLOURS, strict=False))
    height = HEADING + len(titles) * BAR_HEIGHT + 22
    measures = [measure for measure in HEADLINES if measure in results.samples]
    rows = -(-len(measures) // COLUMNS)
    parts, first = legend(titles, colours)
    for index, measure in enumerate(measures):
        values = {name: results.median(measure, name) for name in titles}
        left, top = 16 + index % COLUMNS * PANEL_WIDTH, first + index // COLUMNS * height
        parts += panel(left, top, measure, values, colours)
    bottom = first + rows * height
    parts.append(text(16, bottom + 4, machine, "note"))
    size = f'width="{COLUMNS * PANEL_WIDTH + 16}" height="{bottom + 16}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'
