"""resume(): continue a run from its newest checkpoint, as if it had never stopped."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.distributed.gradients import check_layout
from llmctl.distributed.runtime import Runtime, start
from llmctl.errors import UsageError
from llmctl.files import write_bytes
from llmctl.jobs.finish import Trained
from llmctl.jobs.runner import JOBS, run_job
from llmctl.jobs.session import Session
from llmctl.jobs.startup import agree_on_start, note_begun, open_together
from llmctl.recipe import Resolved, changed_keys, dump, load
from llmctl.runs.folder import Run, open_run, resumable_run
from llmctl.runs.progress import make_progress
from llmctl.training.settings import refuse_changes, with_new_budget


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
    started: float | None = None,
) -> Trained | None:
    """Continue a run of `command` from its newest valid checkpoint, as if it had never stopped.

    given: settings of the command line, which must be the run's own unless `allowed` names them. Returns None in all
    processes but the first.
    Raises: NotFoundError for a run or checkpoint that does not exist, BusyError if it is still running, UsageError for
    a changed recipe or a run of another command, ArtifactError if all its checkpoints are damaged.
    """
    path = resumable_run(name, command)
    job = JOBS[command]
    saved_recipe: Any = load(job.config_class, recipe=str(path / "recipe.yaml"), environment={}).config
    config: Any = load(job.config_class, recipe=str(path / "recipe.yaml"), environment={}, flags=given or {}).config
    refuse_changes(path, changed_keys(saved_recipe, config), allowed)
    config = with_new_budget(saved_recipe, config)
    changes = changed_keys(saved_recipe, config)
    job.check(config)
    started = time.monotonic() if started is None else started
    if runtime is None:
        runtime = start(config.train, config.parallel)
        agree_on_start(runtime, f"resume {path}")
    check_layout(config.train, config.parallel, runtime.world_size)

    def open_unfinished() -> Run:
        run = open_run(path)
        try:
            resumable_run(str(path), command)  # another process may have finished it before this one got the lock
        except UsageError:
            run.close()
            raise
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
