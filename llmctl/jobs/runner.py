"""begin and resume, for every command that trains: open a run folder, run its job in it, record how it ended.

`JOBS` is the table of these commands; they stand side by side and do not import each other.
"""

import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.distributed.gradients import check_layout
from llmctl.distributed.runtime import Runtime, start
from llmctl.errors import InterruptedRunError, LlmctlError, NotFoundError, StoppedError, UsageError
from llmctl.files import ensure_writable, write_bytes
from llmctl.jobs import distill, finetune, pretrain, quantize
from llmctl.jobs.finish import Trained
from llmctl.jobs.job import Job
from llmctl.jobs.session import Session
from llmctl.jobs.startup import agree_on_start, losing_peers, naming_memory, note_begun, open_together
from llmctl.recipe import Resolved, changed_keys, dump, load
from llmctl.runs.folder import NUMBERED, Run, create_run, find_run, open_run, read_record
from llmctl.runs.progress import make_progress
from llmctl.training.settings import refuse_changes

JOBS: Mapping[str, Job] = {job.command: job for job in (pretrain.JOB, finetune.JOB, distill.JOB, quantize.JOB)}
"""The commands that train."""


def check(command: str, config: Any) -> None:
    """Refuse the config of a new run, before other processes are started for it.

    Raises: UsageError, and whatever reading the model raises.
    """
    JOBS[command].check(JOBS[command].settle(config))


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
) -> Trained | None:
    """Train, and leave the model as a run folder, or as the single file `out`.

    Returns None in all processes but the first.
    Raises: LlmctlError of every kind; what is on disk by then stays valid and can be resumed.
    """
    job = JOBS[command]
    config = job.settle(config)
    job.check(config)
    started = time.monotonic()
    runtime = start(config.train, config.parallel)
    check_layout(config.train, config.parallel, runtime.world_size)
    begun = agree_on_start(runtime, "begin a run")
    if begun:  # the launcher has restarted all processes
        return resume(command, begun, invocation=invocation, quiet=quiet, verbose=verbose, runtime=runtime)
    out_file = out if out is not None and out.suffix == ".safetensors" else None

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


def resume(
    command: str,
    name: str,
    *,
    invocation: str = "",
    quiet: bool = False,
    verbose: bool = False,
    given: Mapping[str, Any] | None = None,
    allowed: Sequence[str] = (),
    runtime: Runtime | None = None,
) -> Trained | None:
    """Continue a run of `command` from its newest valid checkpoint, as if it had never stopped.

    given: settings of the command line, which must be the run's own unless `allowed` names them. Returns None in all
    processes but the first.
    Raises: NotFoundError for a run or checkpoint that does not exist, BusyError if it is still running, UsageError for
    a changed recipe or a run of another command, ArtifactError if all its checkpoints are damaged.
    """
    path = find_run(name)
    begun_by = str(read_record(path).get("command", command))
    if begun_by != command:
        raise UsageError(f"`{path}` is a run of `llmctl {begun_by}`", f"llmctl {begun_by} --resume {shlex.quote(name)}")
    job = JOBS[command]
    saved_recipe: Any = load(job.config_class, recipe=str(path / "recipe.yaml"), environment={}).config
    config: Any = load(job.config_class, recipe=str(path / "recipe.yaml"), environment={}, flags=given or {}).config
    changes = changed_keys(saved_recipe, config)
    refuse_changes(path, changes, allowed)
    job.check(config)
    started = time.monotonic()
    if runtime is None:
        runtime = start(config.train, config.parallel)
        agree_on_start(runtime, f"resume {path}")
    check_layout(config.train, config.parallel, runtime.world_size)

    def open_unfinished() -> Run:
        run = open_run(path)
        if run.record.get("status") == "finished":
            run.close()
            raise UsageError(f"run `{path}` is finished", "start a new run with -r and more steps")
        if changes:
            write_bytes(path / "recipe.yaml", dump(Resolved(config, {})).encode())
        run.update(status="running")
        note_begun(path)
        return run

    run = open_together(runtime, open_unfinished)
    progress = make_progress(quiet=quiet or not runtime.is_main, verbose=verbose)
    for key, (old, new) in changes.items():
        progress.say(f"changed: {key} {old} -> {new}")
    invocation = str(run.record.get("invocation", invocation))
    session = Session(run, config, job.objective(config), runtime, progress, command, invocation, started, resumes=True)
    return run_job(job, session)


def run_job(job: Job, session: Session) -> Trained | None:
    """Run a job in its session, and record how it ended."""
    run = session.run
    try:
        with losing_peers(session.runtime, run.path), naming_memory(session.runtime):
            job.run(session, session.config)
    except (
        InterruptedRunError,
        StoppedError,
        KeyboardInterrupt,
    ):  # the last: before the first step, or a second Ctrl-C
        run.update(status="interrupted")
        raise
    except BaseException as error:
        is_ours = isinstance(error, LlmctlError)
        text = (str(error) or type(error).__name__) if is_ours else f"{type(error).__name__}: {error}"
        run.update(status="failed", error=text)
        if isinstance(error, (UsageError, NotFoundError)) and not session.resumes:
            withdraw(run)
        raise
    finally:
        session.progress.close()
        run.close()
    return session.trained


def withdraw(run: Run) -> None:
    """Remove a numbered run folder that a mistake of the user's left empty."""
    is_ours = run.lock is not None and NUMBERED.match(run.path.name) is not None
    if is_ours and not (run.path / "metrics.jsonl").exists() and not (run.path / "checkpoints").exists():
        shutil.rmtree(run.path, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what an earlier run left in a folder that is used again (`-o` with `-f`)."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "data", "parts"):
        shutil.rmtree(folder / name, ignore_errors=True)
