"""`llmctl runs`: list, show, compare and remove runs, as tables or JSON on stdout."""

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llmctl.commands.common import command_app, note, result, result_json, table
from llmctl.errors import UsageError
from llmctl.runs.terminal import plain

app = command_app()

COLUMNS = ("run", "status", "objective", "parameters", "steps", "held out", "begun", "time", "size")
RIGHT = frozenset({"parameters", "steps", "time", "size"})
DROPPED_FIRST = ("begun", "size", "parameters", "objective", "time", "run", "steps", "held out", "status")
"""Columns dropped on a narrow terminal, in this order; a dropped run name is replaced by its number."""
MANY = 24
"""Maximum lines that `show` prints of one kind; --json has all."""


@app.callback(invoke_without_command=True)
def runs(
    context: typer.Context, json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False
) -> None:
    """List training runs; the subcommands `show`, `diff` and `rm` show, compare and remove them.

    Examples:

      llmctl runs

      llmctl runs show latest

      llmctl runs diff 0001 0002

      llmctl runs rm 0001 --checkpoints -y
    """
    if context.invoked_subcommand is None:
        ls(json=json)
    elif json:
        raise UsageError("`--json` precedes the subcommand", f"`llmctl runs {context.invoked_subcommand} ... --json`")


@app.command()
def ls(json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False) -> None:
    """List runs, newest last, with status (`stopped`: the process died) and best validation metric.

    Examples:

      llmctl runs ls

      llmctl runs ls --json
    """
    from llmctl.runs.folder import runs_folder
    from llmctl.runs.history import list_runs

    histories, others = list_runs()
    rows = [run.row() for run in histories]
    if json:
        result_json(rows)
        return
    if rows:
        for line in fit_table([table_row(row) for row in rows], shutil.get_terminal_size((10_000, 24)).columns):
            result(line)
    else:
        note(f"no runs in `{runs_folder()}`; `llmctl pretrain` creates one")
    for row in rows:
        if row["problem"]:
            note(f"{row['run']}: {row['problem']}")
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        note(f"not runs: {', '.join(others[:5])}{more}")


def fit_table(rows: Sequence[Mapping[str, str]], width: int) -> list[str]:
    """Return the table with as many columns as fit in `width`; the last columns are never truncated."""
    columns = list(COLUMNS)
    lines = table(columns, rows, right=RIGHT)
    for dropped in DROPPED_FIRST:
        if max(map(len, lines)) <= width:
            break
        columns.remove(dropped)
        if dropped == "run":
            columns.insert(0, "#")
        lines = table(columns, rows, right=RIGHT)
    return lines


