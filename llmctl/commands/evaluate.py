"""`llmctl evaluate`: models and data -> metrics side by side on stdout, and an optional quality gate."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.commands.before_torch import refuse_missing
from llmctl.commands.common import SameModels, command_app, note, result, result_json, table
from llmctl.commands.grouped_help import settings_of, training_command
from llmctl.config import EvaluateConfig
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from llmctl.evaluating.evaluate import Evaluation

app = command_app()

COSTS = ("parameters", "size", "memory", "tokens/s")
DROPPED_FIRST = ("rows", "tokens/s", "memory", "parameters", "size")
"""Columns dropped on a narrow terminal, in this order; then metrics from the right, but never the main one."""


SETTINGS = {
    "task": "task",
    "data": "data",
    "limit": "limit",
    "metric": "metric",
    "batch_size": "batch_size",
    "seq_len": "seq_len",
    "stride": "stride",
    "pooling": "pooling",
    "template": "template",
    "beams": "beams",
    "max_tokens": "max_tokens",
    "labels": "labels",
    "device": "device",
    "dtype": "dtype",
    "backend": "backend",
}
"""The config keys that the options set."""


@app.command(cls=training_command(EvaluateConfig, SETTINGS))
def evaluate(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Model folders, files, runs or `latest`; the first is the reference."),
    ] = None,
    named: SameModels = None,
    data: Annotated[list[str] | None, typer.Option("-d", "--data", help="File or folder; repeatable.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task; default: the model's"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum rows or text windows.")] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(help="Exit with code 10 if a model is worse than the first by more than this: 0.01 or 1%."),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Metric that --max-drop compares.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per forward pass; does not change the metrics.")] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", "--window", help="Maximum tokens per row or text window.")
    ] = (None),
    stride: Annotated[int | None, typer.Option()] = None,
    pooling: Annotated[str | None, typer.Option()] = None,
    template: Annotated[str | None, typer.Option()] = None,
    beams: Annotated[int | None, typer.Option(help="Beam width (translate, summarize, qa).")] = None,
    max_tokens: Annotated[int | None, typer.Option("-n", "--max-tokens", help="Maximum tokens per answer.")] = None,
    labels: Annotated[str | None, typer.Option(help="File with one label per line (classify).")] = None,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    backend: Annotated[str | None, typer.Option()] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key: columns.text=NAME.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Run lm-evaluation-harness tasks instead, such as arc_easy,piqa (extra `bench`).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> int:
    """Evaluate models on the same data, side by side; arguments are models, data goes after -d.

    Examples:

      llmctl evaluate latest --limit 20

      llmctl evaluate runs/0001 small.safetensors -d held-out.txt --max-drop 1%

      llmctl evaluate sorter -d dev.tsv --set columns.names=text,label
    """
    from llmctl.recipe import load

    if limit == 0:
        raise UsageError("`--limit` is 0: nothing would be measured", "omit it for all rows")
    config = load(EvaluateConfig, settings=set_ or [], flags=settings_of(SETTINGS, locals())).config
    paths = find_models([*(models or []), *(named or [])], quiet=quiet)
    if tasks:
        for option, value in (("--max-drop", max_drop), ("--data", data), ("--task", task)):
            if value:
                raise UsageError(
                    f"`{option} {value}` cannot be combined with `--tasks`",
                    "`--task`, without an s, selects a built-in task",
                )
        return run_harness(paths, tasks, config, json=json, quiet=quiet)
    if max_drop is not None and len(paths) < 2:
        raise UsageError(
            f"`--max-drop {max_drop}` compares models, but only one is given",
            "`llmctl evaluate BEFORE AFTER --max-drop 1%`",
        )
    refuse_missing(config.data)
    note("loading torch", quiet=quiet)
    from llmctl.evaluating import evaluate as engine
    from llmctl.metrics.gate import parse_gate

    gate = None if max_drop is None else parse_gate(max_drop)
    evaluations = []
    for evaluation in engine.evaluate(paths, config, lambda text: note(text, quiet=quiet)):
        evaluations.append(evaluation)
        note(f"{evaluation.model}: {evaluation.metric} {number(evaluation.main)}", quiet=quiet)
    is_per_token = evaluations[0].metric in ("perplexity", "loss")
    is_incomparable = is_per_token and engine.tokenizers_differ(paths, config.backend)
    if is_incomparable:
        note("the tokenizers differ: compare bits_per_byte or accuracy (--metric), not metrics per token", quiet=quiet)
    show(evaluations, json=json)
    if gate is not None:
        engine.check_gate(evaluations, gate)
    return 0


def find_models(names: Sequence[str], *, quiet: bool) -> list[Path]:
    """Resolve the models by name; without names, the default model.

    Raises: NotFoundError for one that does not exist; UsageError for a data file among them.
    """
    from llmctl.artifacts.find import find_named
    from llmctl.commands.common import find_model

    if not names:
        return [find_model(None, "any", quiet=quiet)]
    return [find_named(name, "any") for name in names]


def show(evaluations: Sequence["Evaluation"], *, json: bool) -> None:
    """Print the metrics as a table, the main metric first, or as one JSON object."""
    from llmctl.metrics.figures import is_higher_better

    first = evaluations[0]
    if json:
        result_json(
            {
                "task": first.task,
                "metric": first.metric,
                "higher_is_better": is_higher_better(first.metric),
                "models": [evaluation.record() for evaluation in evaluations],
            }
        )
        return
    others = [name for name in first.measured.figures if not name.startswith("n_") and name != first.metric]
    columns = ["model", first.metric, *others, "rows", *COSTS]
    rows = [cells(evaluation) for evaluation in evaluations]
    for line in fit_table(columns, rows, shutil.get_terminal_size((10_000, 24)).columns):
        result(line)


def cells(evaluation: "Evaluation") -> dict[str, str]:
    """Return an evaluation as the cells of a table."""
    from llmctl.commands.presets import short
    from llmctl.commands.runs import size_of

    record, memory = evaluation.record(), evaluation.peak_memory_bytes
    return {
        "model": evaluation.model,
        **{name: number(value) for name, value in evaluation.measured.figures.items()},
        "rows": f"{evaluation.measured.n_rows}",
        "parameters": short(evaluation.n_parameters),
        "size": size_of(evaluation.size_bytes),
        "memory": "-" if memory is None else size_of(memory),
        "tokens/s": f"{record['tokens_per_second']:.0f}",
    }


def number(value: float) -> str:
    """Format a metric with four decimals, three from 10 on; `-` if it is not finite."""
    if not math.isfinite(value):
        return "-"
    from llmctl.metrics.figures import shown

    return shown(value, ".4f" if abs(value) < 10 else ".3f")


def fit_table(columns: Sequence[str], rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """Return the table with as many columns as fit in `width`; the model and the main metric always stay."""
    kept = list(columns)
    filled = [{name: row.get(name, "-") for name in columns} for row in rows]
    for dropped in (*DROPPED_FIRST, *reversed(kept[2:])):
        lines = table(kept, filled, right=set(columns[1:]))
        if max(map(len, lines)) <= width:
            return lines
        kept = [name for name in kept if name != dropped]
    return table(kept, filled, right=set(columns[1:]))


def run_harness(paths: Sequence[Path], tasks: str, config: "EvaluateConfig", *, json: bool, quiet: bool) -> int:
    """Run lm-evaluation-harness tasks and print their metrics."""
    from llmctl.evaluating.harness import run_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    records = [run_tasks(path, names, config, quiet=quiet) for path in paths]
    if json:
        result_json({"tasks": names, "models": records})
        return 0
    rows = [
        {"model": record["model"], "task": name, "metric": metric, "value": number(value)}
        for record in records
        for name, metrics in record["tasks"].items()
        for metric, value in metrics.items()
    ]
    for line in table(("model", "task", "metric", "value"), rows, right={"value"}):
        result(line)
    return 0
