"""Report of a compression: the frontier of plans, the stages from the original to the file, and the file itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.compressing.plans import Plan, described
from llmctl.config import CompressConfig, ModelConfig
from llmctl.formats.artifact import Artifact
from llmctl.metrics.figures import FIGURES, rounded, shown
from llmctl.metrics.gate import parse_gate
from llmctl.quantizing.bit_allocation import parse_size
from llmctl.quantizing.report import READING, WRITING
from llmctl.runs.comparison import ROWS, Report

FULL = 0.97
"""The fraction of the size that a file takes, unless there is nothing to fill it with."""

MOST_PLANS = 8
"""Plans of the frontier that are shown."""


def read_json(path: Path) -> Any:
    """Read a record of this run."""
    return json.loads(path.read_text(encoding="utf-8"))


def best_so_far(parts: Path) -> str:
    """Return a line on the best file that an unfinished run has written; empty if there is none."""
    trials = {path: read_json(path)["cost"] for path in parts.glob("trial-*.json")}
    files = {path.with_suffix(".safetensors"): cost for path, cost in trials.items()}
    done = {path: cost for path, cost in files.items() if path.is_file()}
    if not done:
        return ""
    best = min(done, key=lambda path: done[path])
    return f"the best so far: {best}, {best.stat().st_size / 1e6:,.2f} MB, cost {done[best]:.4f}"


def file_bytes(artifact: Artifact) -> int:
    """Return the bytes of a model's weight files."""
    return sum(path.stat().st_size for path in {path for path, _, _ in artifact.tensors.values()})


def frontier(plans: Sequence[Plan], original: ModelConfig, most: int = MOST_PLANS) -> list[str]:
    """Return plans as a table, best first."""
    return [
        f"{'MB':>10}  {'cost':>10}  plan",
        *(
            f"{plan.n_bytes / 1e6:>10,.2f}  {plan.predicted:>10.4f}  {described(plan.to_dict(), original)}"
            for plan in plans[:most]
        ),
    ]


def frontier_svg(plans: Sequence[Plan], size: int) -> str:
    """Draw the predicted cost of the best plans against their bytes, and the size that was asked for."""
    width, height, left, top, right, bottom = 640, 360, 64, 28, 16, 44
    points = sorted((plan.n_bytes / 1e6, plan.predicted) for plan in plans)
    if not points:
        return '<svg xmlns="http://www.w3.org/2000/svg" width="640" height="360"/>\n'
    xs, ys = [x for x, _ in points] + [size / 1e6], [y for _, y in points]
    low_x, high_x, high_y = min(xs), max(xs), max(ys) or 1.0
    span = (high_x - low_x) or 1.0

    def at(x: float, y: float) -> tuple[str, str]:
        across = left + (width - left - right) * (x - low_x) / span
        return f"{across:.1f}", f"{top + (height - top - bottom) * (1 - y / high_y):.1f}"

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        _, y = at(low_x, high_y * share)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end">{high_y * share:.3g}</text>')
        x, _ = at(low_x + span * share, 0)
        parts.append(f'<text x="{x}" y="{height - 24}" text-anchor="middle">{low_x + span * share:.3g}</text>')
    line = " ".join(",".join(at(x, y)) for x, y in points)
    dots = "".join('<circle r="3" fill="#36c" cx="{}" cy="{}"/>'.format(*at(x, y)) for x, y in points)
    x, _ = at(size / 1e6, 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}'
        f'<line x1="{x}" x2="{x}" y1="{top}" y2="{height - bottom}" stroke="#c33" stroke-dasharray="4"/>'
        f'<polyline fill="none" stroke="#36c" stroke-width="1.5" points="{line}"/>{dots}'
        f'<text x="{left}" y="16">predicted cost without training against file size in MB '
        f'(<tspan fill="#c33">asked for</tspan>)</text></svg>\n'
    )


def make_report(
    config: CompressConfig,
    plan: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, float]],
    metric: str,
    *,
    stages: Sequence[Mapping[str, Any]],
    seconds: float,
) -> Report:
    """Return the report of a run; stages: name and cost, from the original to the result."""
    record: dict[str, Any] = {
        "size": config.size,
        "format": config.format,
        "metric": metric,
        "plan": plan["plan"],
        "stages": [rounded(stage) for stage in stages],
        "models": {name: rounded(figures) for name, figures in measured.items()},
        "frontier": plan["frontier"],
        "trials": plan["trials"],
        "seconds": round(seconds, 1),
    }
    return Report(record, missed(record, config.max_drop))


def missed(record: Mapping[str, Any], gate: str) -> str:
    """Return which gate the model misses, or an empty string."""
    if not gate:
        return ""
    first, last = record["stages"][0], record["stages"][-1]
    sides = record["models"]
    name = record["metric"]
    if name in sides["teacher"] and name in sides["after"] and name not in ("loss", "kl", "perplexity"):
        before, after = sides["teacher"][name], sides["after"][name]
    elif "perplexity" in first:
        name, before, after = "perplexity", first["perplexity"], last["perplexity"]
    else:
        return ""
    if parse_gate(gate).holds(name, before, after):
        return ""
    return f"{name}: {after:.6g} compressed against {before:.6g} before, a drop of more than {gate}"


def render(record: Mapping[str, Any], original: ModelConfig) -> list[str]:
    """Return the report as a table of at most 79 columns."""
    has_perplexity = "perplexity" in record["stages"][0]
    head = f"{'stage':<28}{'cost':>12}" + (f"{'perplexity':>12}" if has_perplexity else "")
    lines = [f"plan: {described(record['plan'], original)}", head]
    for stage in record["stages"]:
        line = f"{stage['stage']:<28}{stage['cost']:>12.4f}"
        lines.append(line + (f"{shown(stage.get('perplexity'), '.2f', absent=''):>12}" if has_perplexity else ""))
    after = record["models"]["after"]
    found = [name for name in ROWS if name in after and name not in ("loss", "perplexity")]
    lines += [f"{FIGURES[name].label:<28}{shown(after[name], FIGURES[name].form):>12}" for name in found]
    before = record["models"]["teacher"]
    for label, name in (("reading", READING), ("writing", WRITING)):
        if name in after:
            lines.append(f"{'tokens/s ' + label:<28}{after[name]:>12,.0f}   before: {before[name]:,.0f}")
    share = record["bytes"] / record["bytes_before"]
    lines.append(f"{record['bytes'] / 1e6:,.3f} MB of {record['bytes_before'] / 1e6:,.3f} MB ({share:.1%})")
    if record["plan"]["n_bytes"] < FULL * parse_size(record["size"]) and record["plan"]["table"] != "float":
        lines.append("all layers have the most bits: a larger file would gain nothing")
    return lines


def note(summary: Mapping[str, Any]) -> str:
    """Return size and stages for the model card."""
    report = summary["report"]
    return f"Compressed to {report['bytes']:,} bytes; the whole report is in `report.json`."