def table_row(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a run's record as the cells of the table."""
    from llmctl.commands.presets import short
    from llmctl.runs.folder import runs_folder

    path = Path(row["run"])
    name = path.name if path.parent == runs_folder() else str(path)  # begun with -o: named by its path
    has_none = row["step"] == 0 and row["status"] == "finished"  # quantized without training
    steps = "-" if row["step"] is None or has_none else f"{row['step']}/{row['total_steps'] or '?'}"
    return {
        "run": name,
        "#": row["number"],
        "status": row["status"],
        "objective": row["objective"] or "-",
        "parameters": "-" if row["n_parameters"] is None else short(row["n_parameters"]),
        "steps": steps,
        "held out": result_of(row),
        "begun": moment(row["begun"]),
        "time": time_taken(row["seconds"]),
        "size": size_of(row["size_bytes"]),
    }


@app.command()
def show(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder, number or prefix of a run, or `latest`.")
    ] = "latest",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a run: recipe, metrics, events, checkpoints, and the command that resumes it.

    Examples:

      llmctl runs show latest

      llmctl runs show 0001 --json
    """
    from llmctl.runs.history import find, in_full

    record = in_full(find(run))
    if json:
        result_json(record)
        return
    for line in report(record):
        result(plain(line))


def report(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the report on a run."""
    yield record["run"]
    cells = table_row(record)
    facts = {name: cells[name] for name in ("status", "objective", "parameters", "steps", "held out")}
    facts |= {"begun": cells["begun"], "time": cells["time"], "size": cells["size"]}
    facts |= {name: record[name] for name in ("command", "model", "error", "problem") if record[name]}
    facts |= {"missing": ", ".join(record["missing"])} if record["missing"] else {}
    yield from pairs(facts)
    for title in ("recipe", "environment"):
        if record[title]:
            yield from ("", f"{title}{' (changes from the defaults)' if title == 'recipe' else ''}")
            yield from pairs(record[title])
    yield from course(record)
    if record["events"]:
        yield from ("", "events")
        yield from few([event_line(event) for event in record["events"]])
    if record["checkpoints"]:
        yield from ("", "checkpoints")
    for saved in record["checkpoints"]:
        name = saved["checkpoint"].rpartition("/")[2]
        yield f"  {name}  {size_of(saved['size_bytes'])}  {saved['defect'] or 'valid'}"
    if record["resume"]:
        yield from ("", f"resume with: {record['resume']}")


def course(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the evaluations as a table and the training loss as a sparkline."""
    from llmctl.metrics.figures import FIGURES
    from llmctl.runs.history import spread
    from llmctl.runs.loss_curve import sparkline

    if record["evaluations"]:
        names = [name for name in FIGURES if any(number_in(line, name) for line in record["evaluations"])]
        labels = {name: FIGURES[name].label for name in names}
        rows = [evaluation_cells(line, labels) for line in record["evaluations"]]
        yield from ("", "held out")
        yield from few([f"  {line}" for line in table(tuple(rows[0]), rows, right=set(rows[0]) - {"text"})])
    losses = record["losses"]
    if losses:
        ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
        bars = sparkline(spread(losses, 24), 24, ascii_only=ascii_only)
        yield from ("", f"loss  {bars}  {figure(losses[0])} -> {figure(losses[-1])}")
    if record["report"]:
        yield from ("", "report")
        yield from (f"  {line}" for line in report_table(record["report"]))
    if not losses and not record["evaluations"] and not record["report"]:
        yield from ("", "no metrics yet")


def report_table(models: Mapping[str, Any]) -> list[str]:
    """Return the figures of the models that a run compared, side by side."""
    from llmctl.metrics.figures import FIGURES

    sides = {name: side for name, side in models.items() if isinstance(side, Mapping)}
    names = [name for name in ("bytes", *FIGURES) if any(number_in(side, name) for side in sides.values())]
    labels = {name: FIGURES[name].label if name in FIGURES else "size" for name in names}
    rows = [
        {
            "model": name,
            **{
                label: size_of(side["bytes"]) if key == "bytes" and number_in(side, key) else figure(side.get(key))
                for key, label in labels.items()
            },
        }
        for name, side in sides.items()
    ]
    return table(("model", *labels.values()), rows, right=set(labels.values()))


def number_in(line: Mapping[str, Any], name: str) -> bool:
    """Return whether a metrics line has a number under this name."""
    return isinstance(line.get(name), (int, float))


def evaluation_cells(line: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, str]:
    """Return one evaluation as table cells; `all` marks those on the whole validation text."""
    return {
        "step": str(line.get("step", "-")),
        **{label: figure(line.get(name)) for name, label in labels.items()},
        "text": "all" if line.get("full") and not line.get("rows") else "sample",
    }


def result_of(row: Mapping[str, Any]) -> str:
    """Return the main metric of a run with its label."""
    from llmctl.metrics.figures import FIGURES

    if row["figure"] is None:
        return "-"
    label = FIGURES[row["metric"]].label if row["metric"] in FIGURES else row["metric"]
    return f"{figure(row['figure'])} {label}"


def few(lines: Sequence[str]) -> list[str]:
    """Return the lines; if there are more than MANY, only the first two and the last ones."""
    if len(lines) <= MANY:
        return list(lines)
    return [*lines[:2], f"  ... {len(lines) - MANY} more, --json has all", *lines[len(lines) - MANY + 2 :]]


def event_line(event: Mapping[str, Any]) -> str:
    """Return an event as one line, with all its fields."""
    rest = {key: value for key, value in event.items() if key not in ("kind", "step", "seconds")}
    return f"  step {event.get('step', '-')}: " + ", ".join(f"{key} {value}" for key, value in rest.items())


def pairs(facts: Mapping[str, Any]) -> list[str]:
    """Return one aligned line per fact."""
    width = max(map(len, facts))
    return [f"  {name:<{width}}  {value_of(value)}" for name, value in facts.items()]


def value_of(value: Any) -> str:
    """Return a recipe or environment value on one line."""
    if value is None:
        return "-"
    return " ".join(str(value).split()) if value != "" else '""'


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Run: folder, number or prefix, or `latest`.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Run to compare with A.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two runs: recipe, environment and final metrics.

    Examples:

      llmctl runs diff 0001 0002

      llmctl runs diff 0001 latest --json
    """
    from llmctl.runs.history import compare, find

    record = compare(find(a), find(b))
    if json:
        result_json(record)
        return
    for line in comparison(record):
        result(plain(line))
    if record["held_out_differs"]:
        keys = ", ".join(f"`{key}`" for key in record["held_out_differs"])
        note(f"the metrics are on different validation data or tasks: {keys}")


def comparison(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a comparison."""
    yield from (f"A  {record['a']}", f"B  {record['b']}")
    for title in ("recipe", "environment"):
        yield from ("", title)
        if record[title] is None:
            yield "  not recorded for both"
        elif not record[title]:
            yield "  the same"
        else:
            both = {key: f"{value_of(old)} -> {value_of(new)}" for key, (old, new) in record[title].items()}
            yield from pairs(both)
    rows = [
        {"metric": name, **{side: exact(value) for side, value in values.items()}}
        for name, values in record["figures"].items()
    ]
    renamed = [{"metric": row["metric"], "A": row["a"], "B": row["b"], "B - A": row["difference"]} for row in rows]
    yield from ("", *table(("metric", "A", "B", "B - A"), renamed, right=("A", "B", "B - A")))


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(metavar="RUN", help="Runs: folder, number or prefix, or `latest`.")],
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Remove only checkpoints, and only those of finished runs.")
    ] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask for confirmation.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Remove runs, or only their checkpoints, and print the removed paths.

    Examples:

      llmctl runs rm 0001 0002

      llmctl runs rm 0003 --checkpoints -y
    """
    from llmctl.runs.removal import choose, remove

    chosen = choose(names, checkpoints=checkpoints)
    to_remove = [removal for removal in chosen if not removal.kept]
    if to_remove and not (yes or confirm([f"{removal.path}  {size_of(removal.size_bytes)}" for removal in to_remove])):
        note("nothing was removed")
        chosen = []
    records = []
    for removal in remove(chosen):
        records.append(
            {
                "run": str(removal.run),
                "removed": None if removal.kept else str(removal.path),
                "size_bytes": removal.size_bytes,
                "kept": removal.kept or None,
            }
        )
        if removal.kept:
            note(f"kept the checkpoints of {removal.run}: {removal.kept}")
        elif not json:
            result(str(removal.path))
    if json:
        result_json(records)


def confirm(lines: Sequence[str]) -> bool:
    """Ask for confirmation on the terminal.

    Raises: UsageError if stdin is not a terminal.
    """
    if not sys.stdin.isatty():
        raise UsageError("removal needs confirmation and stdin is not a terminal", "pass `-y`")
    for line in lines:
        note(line)
    # click.confirm would write to stdout, which is reserved for the result.
    sys.stderr.write("remove permanently? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def figure(value: Any) -> str:
    """Format a metric with three decimals."""
    from llmctl.metrics.figures import shown

    return shown(value, ".3f") if isinstance(value, (int, float)) else "-"


def exact(value: float | None) -> str:
    """Format an integer as it is and a metric with four decimals."""
    if value is None:
        return "-"
    from llmctl.metrics.figures import shown

    return f"{value:,}" if isinstance(value, int) else shown(value, ",.4f")


def moment(begun: str | None) -> str:
    """Return a timestamp to the minute."""
    return begun[:16].replace("T", " ") if begun else "-"


def time_taken(seconds: float | None) -> str:
    """Return seconds as m:ss."""
    from llmctl.runs.progress import clock

    return "-" if seconds is None else clock(seconds)


def size_of(n_bytes: int) -> str:
    """Return a number of bytes with its unit."""
    from llmctl.jobs.estimate import size

    return size(n_bytes)
