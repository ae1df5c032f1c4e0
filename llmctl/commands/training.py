"""Shared by the training commands: begin or resume a run, and print its result."""

import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from llmctl.commands.before_torch import refuse_early
from llmctl.commands.common import note, result, result_json
from llmctl.commands.launching import begun_run, is_over, refuse_existing, start_others
from llmctl.commands.model_argument import settled
from llmctl.commands.options import Options

if TYPE_CHECKING:
    from llmctl.jobs.finish import Trained
    from llmctl.recipe import Resolved


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
    if run is not None:
        from llmctl.runs.folder import resumable_run

        resumable_run(run, command)  # before torch is imported
    if run is None:
        refuse_existing(options.out, force=options.force or options.resume == "auto")
        refuse_early(command, resolved.config)
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
    if resolved.config.parallel.deterministic or (run is not None and was_deterministic(run, command)):
        # Without it MKL's float32 products depend on the alignment of their operands (seen on AVX2).
        os.environ.setdefault("MKL_CBWR", "AUTO")
    # Importing torch takes over a second: show progress first.
    note("loading torch", quiet=quiet or is_guest(os.environ))
    from llmctl.jobs.begin import begin
    from llmctl.jobs.resume import resume

    line = shlex.join(["llmctl", command, *sys.argv[2:]])
    if run is None:
        return begin(
            command,
            resolved.config,
            resolved.origins,
            invocation=line,
            out=options.out,
            quiet=quiet,
            verbose=verbose,
            show_example=show_example,
            started=options.called_at,
        )
    return resume(
        command,
        run,
        invocation=line,
        quiet=quiet,
        verbose=verbose,
        given=given_values(resolved),
        allowed=options.allow_change or (),
        started=options.called_at,
    )


def was_deterministic(run: str, command: str) -> bool:
    """Tell whether a run that is resumed is deterministic, by its recipe."""
    from llmctl.runs.folder import resumable_run

    recipe = resumable_run(run, command) / "recipe.yaml"
    return recipe.is_file() and "deterministic: true" in recipe.read_text(encoding="utf-8")
