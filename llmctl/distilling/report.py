"""Report of a distillation: teacher, student and baselines, measured on the same rows and this machine.

Every number is measured or counted from sizes; what was not measured is omitted.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmctl.benchmarking.speed import reading_speed
from llmctl.machine import peak_memory_bytes
from llmctl.metrics.figures import FIGURES, rounded, shown
from llmctl.model.parameters import count
from llmctl.model.transformer import LanguageModel
from llmctl.runs.comparison import ROWS, Report, missed, row

FLOAT_BYTES = 4


def make_report(
    models: Mapping[str, LanguageModel],
    measured: Mapping[str, Mapping[str, float]],
    *,
    before: Mapping[str, float],
    after: Mapping[str, float],
    scratch: Mapping[str, Mapping[str, Any]],
    batch: Mapping[str, Tensor],
    metric: str,
    steps: int,
    rows: int,
    flops: tuple[float, float],
    stages: int,
    gate: str,
    cut: Mapping[str, Any],
    cost_ratio: float,
    device: torch.device,
) -> Report:
    """Return the report of a run.

    before, after: the student's metrics from the loop. scratch: those of the baselines by name. flops: per row, of the
    student and of the teachers. rows: per step. measured: empty if the teacher has another tokenizer.
    """
    sides: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        # Quantized layers have no parameters, and models of transformers no shape of ours.
        n_parameters = count(model.config) if model.stacks() else model.n_parameters
        sides[name] = {
            "n_parameters": n_parameters,
            "bytes_float32": FLOAT_BYTES * n_parameters,
        }
        if name == "student" or measured:
            sides[name] |= {"tokens_per_second": reading_speed(model, batch), **rounded(measured.get(name, {}))}
    # What is measured here beside the teacher replaces what the loop measured of the student.
    sides["student"] = {**rounded(after), **sides["student"]}
    record: dict[str, Any] = {
        "metric": metric,
        "models": sides,
        "student_before_training": rounded(before),
        "cut": dict(cut),
        "parameters_frac": sides["student"]["n_parameters"] / sides["teacher"]["n_parameters"],
        "speed_ratio": sides["student"]["tokens_per_second"] / sides["teacher"]["tokens_per_second"]
        if measured
        else None,
        "steps": steps * stages,
        "flops": {
            "student": flops[0] * rows * steps * stages,
            "teachers": flops[1] * rows * steps * stages,
            "teachers_frac": flops[1] / (flops[0] + flops[1]),
        },
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    # The fairest baseline: the best of its own learning rates, not the student's.
    tuned = {name: dict(found) for name, found in scratch.items() if name.startswith("scratch-lr")}
    if tuned:
        best = min(tuned, key=lambda name: tuned[name]["loss"])
        record["baseline"] = {
            "losses": {name: rounded(found)["loss"] for name, found in tuned.items()},
            "best": best,
            "equal_tokens": rounded(tuned[best]),
            "gap_recovered": recovered(sides, tuned[best]["loss"]),
        }
        if "scratch-compute" in scratch:
            longer = scratch["scratch-compute"]
            record["baseline"] |= {
                "equal_compute": rounded(longer),
                "equal_compute_steps_ratio": cost_ratio,
                "gap_recovered_equal_compute": recovered(sides, longer["loss"]),
            }
    return Report(record, missed(record, gate))


def recovered(sides: Mapping[str, Mapping[str, Any]], scratch_loss: float) -> float | None:
    """Return the fraction of the loss gap between scratch and teacher that the student closes."""
    gap = scratch_loss - sides["teacher"].get("loss", scratch_loss)
    # No gap to close where training from scratch reaches the teacher.
    return None if gap <= 0 else (scratch_loss - sides["student"]["loss"]) / gap


def render(record: Mapping[str, Any]) -> list[str]:
    """Return the report as a table of at most 79 columns: a row per metric, a column per model."""
    sides: dict[str, Mapping[str, Any]] = {
        "teacher": record["models"]["teacher"],
        "cut": {"n_parameters": record["models"]["student"]["n_parameters"]} | record["student_before_training"],
        "student": record["models"]["student"],
    }
    if "baseline" in record:
        sides["scratch"] = record["baseline"]["equal_tokens"]
        if "equal_compute" in record["baseline"]:
            sides["+compute"] = record["baseline"]["equal_compute"]
    lines = [row("", {name: name for name in sides})]
    lines.append(
        row(
            "parameters",
            {name: f"{side['n_parameters']:,}" if "n_parameters" in side else "" for name, side in sides.items()},
        )
    )
    lines.append(
        row(
            "tokens/s",
            {
                name: f"{side['tokens_per_second']:,.0f}" if "tokens_per_second" in side else ""
                for name, side in sides.items()
            },
        )
    )
    for name in ROWS:
        if any(name in side for side in (sides["teacher"], sides["student"])):
            figure = FIGURES[name]
            cells = {side: shown(values.get(name), figure.form, absent="") for side, values in sides.items()}
            lines.append(row(figure.label, cells))
    total = record["flops"]["student"] + record["flops"]["teachers"]
    facts = [
        f"{record['parameters_frac']:.0%} of the parameters"
        + (f", {record['speed_ratio']:.2f}x the speed" if record["speed_ratio"] else ""),
        f"{total:.2g} FLOPs, {record['flops']['teachers_frac']:.0%} of them the teacher's",
        f"peak memory {record['peak_memory_bytes'] / 1e6:,.0f} MB",
    ]
    if "baseline" in record:
        found = record["baseline"]
        gap = found["gap_recovered"]
        text = "-" if gap is None else f"{gap:.1%}"
        more = found.get("gap_recovered_equal_compute")
        facts.append(
            f"fraction of the gap between scratch and teacher that is closed: {text}"
            + (f" ({more:.1%} against scratch with equal compute)" if more is not None else "")
        )
    return [*lines, *facts]
