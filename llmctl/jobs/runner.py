"""begin and resume, for every training command: a run folder, processes that agree, the loop, and what a run leaves.

Commands stand side by side: `JOBS` names the part that each of them brings.
"""

import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.distributed.gradients import check_layout
from llmctl.distributed.runtime import Runtime, start
from llmctl.errors import (
    InterruptedRunError,
    LlmctlError,
    NotFoundError,
    OutputError,
    StoppedError,
    UsageError,
)
from llmctl.files import ensure_writable, write_bytes
from llmctl.formats.families.table import family_for
from llmctl.jobs.distill import Distilling
from llmctl.jobs.dry_run import fitting_rows
from llmctl.jobs.finetune import Finetuning
from llmctl.jobs.finish import Trained, finish, is_file
from llmctl.jobs.job import Job
from llmctl.jobs.pretrain import Pretraining
from llmctl.jobs.quantize import Quantizing
from llmctl.jobs.startup import (
    agree_on_start,
    compare_processes,
    losing_peers,
    naming_memory,
    note_begun,
    open_together,
)
from llmctl.machine import name_of, product_rate
from llmctl.preparing.corpus import CORPUS
from llmctl.recipe import Resolved, changed_keys, dump, load, nested, values_of
from llmctl.runs import checkpoint
from llmctl.runs.folder import NUMBERED, Run, create_run, find_run, open_run, read_record
from llmctl.runs.progress import Progress, make_progress
from llmctl.training.freezing import freeze
from llmctl.training.loop import Fitted, Training, fit
from llmctl.training.settings import refuse_changes

JOBS: dict[str, type[Job]] = {job.command: job for job in (Pretraining, Finetuning, Distilling, Quantizing)}
"""The jobs of the commands that train."""


def begin(
    job: Job, origins: Mapping[str, str], *, command: str, out: Path | None, quiet: bool, verbose: bool = False
) -> Trained | None:
    """Train, and leave the model as a run folder, or as the single file `out`.

    Returns None in all processes but the first.
    Raises: LlmctlError of every kind; what is on disk by then stays valid and resumable.
    """
    job.check()
    started = time.monotonic()
    runtime = start(job.config.train, job.config.parallel)
    check_layout(job.config.train, job.config.parallel, runtime.world_size)
    begun = agree_on_start(runtime, "begin a run")
    if begun:  # the launcher has started all processes again
        return resume(job.command, begun, command=command, quiet=quiet, verbose=verbose, runtime=runtime)

    def create() -> Run:
        if out is not None:
            ensure_writable(out.parent)
        run = create_run(job.command, job.label, out=None if out and is_file(out) else out)
        clear(run.path)
        write_bytes(run.path / "recipe.yaml", dump(Resolved(job.config, dict(origins))).encode())
        run.update(invocation=command, objective=job.objective, out=str(out) if out and is_file(out) else None)
        note_begun(run.path)
        return run

    run = open_together(runtime, create)
    progress = make_progress(quiet=quiet or not runtime.is_main, verbose=verbose)
    try:
        return train_in(run, job, progress, runtime, command=command, started=started)
    finally:
        progress.close()
        run.close()


def resume(
    kind: str,
    name: str,
    *,
    command: str,
    quiet: bool,
    verbose: bool = False,
    given: Mapping[str, Any] | None = None,
    allowed: Sequence[str] = (),
    runtime: Runtime | None = None,
) -> Trained | None:
    """Go on with a run of the command `kind` from its newest valid checkpoint, as if it had never stopped.

    `given` are settings beside it, which must be the run's own unless `allowed` names them. Returns None in all
    processes but the first.
    Raises: NotFoundError for a run or checkpoint that is not there, BusyError if it is still running, UsageError for
    a changed recipe or a run of another command, ArtifactError if all its checkpoints are damaged.
    """
    path = find_run(name)
    begun_by = str(read_record(path).get("command", kind))
    if begun_by != kind:
        raise UsageError(f"`{path}` is a run of `llmctl {begun_by}`", f"llmctl {begun_by} --resume {shlex.quote(name)}")
    config_class = JOBS[kind].config_class
    saved_recipe: Any = load(config_class, recipe=str(path / "recipe.yaml"), environment={}).config
    config: Any = load(config_class, recipe=str(path / "recipe.yaml"), environment={}, flags=given or {}).config
    changes = changed_keys(saved_recipe, config)
    refuse_changes(path, changes, allowed)
    job = JOBS[kind](config)
    job.check()
    started = time.monotonic()
    if runtime is None:
        runtime = start(config.train, config.parallel)
        agree_on_start(runtime, f"go on with {path}")
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
    try:
        for key, (old, new) in changes.items():
            progress.say(f"changed: {key} {old} -> {new}")
        command = str(run.record.get("invocation", command))
        return train_in(run, job, progress, runtime, command=command, started=started, resumes=True)
    finally:
        progress.close()
        run.close()


