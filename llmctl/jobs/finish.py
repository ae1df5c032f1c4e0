"""What a finished run leaves: the model, its card and loss curve, the summary, and the closing lines.

Knows nothing of how the model was trained; every training command ends here.
"""

import hashlib
import json
import lzma
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmctl.artifacts.hub import in_cache
from llmctl.distributed.runtime import Runtime, describe_environment
from llmctl.families.table import family_for
from llmctl.files import atomic_path, write_bytes
from llmctl.formats.artifact import GGUF, INDEX, WEIGHTS
from llmctl.formats.artifact_write import write_artifact
from llmctl.metrics.figures import rounded
from llmctl.model.transformer import LanguageModel, with_tied
from llmctl.preparing.corpus import Corpus
from llmctl.recipe import nested
from llmctl.runs.folder import Run
from llmctl.runs.loss_curve import loss_svg
from llmctl.runs.metrics_file import MetricsFile
from llmctl.runs.model_card import model_card
from llmctl.runs.progress import Progress
from llmctl.training.inputs import Fitted

XZ_LIMIT_BYTES = 20_000_000
"""Held-out text larger than this is not compressed for comparison."""

XZ_BYTES_PER_MINUTE = 2_000_000
"""Held-out text per minute of budget that is compressed for comparison: about two hundredths of the time."""

Write = Callable[[Path, Mapping[str, Any]], None]
"""Writes the model into the run folder, with its provenance."""


@dataclass(frozen=True)
class Product:
    """What a job has made.

    provenance: what the model file says beside recipe, data and metrics. facts: more for the summary. note: a sentence for
    the model card. closing: the closing lines: what was made, its key metric, the next command. missed: the gate that was
    missed, or nothing. file: the model's file in the run folder. The three functions run in the first process only; `note`
    and `closing` take the summary.
    """

    model: LanguageModel
    corpus: Corpus
    fitted: Fitted
    metric: str
    write: Write
    closing: Callable[[Mapping[str, Any]], str]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    facts: Callable[[], Mapping[str, Any]] = dict
    note: Callable[[Mapping[str, Any]], str] = lambda _: ""
    missed: str = ""
    file: str = WEIGHTS


@dataclass(frozen=True)
class Trained:
    """What a training command reports: where the model is, the summary, and the gate it missed, if any."""

    path: Path
    summary: dict[str, Any]
    missed: str = ""


PATH_KEYS = {"paths", "val_paths", "held_out", "path", "shards", "model", "more", "shape", "cache"}
"""Keys of recipes and provenance whose strings may be paths."""


def without_folders(value: Any, *, is_path: bool = False) -> Any:
    """Return a recipe or provenance with the base names of the files and folders in it.

    What is published says nothing about the machine, and the same data gives the same bytes wherever it lies. A model of
    the Hugging Face Hub keeps its name.
    """
    if isinstance(value, Mapping):
        return {key: without_folders(item, is_path=key in PATH_KEYS) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(item, is_path=is_path) for item in value]
    if is_path and isinstance(value, str) and "/" in value:
        if (published := in_cache(Path(value))) is not None:
            return str(published)
        return ":".join(Path(part).name for part in value.split(":"))  # `a.en:a.de` names two files
    return value


def recipe_sha256(config: Any) -> str:
    """Return the sha256 of a resolved recipe; files count by their names."""
    return hashlib.sha256(json.dumps(without_folders(nested(config)), sort_keys=True).encode()).hexdigest()


def is_file(out: Path) -> bool:
    """Tell whether `-o` names a single file."""
    return out.suffix in (".safetensors", ".gguf")


def whole_model(model: LanguageModel, weights: Mapping[str, Tensor], files: Mapping[str, bytes]) -> Write:
    """Return what writes trained weights as a model in float32."""

    def write(folder: Path, provenance: Mapping[str, Any]) -> None:
        state = {name: tensor.float().cpu() for name, tensor in with_tied(model.config, weights).items()}
        write_artifact(folder, model.config, state, files=files, provenance=provenance, force=True)

    return write


def finish(
    product: Product,
    *,
    run: Run,
    config: Any,
    objective: str,
    invocation: str,
    started: float,
    runtime: Runtime,
    progress: Progress,
) -> Trained:
    """Write the model, its card and its loss curve, mark the run as finished, and tidy up."""
    facts, fitted, shape = product.facts(), product.fitted, product.model.config
    # Only what the recipe and the seed determine: the file is the same, byte for byte, when made again.
    provenance = {
        "objective": objective,
        "recipe_sha256": recipe_sha256(config),
        "data": without_folders(product.corpus.provenance),
        "tokenizer_sha256": product.corpus.tokenizer.sha256,
        "steps": fitted.kept_step,
        "held_out": rounded(fitted.after),
        **product.provenance,
    }
    product.write(run.path, provenance)
    for other in (GGUF,) if product.file == WEIGHTS else (WEIGHTS, INDEX):
        (run.path / other).unlink(missing_ok=True)  # of a run that this one replaced
    path = run.path if product.file == WEIGHTS else run.path / product.file
    if run.record.get("out"):
        path = Path(run.record["out"])
        with atomic_path(path) as temporary:
            shutil.copyfile(run.path / product.file, temporary)
    summary: dict[str, Any] = {
        "model": str(path),
        "objective": objective,
        "architecture": family_for(shape).architecture,
        "n_parameters": product.model.n_parameters,
        "steps": fitted.state.step,
        "tokens": fitted.state.tokens,
        "kept_step": fitted.kept_step,
        "metric": product.metric,
        "before": rounded(fitted.before),
        "after": rounded(fitted.after),
        **facts,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_card(run, product, summary, invocation)
    run.finish(
        family=shape.family,
        has_head=shape.n_labels > 0,
        seconds=summary["seconds"],
        summary=summary,
        environment=describe_environment(runtime),
    )
    progress.say(product.closing(summary))
    shutil.rmtree(run.path / "data", ignore_errors=True)  # last: text that came from a pipe is nowhere else
    return Trained(path, summary, product.missed)


def write_card(run: Run, product: Product, summary: Mapping[str, Any], invocation: str) -> None:
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
        "family": product.model.config.family,
        "n_labels": product.model.config.n_labels,
        "head": product.model.config.head,
        "data": without_folders(product.corpus.provenance),
        "note": product.note(summary),
        "command": shlex.join(map(shown_argument, shlex.split(invocation))),
    }
    write_bytes(run.path / "README.md", model_card(facts).encode())


def shown_argument(argument: str) -> str:
    """Return an argument of a command line as the model card shows it: absolute paths by their base names."""
    option, equals, value = argument.rpartition("=")
    return option + equals + (Path(value).name if value.startswith(("/", "~")) else value)


def xz_comparison(corpus: Corpus, minutes: float = 0.0) -> dict[str, float]:
    """Return what `xz -9` makes of the held-out text, in bits per byte, as a yardstick anybody has.

    It must be quick: within a budget of minutes the text may be smaller.
    """
    most = min(XZ_LIMIT_BYTES, minutes * XZ_BYTES_PER_MINUTE) if minutes else XZ_LIMIT_BYTES
    if not 0 < corpus.held_out_bytes() <= most:
        return {}
    text = corpus.held_out_text().encode()
    return {"xz_bits_per_byte": round(8 * len(lzma.compress(text, preset=9)) / len(text), 4)}
