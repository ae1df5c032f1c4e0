"""begin(): a new run of any command that trains: its folder, its recipe, its job."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.distributed.gradients import check_layout
from llmctl.distributed.runtime import start
from llmctl.errors import UsageError
from llmctl.files import ensure_writable, write_bytes
from llmctl.jobs.finish import Trained, is_file
from llmctl.jobs.resume import resume
from llmctl.jobs.runner import JOBS, run_job
from llmctl.jobs.session import Session
from llmctl.jobs.startup import agree_on_start, note_begun, open_together
from llmctl.recipe import Resolved, dump
from llmctl.runs.folder import Run, create_run
from llmctl.runs.progress import make_progress
from llmctl.runs.removal import clear


def begin(
    command: str,
    config: Any,
    origins: Mapping[str, str] | None = None,
    *,
    invocation: str = "",
    out: Path | None = None,
    quiet: bool = False,
    verbose: bool = False,
    show_example: bool = False,
    started: float | None = None,
) -> Trained | None:
    """Train, and leave the model as a run folder, or as the single file `out`.

    started: when the command was called, on the clock of `time.monotonic`; default: now. A budget of minutes counts from it.
    Returns None in all processes but the first.
    Raises: LlmctlError of every kind; what is on disk by then stays valid and can be resumed.
    """
    job = JOBS[command]
    config = job.settle(config)
    job.check(config)
    if out is not None and is_file(out) and out.suffix != job.suffix(config):
        raise UsageError(
            f"this run writes a file X{job.suffix(config)}, but `{out}` is not one",
            f"use `-o X{job.suffix(config)}`, or `-o FOLDER`; `llmctl export --to gguf` converts models to GGUF",
        )
    started = time.monotonic() if started is None else started
    runtime = start(config.train, config.parallel)
    check_layout(config.train, config.parallel, runtime.world_size)
    begun = agree_on_start(runtime, "begin a run")
    if begun:  # the launcher has restarted all processes
        return resume(
            command, begun, invocation=invocation, quiet=quiet, verbose=verbose, runtime=runtime, started=started
        )
    out_file = out if out is not None and is_file(out) else None

    def create() -> Run:
        if out is not None:
            ensure_writable(out.parent)
        run = create_run(command, job.label(config), out=None if out_file else out)
        clear(run.path)
        write_bytes(run.path / "recipe.yaml", dump(Resolved(config, dict(origins or {}))).encode())
        run.update(
            invocation=invocation, objective=job.objective(config), out=str(out_file) if out_file is not None else None
        )
        note_begun(run.path)
        return run

    run = open_together(runtime, create)
    progress = make_progress(quiet=quiet or not runtime.is_main, verbose=verbose)
    session = Session(
        run,
        config,
        job.objective(config),
        runtime,
        progress,
        command,
        invocation,
        started,
        show_example=show_example,
    )
    return run_job(job, session)
