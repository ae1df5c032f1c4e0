"""Shared by the training commands: options, starting and resuming runs, and launching several processes."""

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from llmctl.commands.common import find_model, note, result, result_json
from llmctl.commands.grouped_help import settings_of, training_command

if TYPE_CHECKING:
    from llmctl.distributed.launch import Layout
    from llmctl.jobs.finish import Trained
    from llmctl.recipe import Resolved

# Options of multi-process training, shared with `doctor`.
Nproc = Annotated[int, typer.Option(help="Processes to start on this host.")]
Nnodes = Annotated[int, typer.Option(help="Number of hosts; run the command on each.")]
NodeRank = Annotated[int, typer.Option(help="Number of this host, from 0.")]
Master = Annotated[str, typer.Option(help="HOST:PORT of host 0.")]


KEYS = {
    "steps": "train.steps",
    "minutes": "train.minutes",
    "batch_size": "train.batch_size",
    "seq_len": "train.seq_len",
    "seed": "train.seed",
    "device": "train.device",
    "dtype": "train.dtype",
    "compile_": "train.compile",
    "track": "train.track",
    "parallel": "parallel.strategy",
    "deterministic": "parallel.deterministic",
}
"""The config keys that these options set, by their names below."""


@dataclass(frozen=True)
class Options:
    """Options of every training command."""

    recipe: Annotated[str | None, typer.Option("-r", "--recipe", help="YAML recipe; `-`: standard input.")] = None
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output folder, or X.safetensors for a single file.")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Budget in optimizer steps")] = None
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes of wall time.")] = None
    batch_size: Annotated[
        str | None,
        typer.Option(
            "--batch-size", "--batch", help="Rows per step; `auto`: the default, in micro-batches that fit in memory."
        ),
    ] = None
    seq_len: Annotated[int | None, typer.Option(help="Tokens per row.")] = None
    seed: Annotated[int | None, typer.Option(help="Seed for weights, data order and masking.")] = None
    device: Annotated[str | None, typer.Option()] = None
    dtype: Annotated[str | None, typer.Option()] = None
    compile_: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = None
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key: section.key=value.")] = None
    nproc: Nproc = 1
    nnodes: Nnodes = 1
    node_rank: NodeRank = 0
    master: Master = ""
    max_restarts: Annotated[int, typer.Option(help="Restarts from the last checkpoint when a process dies.")] = 0
    parallel: Annotated[str | None, typer.Option()] = None
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="Bit-identical weights on 1, 2 or 4 processes.")
    ] = None
    track: Annotated[list[str] | None, typer.Option(help="Log metrics to tensorboard, trackio, wandb, ...")] = None
    resume: Annotated[
        str | None,
        typer.Option(help="Run to resume: folder, number, `latest`, or `auto`: the run in -o if it exists."),
    ] = None
    allow_change: Annotated[
        list[str] | None, typer.Option(help="With --resume: key that may differ from the run's recipe.")
    ] = None
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved recipe and exit.")] = False
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the metrics.")] = False
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print a line per step.")] = False

    def flags(self) -> dict[str, Any]:
        """Return the config keys that these options set."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.batch_size == "auto":
            values["batch_size"] = None
        micro_batch_size = -1 if self.batch_size == "auto" else None
        return settings_of(KEYS, values) | {"train.micro_batch_size": micro_batch_size}

    def resolve(self, config_class: type, flags: Mapping[str, Any]) -> "Resolved[Any]":
        """Resolve the config from recipe, environment and options; `flags` are the keys set by the command itself."""
        from llmctl.recipe import load

        refuse_shared_stdin(self.recipe, self.nproc * self.nnodes)
        settings = self.set_ or []
        return load(config_class, recipe=self.recipe, settings=settings, flags=self.flags() | dict(flags))


def help_of(config_class: type, keys: Mapping[str, str]) -> type:
    """Return the class of a training command whose own parameters set `keys`, beside the shared options."""
    return training_command(config_class, {**KEYS, **keys})


def with_options(command: Callable[..., int]) -> Callable[..., int]:
    """Replace the `options` parameter of a command by one command-line option per field of Options."""
    own = inspect.signature(command, eval_str=False)
    hints = get_type_hints(Options, include_extras=True)
    shared = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=hints[item.name])
        for item in fields(Options)
    ]

    @wraps(command)
    def run(**values: Any) -> int:
        options = Options(**{item.name: values.pop(item.name) for item in fields(Options)})
        return command(options=options, **values)

    kept = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "options"
    ]
    parameters = [*kept, *shared]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def needs_model(options: Options, model: str | None, config: Any) -> bool:
    """Tell whether a command has to find its model: not to resume, nor to print the defaults."""
    is_named = bool(model or config.model)
    return options.resume in (None, "auto") and (is_named or not options.print_config)


def with_model(resolved: "Resolved[Any]", model: str | None, *, quiet: bool) -> "Resolved[Any]":
    """Return the config with the model resolved: the argument, the recipe's, or the default model."""
    from llmctl.recipe import Resolved

    name = model or resolved.config.model or None
    path = find_model(name, "any", quiet=quiet or name is not None)
    if name is not None and str(path) != name:
        note(f"model: {path}", quiet=quiet)
    origins = resolved.origins | ({"model": "flag"} if model else {})
    return Resolved(replace(resolved.config, model=str(path)), origins)


