"""Loss curves: a sparkline for the terminal and an SVG chart for the model card."""

import math
from collections.abc import Sequence


def sparkline(values: Sequence[float], width: int = 30, *, ascii_only: bool = False) -> str:
    """Draw the last `width` values as a line of bars, scaled to their range; non-finite values are dropped."""
    bars = "_.-=*#" if ascii_only else "▁▂▃▄▅▆▇█"
    recent = [value for value in values[-width:] if math.isfinite(value)]
    if not recent:
        return ""
    low, high = min(recent), max(recent)
    span = (high - low) or 1.0
    return "".join(bars[min(len(bars) - 1, int((value - low) / span * len(bars)))] for value in recent)


def loss_svg(train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]) -> str:
    """Draw the loss over the steps as SVG: training as a thin line, held-out as dots joined by a line."""
    points = [*train, *held_out]
    if not points:
        return '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="360"/>\n'
    width, height, left, top = 640, 360, 56, 24
    inner_width, inner_height = width - left - 16, height - top - 40
    last_step = max(1, *(step for step, _ in points))
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    span = (high - low) or 1.0

    def point(step: int, loss: float) -> str:
        return f"{left + inner_width * step / last_step:.1f},{top + inner_height * (high - loss) / span:.1f}"

    def path(series: Sequence[tuple[int, float]]) -> str:
        return " ".join(point(step, loss) for step, loss in series)

    ticks = "".join(
        f'<text x="{left - 6}" y="{top + inner_height * share + 4:.1f}" text-anchor="end">{high - span * share:.2f}</text>'
        f'<line x1="{left}" x2="{width - 16}" y1="{top + inner_height * share:.1f}" y2="{top + inner_height * share:.1f}" '
        'stroke="#ddd"/>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    dots = "".join(
        '<circle r="3" fill="#c33" cx="{}" cy="{}"/>'.format(*point(step, loss).split(",")) for step, loss in held_out
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{ticks}'
        f'<polyline fill="none" stroke="#36c" stroke-width="1" points="{path(train)}"/>'
        f'<polyline fill="none" stroke="#c33" stroke-width="1.5" points="{path(held_out)}"/>{dots}'
        f'<text x="{left}" y="{height - 20}">0</text>'
        f'<text x="{width - 16}" y="{height - 20}" text-anchor="end">{last_step} steps</text>'
        f'<text x="{left}" y="14">loss, nats per label: <tspan fill="#36c">training</tspan>, '
        f'<tspan fill="#c33">held out</tspan></text></svg>\n'
    )
