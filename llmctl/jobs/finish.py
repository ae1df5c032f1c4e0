"""What a finished run leaves: the model, its card and its picture, the summary, and the closing words.

Knows nothing of how the model was trained; every training command ends here.
"""

import hashlib
import json
import lzma
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.distributed.runtime import describe_environment
from llmctl.files import atomic_path, write_bytes
from llmctl.formats.families.table import family_for
from llmctl.jobs.job import Job
from llmctl.metrics.figures import rounded
from llmctl.preparing.corpus import Corpus
from llmctl.recipe import nested
from llmctl.runs.folder import Run
from llmctl.runs.loss_curve import loss_svg
from llmctl.runs.metrics_file import MetricsFile
from llmctl.runs.model_card import model_card
from llmctl.training.loop import Fitted, Training

XZ_LIMIT_BYTES = 20_000_000
"""Held-out text larger than this is not compressed for comparison."""


@dataclass(frozen=True)
class Trained:
    """What a training command reports."""

    path: Path
    summary: dict[str, Any]
    missed: str = ""
    """Which gate was missed; the model is there all the same."""


def recipe_sha256(config: Any) -> str:
    """Return the sha256 of a resolved recipe."""
    return hashlib.sha256(json.dumps(nested(config), sort_keys=True).encode()).hexdigest()


def is_file(out: Path) -> bool:
    """Tell whether `-o` names a single file."""
    return out.suffix == ".safetensors"


def finish(run: Run, job: Job, training: Training, fitted: Fitted, *, command: str, started: float) -> Trained:
    """Write the model, its card and its picture, mark the run as finished, and tidy up."""
    facts = job.facts()
    # Only what the recipe and the seed determine: the file is the same, byte for byte, when made again.
    provenance = {
        "objective": job.objective,
        "recipe_sha256": recipe_sha256(job.config),
        "data": job.corpus.provenance,
        "tokenizer_sha256": job.corpus.tokenizer.sha256,
        "steps": fitted.kept_step,
        "held_out": rounded(fitted.after),
    } | job.provenance()
    job.write(run.path, fitted, provenance)
    written = run.path
    out = Path(run.record["out"]) if run.record.get("out") else None
    if out is not None:
        with atomic_path(out) as temporary:
            shutil.copyfile(written / "model.safetensors", temporary)
        written = out
    summary: dict[str, Any] = {
        "model": str(written),
        "objective": job.objective,
        "architecture": family_for(job.model.config).architecture,
        "n_parameters": job.model.n_parameters,
        "steps": fitted.state.step,
        "tokens": fitted.state.tokens,
        "kept_step": fitted.kept_step,
        "metric": training.metric,
        "before": rounded(fitted.before),
        "after": rounded(fitted.after),
        **facts,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_pictures(run, job, summary, command)
    run.finish(
        family=job.model.config.family,
        has_head=job.model.config.n_labels > 0,
        seconds=summary["seconds"],
        summary=summary,
        environment=describe_environment(training.runtime),
    )
    training.progress.say(job.closing(summary, run))
    shutil.rmtree(run.path / "data", ignore_errors=True)  # last: text that came from a pipe is nowhere else
    return Trained(written, summary, job.missed())


def write_pictures(run: Run, job: Job, summary: Mapping[str, Any], command: str) -> None:
    """Write `loss.svg` and the model card."""
    lines = MetricsFile(run.path / "metrics.jsonl").read()
    curves: dict[str, list[tuple[int, float]]] = {"train": [], "eval": []}
    for line in lines:
        if line["kind"] in curves and line["loss"] is not None:
            curves[line["kind"]].append((line["step"], line["loss"]))
    write_bytes(run.path / "loss.svg", loss_svg(curves["train"], curves["eval"]).encode())
    facts = {
        **summary,
        "name": run.path.name,
        "family": job.model.config.family,
        "n_labels": job.model.config.n_labels,
        "data": job.corpus.provenance,
        "note": job.card_note(summary),
        "command": command,
    }
    write_bytes(run.path / "README.md", model_card(facts).encode())


def xz_comparison(corpus: Corpus) -> dict[str, float]:
    """Return what `xz -9` makes of the held-out text, in bits per byte, as a yardstick anybody has."""
    if not 0 < corpus.held_out_bytes() <= XZ_LIMIT_BYTES:
        return {}
    text = corpus.held_out_text().encode()
    return {"xz_bits_per_byte": round(8 * len(lzma.compress(text, preset=9)) / len(text), 4)}
