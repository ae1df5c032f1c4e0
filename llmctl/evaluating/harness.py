"""Run tasks of EleutherAI's lm-evaluation-harness offline on a model loaded by transformers (extra `bench`)."""

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from llmctl.artifacts.find import kind_of
from llmctl.artifacts.hub import shown
from llmctl.artifacts.load import choose_device
from llmctl.config import EvaluateConfig
from llmctl.converting.convert import export_model
from llmctl.data.sources import expand
from llmctl.errors import MissingExtraError, UsageError
from llmctl.formats.artifact import Artifact, read_artifact

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def run_tasks(path: Path, tasks: Sequence[str], config: EvaluateConfig, *, quiet: bool = False) -> dict[str, Any]:
    """Return the metrics of every task: `{"model": ..., "tasks": {task: {metric: value}}}`.

    A task is the name of a task of the harness, with its data in the local cache, or a YAML file that defines one.
    Raises: MissingExtraError without the harness; UsageError for a model that transformers cannot load, or a task that
        cannot be loaded.
    """
    artifact = read_artifact(path)
    require_published(artifact)
    for name in (*OFFLINE, *(["TQDM_DISABLE"] if quiet else [])):  # set before the libraries read them on import
        os.environ.setdefault(name, "1")
    try:
        lm_eval, lm_eval_tasks = import_module("lm_eval"), import_module("lm_eval.tasks")
    except ImportError as error:
        raise MissingExtraError("`--tasks`", "lm-eval", "[hf]") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [name for name in tasks if name.endswith(".yaml")]
    manager = lm_eval_tasks.TaskManager(include_path=[str(Path(name).parent) for name in files] or None)
    names = [described_task(name) if name in files else name for name in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm-evaluation-harness has no task `{unknown[0]}`", "`lm_eval ls tasks` lists its tasks")
    with as_folder(path) as folder:
        try:
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": "float32" if config.dtype == "auto" else config.dtype},
                tasks=list(names),
                limit=config.limit or None,
                batch_size=config.batch_size,
                device=choose_device(config.device),
                task_manager=manager,
                bootstrap_iters=0,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UsageError(
                f"lm-evaluation-harness cannot run `{','.join(names)}`: {reason}",
                "the data of the task must be in the local cache of `datasets`",
            ) from error
    return {"model": shown(path), "tasks": figures_of(results)}


def described_task(path: str) -> str:
    """Return the name of the task that a YAML file defines; the harness parses the rest.

    Raises: NotFoundError for a missing file; UsageError for a file without a task name.
    """
    expand([path])
    match = re.search(
        r"^task:\s*[\"']?([^\s\"'#]+)", Path(path).read_text(encoding="utf-8", errors="replace"), re.MULTILINE
    )
    if not match:
        raise UsageError(f"`{path}` defines no task", "add a line `task: NAME`")
    return match[1]


def require_published(artifact: Artifact) -> None:
    """Refuse a model that transformers cannot load, or that is not a decoder.

    Raises: UsageError.
    """
    if artifact.architecture.startswith("Llmctl"):
        raise UsageError(
            f"`{artifact.path}` is a {artifact.architecture}, which transformers does not support", "use `--task`"
        )
    if artifact.config.family != "decoder" or artifact.config.n_labels:
        raise UsageError(
            f"`{artifact.path}` is {kind_of(artifact.config)}, but `--tasks` needs a decoder", "use `--task`"
        )


@contextmanager
def as_folder(path: Path) -> Iterator[Path]:
    """Yield a model as a folder: itself, or a temporary export of a single file."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="llmctl-") as folder:
        yield export_model(path, Path(folder) / "model", to="hf")


def figures_of(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the metrics in the harness's results, without filter names and standard errors."""
    return {
        task: {
            key.removesuffix(",none"): float(value)
            for key, value in figures.items()
            if isinstance(value, (int, float)) and "_stderr" not in key and key != "sample_len"
        }
        for task, figures in results["results"].items()
    }
