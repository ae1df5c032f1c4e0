"""Before a run: launch the other processes, find the run to resume, and refuse to overwrite an output."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.commands.common import note, result

if TYPE_CHECKING:
    from llmctl.distributed.launch import Layout


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
    if out is None or out.suffix in (".safetensors", ".gguf"):
        raise UsageError("`--resume auto` needs the run folder", "name it with `-o FOLDER`")
    return str(out) if (out / "recipe.yaml").is_file() else None


def refuse_existing(out: Path | None, *, force: bool) -> None:
    """Refuse to overwrite an existing output without `force`, and in any case folders that a run would remove.

    Skipped under the launcher, which has already checked: after a restart the output is the run itself.
    """
    from llmctl.distributed.ranks import LAUNCHED
    from llmctl.errors import OutputError
    from llmctl.files import check_place
    from llmctl.runs.folder import is_unfinished, read_record

    if out is None or LAUNCHED in os.environ:
        return
    check_place(out)
    if out.suffix in (".safetensors", ".gguf") and out.is_dir():
        raise OutputError(f"`{out}` is a folder, but a file of this name is to be written", "name another file with -o")
    if force:
        from llmctl.runs.removal import CLEARED

        if not (out / "run.json").exists():
            for name in CLEARED:
                if (out / name).exists():
                    raise OutputError(f"`{out / name}` exists, and no run wrote it", "choose another folder with -o")
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not is_leftover(out)):
        hint = "`-f` replaces it, `-o` writes elsewhere"
        if out.is_dir() and any(out.glob("checkpoints/step-*")) and is_unfinished(read_record(out)):
            hint = f"it is a run that was stopped: `--resume {out}` continues it, {hint}"
        raise OutputError(f"`{out}` already exists", hint)


def is_leftover(folder: Path) -> bool:
    """Return whether a folder holds only what a run left that failed before its first checkpoint."""
    from llmctl.runs.folder import is_held, is_unfinished, read_record
    from llmctl.runs.removal import not_written

    has_result = any(folder.glob("checkpoints/step-*")) or any(folder.glob("*.safetensors"))
    is_failed = is_unfinished(read_record(folder)) and not is_held(folder)
    return is_failed and not has_result and not not_written(folder)
