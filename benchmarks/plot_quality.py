"""Draw the quality of quantized models against their size: quality.json -> quality.svg, without a plotting library.

    python benchmarks/plot_quality.py

The x axis is the file size, the y axis the KL divergence to the original on a logarithmic scale: lower left is better. The
numbers of quality.json are strings with the digits that were published, so that text and plot cannot disagree. The
picture has its own background and follows the color scheme of the reader.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
DATA, PLOT = HERE / "quality.json", HERE / "quality.svg"

WIDTH, HEIGHT = 720, 430
LEFT, RIGHT, TOP, BOTTOM = 70, 700, 60, 370
MB = (70.0, 115.0)
KL = (0.01, 1.0)
MB_TICKS = (70, 80, 90, 100, 110)
KL_TICKS = (0.01, 0.1, 1)
FONT_SIZE = 12
CHARACTER_WIDTH = 6.6
"""Mean width of a character in a label, to keep labels apart."""

SERIES = {
    "llama.cpp": "a",
    "llama.cpp, imatrix": "b",
    "llmctl quantize": "c",
    "llmctl quantize --to gguf": "d",
    "AutoRound": "e",
}
"""CSS class of each series."""

STYLE = """
  svg { font: 12px system-ui, sans-serif; }
  .back { fill: #ffffff; } .text { fill: #1f2328; } .grid { stroke: #d1d9e0; }
  .a { fill: #9a6700; } .b { fill: #57606a; } .c { fill: #0969da; } .d { fill: #1a7f37; } .e { fill: #8250df; }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117; } .text { fill: #f0f6fc; } .grid { stroke: #3d444d; }
    .a { fill: #d29922; } .b { fill: #9198a1; } .c { fill: #4493f8; } .d { fill: #3fb950; } .e { fill: #ab7df8; }
  }
"""


class Box(NamedTuple):
    """A rectangle that is taken."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )


def x_of(mb: float) -> float:
    return LEFT + (mb - MB[0]) / (MB[1] - MB[0]) * (RIGHT - LEFT)


def y_of(kl: float) -> float:
    low, high = math.log(KL[0]), math.log(KL[1])
    return BOTTOM - (math.log(kl) - low) / (high - low) * (BOTTOM - TOP)


def text(x: float, y: float, content: str, anchor: str = "start") -> str:
    return f'<text class="text" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def axes() -> list[str]:
    """Return grid lines, ticks and axis titles."""
    lines = []
    for mb in MB_TICKS:
        x = x_of(mb)
        lines += [f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{BOTTOM}"/>']
        lines += [text(x, BOTTOM + 18, str(mb), "middle")]
    for kl in KL_TICKS:
        y = y_of(kl)
        lines += [f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}"/>']
        lines += [text(LEFT - 8, y + 4, str(kl), "end")]
    middle = (TOP + BOTTOM) / 2
    title = text(0, 0, "KL divergence, nats per token", "middle")
    lines += [f'<g transform="translate(20 {middle:.1f}) rotate(-90)">{title}</g>']
    return [*lines, text((LEFT + RIGHT) / 2, BOTTOM + 42, "size of the file, MB (lower left is better)", "middle")]


def labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a label beside each point, where it covers neither points nor other labels."""
    points = [(x_of(float(row["mb"])), y_of(float(row["kl"]))) for row in rows]
    taken = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
    lines = []
    for row, (x, y) in zip(rows, points, strict=True):
        width = CHARACTER_WIDTH * len(row["name"])
        places = [(x + 8, y + 4, "start"), (x - 8, y + 4, "end"), (x + 8, y + 18, "start"), (x + 8, y - 10, "start")]
        for place_x, place_y, anchor in places:
            left = place_x if anchor == "start" else place_x - width
            box = Box(left, place_y - FONT_SIZE + 2, left + width, place_y + 2)
            if box.left >= LEFT - 5 and not any(box.overlaps(other) for other in taken):
                break
        else:
            raise ValueError(f"no place for the label `{row['name']}`")
        taken.append(box)
        lines.append(text(place_x, place_y, row["name"], anchor))
    return lines


def svg(data: Mapping[str, Any]) -> str:
    """Return the plot."""
    rows = data["rows"]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">',
        f"<title>{escape(data['title'])}: KL divergence against size</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        text(LEFT, 22, data["title"]),
        *axes(),
    ]
    at = float(LEFT)
    for name, style in SERIES.items():
        points = [(x_of(float(row["mb"])), y_of(float(row["kl"]))) for row in rows if row["series"] == name]
        lines += [f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
        lines += [f'<circle class="{style}" cx="{at + 5:.1f}" cy="42" r="4"/>', text(at + 15, 46, name)]
        at += CHARACTER_WIDTH * len(name) + 28
    return "\n".join([*lines, *labels(rows), "</svg>", ""])


if __name__ == "__main__":
    PLOT.write_text(svg(json.loads(DATA.read_text(encoding="utf-8"))), encoding="utf-8")