def check_space(run: Run, job: Job) -> None:
    """Refuse to begin where not even one checkpoint would find room.

    Raises: OutputError with what is needed and what there is.
    """
    n_trained = sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)
    n_bytes = 4 * (2 if job.config.optim.name == "muon" else 3) * n_trained
    free = shutil.disk_usage(run.path).free
    if run.lock is not None and free < n_bytes:
        raise OutputError(
            f"a checkpoint takes {n_bytes / 1e6:,.0f} MB, `{run.path}` has {free / 1e6:,.0f} MB free",
            "free some space there, or choose another place with -o",
        )


def newest_checkpoint(path: Path, runtime: Runtime, progress: Progress) -> checkpoint.Checkpoint | None:
    """Return the checkpoint that the first process has found to be the newest valid one, None if there is none yet.

    Raises: ArtifactError if there are some and all are damaged.
    """
    folder = path / "checkpoints"

    def find() -> str | None:
        if not checkpoint.published(folder):
            return None
        saved, skipped = checkpoint.Store(folder).load_newest()
        for line in skipped:
            progress.say(line)
        progress.say(f"resuming {path} at step {saved.state['step']} of {saved.state['total_steps']}")
        return saved.path.name

    name = runtime.lead(find)
    return checkpoint.open_checkpoint(folder / name) if name else None


def prepare_together(job: Job, run: Run, runtime: Runtime, progress: Progress) -> None:
    """Open the run's encoded data; the first process has made it, now or before a restart."""
    folder = run.path / "data"

    def prepare() -> None:
        if not (folder / CORPUS).is_file():
            job.prepare(folder, progress.say)

    runtime.lead(prepare)
    job.load(folder, progress.say)


def train_in(
    run: Run,
    job: Job,
    progress: Progress,
    runtime: Runtime,
    *,
    command: str,
    started: float,
    resumes: bool = False,
) -> Trained | None:
    """Do the training of an open run, part after part, and record how it ended."""
    trained: list[Trained] = []
    job.runtime = runtime
    try:
        with losing_peers(runtime, run.path), naming_memory(runtime):
            prepare_together(job, run, runtime, progress)
            for part in job.parts():
                if part and runtime.first(job.has_part(part, run.path)):
                    continue
                training, fitted = train_part(run, job, part, runtime, progress, started, resumes=resumes)
                if part:
                    runtime.lead(partial(job.keep_part, part, run.path, fitted))
            job.conclude(fitted, training)

            def leave() -> None:
                trained.append(finish(run, job, training, fitted, command=command, started=started))

            runtime.lead(leave)
    except (InterruptedRunError, StoppedError, KeyboardInterrupt):  # the last before the first step, or told twice
        run.update(status="interrupted")
        raise
    except BaseException as error:
        is_told = isinstance(error, LlmctlError)
        text = (str(error) or type(error).__name__) if is_told else f"{type(error).__name__}: {error}"
        run.update(status="failed", error=text)
        if isinstance(error, (UsageError, NotFoundError)) and not resumes:
            withdraw(run)
        raise
    return trained[0] if trained else None


