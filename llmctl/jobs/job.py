"""What a command that trains brings: its config, the checks on it, its names, and a function that does the work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmctl.jobs.session import Session


@dataclass(frozen=True)
class Job:
    """One row of `runner.JOBS`.

    settle: fills in what the model and the data decide, so that the recipe of a run states it. check: refuses settings that
    contradict each other, before anything is read. objective, label: names for the record and for the run folder.
    run: trains inside an open session, and ends with `session.finish`. suffix: of the file it can write instead of a folder.
    """

    command: str
    config_class: type
    settle: Callable[[Any], Any]
    check: Callable[[Any], None]
    objective: Callable[[Any], str]
    label: Callable[[Any], str]
    run: Callable[[Session, Any], None]
    suffix: Callable[[Any], str] = lambda _: ".safetensors"
