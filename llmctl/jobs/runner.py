"""The commands that train, and how a job runs in an open run and its end is recorded; see `begin` and `resume`.

`JOBS` is the table of these commands; they stand side by side, and only `compress` uses a part of another.
"""

from collections.abc import Mapping
from typing import Any

from llmctl.errors import InterruptedRunError, LlmctlError, NotFoundError, StoppedError, UsageError
from llmctl.jobs import compress, distill, finetune, pretrain, quantize
from llmctl.jobs.finish import Trained
from llmctl.jobs.job import Job
from llmctl.jobs.session import Session
from llmctl.jobs.startup import losing_peers, naming_memory
from llmctl.runs.removal import withdraw

JOBS: Mapping[str, Job] = {
    job.command: job for job in (pretrain.JOB, finetune.JOB, distill.JOB, quantize.JOB, compress.JOB)
}
"""The commands that train."""


def check(command: str, config: Any) -> None:
    """Refuse the config of a new run, before other processes are started for it.

    Raises: UsageError, and whatever reading the model raises.
    """
    JOBS[command].check(JOBS[command].settle(config))


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
        if run.record.get("status") != "finished":  # while it tidies up, all is written
            run.update(status="interrupted")
        raise
    except BaseException as error:
        is_ours = isinstance(error, LlmctlError)
        text = (str(error) or type(error).__name__) if is_ours else f"{type(error).__name__}: {error}"
        if run.record.get("status") != "finished":
            run.update(status="failed", error=text)
        if isinstance(error, (UsageError, NotFoundError)) and not session.resumes:
            withdraw(run)
        raise
    finally:
        session.progress.close()
        run.close()
    return session.trained