def train_part(
    run: Run, job: Job, part: str, runtime: Runtime, progress: Progress, started: float, *, resumes: bool
) -> tuple[Training, Fitted]:
    """Train a part of a run from its newest checkpoint or from its beginning."""
    folder = part_folder(run.path, part)
    runtime.lead(partial(job.prepare_part, part, run.path, progress.say))
    job.load_part(part, run.path, progress.say)
    frozen = freeze(job.model, job.config.train.freeze)
    fit_micro_batch(job, runtime, run, progress)
    compare_processes(runtime, job, progress)
    check_space(run, job)
    saved = newest_checkpoint(folder, runtime, progress) if resumes else None
    if len(job.parts()) > 1:  # each has a budget of its own
        started = time.monotonic()
    training = assemble(run, job, part, runtime, progress, started, saved)
    progress.say(
        f"{family_for(job.model.config).architecture}: {job.model.n_parameters:,} parameters"
        f"{f', {frozen:,} of them frozen' if frozen else ''}, "
        f"{job.objective} in {name_of(runtime.dtype)} on {runtime.device.type}{f': {part}' if part else ''}"
    )
    return training, fit(training, saved) if job.trains else job.measured(training)


def part_folder(run: Path, part: str) -> Path:
    """Return where the checkpoints and figures of a part lie: those of the last one in the run folder itself."""
    return run / "parts" / part if part else run


def fit_micro_batch(job: Job, runtime: Runtime, run: Run, progress: Progress) -> None:
    """Replace a micro-batch of -1 by the largest that the memory holds; the global batch stays."""
    config = job.config
    if config.train.micro_batch_size >= 0:
        return
    size = min(runtime.gather(fitting_rows(config, job.model.config, job.rows(), runtime)))
    # What was chosen to fit must take what was predicted, now and when the run goes on.
    job.config = replace(config, train=replace(config.train, micro_batch_size=size, return_memory=True))
    if run.lock is not None:  # a resumed run takes the same
        write_bytes(run.path / "recipe.yaml", dump(Resolved(job.config, {})).encode())
    progress.say(f"micro-batches of {size} of the {config.train.batch_size} rows of a step")


def withdraw(run: Run) -> None:
    """Take a run folder away that came to nothing, because of what its user has written: there is nothing to keep."""
    is_ours = run.lock is not None and NUMBERED.match(run.path.name) is not None
    if is_ours and not (run.path / "metrics.jsonl").exists() and not (run.path / "checkpoints").exists():
        shutil.rmtree(run.path, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what an earlier run left in a folder that is used again (`-o` with `-f`)."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "data", "parts"):
        shutil.rmtree(folder / name, ignore_errors=True)


def assemble(
    run: Run,
    job: Job,
    part: str,
    runtime: Runtime,
    progress: Progress,
    started: float,
    saved: checkpoint.Checkpoint | None,
) -> Training:
    """Put together what the loop works with."""
    config = job.current
    folder = part_folder(run.path, part)
    folder.mkdir(parents=True, exist_ok=True)
    flops = job.flops()
    used_seconds = saved.state["seconds"] if saved else 0.0
    return Training(
        objective=job.make_objective(),
        model=job.model,
        train=job.make_batches(shuffle=True),
        held_out=job.make_batches(shuffle=False),
        config=config.train,
        optim=config.optim,
        runtime=runtime,
        folder=folder,
        progress=progress,
        resume_command=f"llmctl {job.command} --resume {shlex.quote(str(run.path))}",
        flops_per_token=flops,
        peak_flops=product_rate(runtime.dtype, runtime.device.type) if flops else 0.0,
        deadline=started + config.train.minutes * 60 - used_seconds if config.train.minutes else None,
        limit=time_limit(config.train.limit_minutes, started),
        sample=job.make_sampler(folder),
        score=job.make_score(runtime),
        metric=config.train.metric or job.metric,
        recipe=nested(config),
        trackers=runtime.make_trackers(
            config.train.track, folder, values_of(config), saved.state.get("trackers", {}) if saved else {}
        ),
    )


def time_limit(minutes: float, started: float) -> float | None:
    """Return the moment by which this process must have ended, on the clock of `started`: the user's or Slurm's."""
    if minutes:
        return started + 60 * minutes
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return time.monotonic() + int(end) - time.time() if end.isdigit() else None
