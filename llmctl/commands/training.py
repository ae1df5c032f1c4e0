"""Shared by the training commands: options, starting and resuming runs, and launching several processes."""

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.commands.common import find_model, note, result, result_json
from llmctl.commands.options import Options

if TYPE_CHECKING:
    from llmctl.distributed.launch import Layout
    from llmctl.jobs.finish import Trained
    from llmctl.recipe import Resolved


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
    """Return the config with what the model would decide in the origins, if a model is named; else as it is.

    The values stay as given: printed as a recipe, a value of the model's choosing would be pinned for other flags too.
    """
    if not getattr(resolved.config, "model", ""):
        return resolved
    from llmctl.jobs.runner import JOBS
    from llmctl.recipe import Resolved, changed_keys, plain, scalar

    changes = changed_keys(resolved.config, JOBS[command].settle(resolved.config))
    chosen = {key: f"this model: {scalar(plain(value))}" for key, (_, value) in changes.items()}
    return Resolved(resolved.config, {**resolved.origins, **chosen})


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