def settled(command: str, resolved: "Resolved[Any]") -> "Resolved[Any]":
    """Return the config with what the model decides filled in, if a model is named; else as it is."""
    if not getattr(resolved.config, "model", ""):
        return resolved
    from llmctl.jobs.runner import JOBS
    from llmctl.recipe import Resolved, changed_keys

    config = JOBS[command].settle(resolved.config)
    chosen = dict.fromkeys(changed_keys(resolved.config, config), "chosen by the model")
    return Resolved(config, {**resolved.origins, **chosen})


def run_training(
    command: str,
    resolved: "Resolved[Any]",
    options: Options,
    *,
    show_example: bool = False,
) -> int:
    """Start or resume a run of `command`, in this process or in several, and print its result."""
    from llmctl.distributed.launch import Layout
    from llmctl.errors import GateError
    from llmctl.recipe import dump

    if options.print_config:
        result(dump(settled(command, resolved)).rstrip("\n"))
        return 0
    timeout_seconds = resolved.config.parallel.timeout_seconds
    layout = Layout(
        options.nproc, options.nnodes, options.node_rank, options.master, options.max_restarts, timeout_seconds
    )
    run = begun_run(options.resume, options.out)
    if options.resume == "auto" and run is not None and is_over(run, quiet=options.quiet):
        return 0
    if run is None:
        refuse_existing(options.out, force=options.force or options.resume == "auto")
    if layout.is_parent(os.environ):
        if run is None:
            from llmctl.jobs.runner import check

            check(command, resolved.config)
        return start_others(layout, None if run else resolved.config, quiet=options.quiet)
    trained = train(command, resolved, run, options, show_example=show_example)
    if trained is not None:  # None in all processes but the first
        result_json(trained.summary) if options.json else result(str(trained.path))
        if trained.missed:
            raise GateError(trained.missed, f"the model was still written: `{trained.path}`")
    return 0


def train(
    command: str, resolved: "Resolved[Any]", run: str | None, options: Options, *, show_example: bool
) -> "Trained | None":
    """Train in this process: start a new run, or resume `run`."""
    from llmctl.distributed.ranks import is_guest
    from llmctl.recipe import given_values

    quiet, verbose = options.quiet, options.verbose
    # Importing torch takes over a second: show progress first.
    note("loading torch", quiet=quiet or is_guest(os.environ))
    from llmctl.jobs import runner

    line = shlex.join(["llmctl", command, *sys.argv[2:]])
    if run is None:
        return runner.begin(
            command,
            resolved.config,
            resolved.origins,
            invocation=line,
            out=options.out,
            quiet=quiet,
            verbose=verbose,
            show_example=show_example,
        )
    return runner.resume(
        command,
        run,
        invocation=line,
        quiet=quiet,
        verbose=verbose,
        given=given_values(resolved),
        allowed=options.allow_change or (),
    )


def start_others(layout: "Layout", config: Any, *, quiet: bool) -> int:
    """Launch this command in several processes, after checking that the batch divides over them."""
    from llmctl.distributed.launch import relaunch

    if config is not None:
        from llmctl.distributed.gradients import check_layout

        check_layout(config.train, config.parallel, layout.nproc * layout.nnodes)
    note(f"starting {layout.nproc} processes", quiet=quiet)
    return relaunch(layout, sys.argv[1:])


def is_over(run: str, *, quiet: bool) -> bool:
    """Return whether a run is finished, and print its path if so."""
    from llmctl.distributed.ranks import is_guest
    from llmctl.runs.folder import is_finished

    if not is_finished(Path(run)):
        return False
    if not is_guest(os.environ):
        note(f"{run} is finished", quiet=quiet)
        result(run)
    return True


def begun_run(resume: str | None, out: Path | None) -> str | None:
    """Return the run to resume; `auto`: the run in `-o` if it exists, so that one command line starts and resumes.

    Raises: UsageError for `auto` without a folder.
    """
    from llmctl.errors import UsageError

    if resume != "auto":
        return resume
    if out is None or out.suffix == ".safetensors":
        raise UsageError("`--resume auto` needs the run folder", "name it with `-o FOLDER`")
    return str(out) if (out / "recipe.yaml").is_file() else None


def refuse_shared_stdin(recipe: str | None, n_processes: int) -> None:
    """Refuse a recipe on standard input with several processes: only the first would read it.

    Raises: UsageError for `-r -` with several processes.
    """
    from llmctl.distributed.ranks import LAUNCHED, read_ranks
    from llmctl.errors import UsageError

    if recipe == "-" and (n_processes > 1 or LAUNCHED in os.environ or read_ranks(os.environ).world_size > 1):
        raise UsageError("`-r -` can be read only once, but several processes need the recipe", "use `-r FILE`")


def refuse_existing(out: Path | None, *, force: bool) -> None:
    """Refuse to overwrite an existing output without `force`.

    Skipped under the launcher, which has already checked: after a restart the output is the run itself.
    """
    from llmctl.distributed.ranks import LAUNCHED
    from llmctl.errors import OutputError

    if out is None or force or LAUNCHED in os.environ:
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"`{out}` already exists", "`-f` replaces it, `-o` writes elsewhere")
