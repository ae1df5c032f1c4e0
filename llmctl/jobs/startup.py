"""Before the first step: open the run folder, check that all processes agree, find checkpoint, disk space and time limit."""

import hashlib
import os
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmctl import __version__
from llmctl.distributed.ranks import LAUNCHED
from llmctl.distributed.runtime import Runtime, is_lost_peer
from llmctl.errors import MemoryLimitError, OutputError, StoppedError, UsageError
from llmctl.files import is_seen
from llmctl.jobs.finish import recipe_sha256
from llmctl.machine import is_out_of_memory
from llmctl.model.transformer import LanguageModel
from llmctl.runs import checkpoint
from llmctl.runs.folder import Run, read_record
from llmctl.runs.progress import Progress
from llmctl.tables.optimizers import OPTIMIZERS


def begun_before() -> str:
    """Return the run that this launch began before its processes were restarted, or an empty string."""
    path = os.environ.get(LAUNCHED)
    return Path(path).read_text(encoding="utf-8").strip() if path and Path(path).is_file() else ""


def note_begun(path: Path) -> None:
    """Record a run for restarted processes."""
    if os.environ.get(LAUNCHED):
        Path(os.environ[LAUNCHED]).write_text(str(path.resolve()), encoding="utf-8")


def agree_on_start(runtime: Runtime, action: str) -> str:
    """Check that all processes are about to do the same; return the run they began before a restart, if any.

    Raises: UsageError if some begin and some resume: they would deadlock.
    """
    with losing_peers(runtime):
        answers = runtime.gather([action, begun_before()])
    if len({each for each, _ in answers}) > 1:
        table = ", ".join(f"rank {rank} is to {each}" for rank, (each, _) in enumerate(answers))
        raise UsageError(f"the processes do not agree: {table}", "start the same command on all hosts")
    return str(answers[0][1])


@contextmanager
def losing_peers(runtime: Runtime, run: Path | None = None) -> Iterator[None]:
    """Turn the loss of another process into an error that says how to resume.

    Raises: StoppedError.
    """
    try:
        yield
    except RuntimeError as error:
        if runtime.world_size == 1 or not is_lost_peer(error):
            raise
        raise StoppedError(
            f"rank {runtime.rank} lost another process ({str(error).strip().splitlines()[-1][:160]})",
            f"resume from the last checkpoint: llmctl {read_record(run).get('command', 'pretrain')} --resume {shlex.quote(str(run))}"
            if run
            else "restart all of them",
        ) from error


@contextmanager
def naming_memory(runtime: Runtime) -> Iterator[None]:
    """Turn an out-of-memory error into one that says how to use less.

    Raises: MemoryLimitError.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError(
            f"out of {runtime.device.type} memory ({str(error).strip().splitlines()[0][:160]})",
            "--batch-size auto fits micro-batches to the memory; --set parallel.activation_checkpointing=true and "
            "--parallel fsdp need less",
        ) from error


def open_together(runtime: Runtime, action: Callable[[], Run]) -> Run:
    """Let the first process create or open a run; the others check that they see its folder.

    Raises: the first process's error, in all of them; UsageError if the folder is not shared.
    """
    opened: list[Run] = []

    def begin() -> str:
        opened.append(action())
        return str(opened[0].path)

    with losing_peers(runtime):
        path = Path(runtime.lead(begin))
        blind = [rank for rank, sees in enumerate(runtime.gather(is_seen(path / "run.json"))) if not sees]
    if blind:
        raise UsageError(
            f"the run folder `{path}` is not visible to rank {', '.join(map(str, blind))}",
            "all hosts must share it: use -o with a folder on a shared file system, and start all processes in the same directory",
        )
    return opened[0] if opened else Run(path, read_record(path))


def compare_processes(runtime: Runtime, config: Any, identity: Mapping[str, str], progress: Progress) -> None:
    """Check that all processes have the same code, recipe and data.

    Raises: UsageError with what differs.
    """
    if runtime.world_size == 1:
        return
    own = {
        "llmctl": __version__,
        "code": code_sha256(),
        "torch": torch.__version__,
        "recipe": recipe_sha256(config),
        **identity,
    }
    rows = runtime.gather(own | {"host": socket.gethostname()})
    mismatches = [name for name in own if len({row[name] for row in rows}) > 1]
    if mismatches:
        table = "; ".join(
            f"{name}: " + ", ".join(f"rank {rank} {row[name][:12]}" for rank, row in enumerate(rows))
            for name in mismatches
        )
        raise UsageError(f"the processes do not agree: {table}", "start all of them with the same command and install")
    milliseconds = runtime.probe()
    hosts = len({row["host"] for row in rows})
    progress.say(
        f"{runtime.world_size} processes on {hosts} host{'s' * (hosts > 1)}, {runtime.parallel.strategy}, "
        f"{torch.get_num_threads()} threads each, 4 MiB summed in {milliseconds:.0f} ms"
    )


def code_sha256() -> str:
    """Return the sha256 of the package's source files."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_space(run: Run, model: LanguageModel, optimizer: str) -> None:
    """Refuse to begin if the disk has no room for a single checkpoint.

    Raises: OutputError with the bytes needed and free.
    """
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    n_bytes = 4 * (1 + OPTIMIZERS[optimizer].floats_per_weight) * n_trained
    free = shutil.disk_usage(run.path).free
    if run.lock is not None and free < n_bytes:
        raise OutputError(
            f"a checkpoint takes {n_bytes / 1e6:,.0f} MB, `{run.path}` has {free / 1e6:,.0f} MB free",
            "free some disk space, or choose another location with -o",
        )


def newest_checkpoint(path: Path, runtime: Runtime, progress: Progress) -> checkpoint.Checkpoint | None:
    """Return the newest valid checkpoint, chosen by the first process; None if there is none yet.

    Raises: ArtifactError if there are checkpoints and all are damaged.
    """
    folder = path / "checkpoints"

    def find() -> str | None:
        if not checkpoint.published(folder):
            return None
        saved, skipped = checkpoint.Store(folder).load_newest()
        for line in skipped:
            progress.say(line)
        progress.say(f"resuming {path} at step {saved.state.get('step')} of {saved.state.get('total_steps')}")
        return saved.path.name

    name = runtime.lead(find)
    return checkpoint.open_checkpoint(folder / name) if name else None


def time_limit(minutes: float, started: float) -> float | None:
    """Return when this process must have ended, on the clock of `started`: the user's limit, or Slurm's."""
    if minutes:
        return started + 60 * minutes
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return time.monotonic() + int(end) - time.time() if end.isdigit() else None
