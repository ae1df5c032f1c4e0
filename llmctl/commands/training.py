"""What the commands that train share: begin or go on, in this process or in several, and refuse what cannot be."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmctl.commands.common import note, result, result_json

if TYPE_CHECKING:
    from llmctl.engine.job import Job
    from llmctl.engine.launch import Layout
    from llmctl.engine.outcome import Trained
    from llmctl.recipe import Resolved

Recipe = Annotated[str | None, typer.Option("-r", "--recipe", help="A YAML recipe, `-` for standard input.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="A folder, or X.safetensors for a single file.")]
Steps = Annotated[int | None, typer.Option(help="Budget in optimizer steps.")]
Minutes = Annotated[float | None, typer.Option(help="Budget in minutes.")]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch-size", "--batch", help="Rows per step; `auto` keeps it and fits micro-batches to the memory."
    ),
]
SeqLen = Annotated[int | None, typer.Option(help="Tokens per row.")]
Seed = Annotated[int | None, typer.Option(help="Seed of weights, data order and masks.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any other key: section.key=value.")]
Nproc = Annotated[int, typer.Option(help="Processes to start on this host.")]
Nnodes = Annotated[int, typer.Option(help="Hosts that train together; start the command on each.")]
NodeRank = Annotated[int, typer.Option(help="This host's number, from 0.")]
Master = Annotated[str, typer.Option(help="HOST:PORT where the hosts meet: host 0.")]
MaxRestarts = Annotated[int, typer.Option(help="Times to start again, from the last checkpoint, when a process dies.")]
Parallel = Annotated[str | None, typer.Option(help="ddp, or fsdp to share weights and optimizer state out.")]
Deterministic = Annotated[
    bool | None, typer.Option("--deterministic", help="The same weights, bit for bit, on 1, 2 or 4 processes.")
]
Track = Annotated[list[str] | None, typer.Option(help="tensorboard, trackio, wandb, ...: send figures there.")]
Resume = Annotated[
    str | None,
    typer.Option(help="Go on with a run: its folder or number, `latest`, or `auto`: the one in -o if it is begun."),
]
AllowChange = Annotated[list[str] | None, typer.Option(help="With --resume: a key that may differ from the run's.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved recipe and end.")]
Force = Annotated[bool, typer.Option("-f", "--force", help="Replace what -o names.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="A line per step.")]

MakeJob = Callable[["Resolved[Any]"], "Job"]
"""Turns the resolved config of a new run into its job; imports torch."""


def loop_flags(
    *,
    steps: int | None,
    minutes: float | None,
    batch_size: str | None,
    seq_len: int | None,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    compile_: bool | None,
    track: Sequence[str] | None,
    parallel: str | None,
    deterministic: bool | None,
) -> dict[str, Any]:
    """Return the settings that the shared options give."""
    return {
        "train.steps": steps,
        "train.minutes": minutes,
        "train.batch_size": None if batch_size == "auto" else batch_size,
        "train.micro_batch_size": -1 if batch_size == "auto" else None,
        "train.seq_len": seq_len,
        "train.seed": seed,
        "train.device": device,
        "train.dtype": dtype,
        "train.compile": compile_,
        "train.track": list(track) if track else None,
        "parallel.strategy": parallel,
        "parallel.deterministic": deterministic,
    }


def run_training(
    command: str,
    resolved: "Resolved[Any]",
    make_job: MakeJob,
    layout: "Layout",
    *,
    check: Callable[[Any], None],
    out: Path | None,
    resume: str | None,
    allowed: Sequence[str],
    force: bool,
    json: bool,
    quiet: bool,
    verbose: bool,
) -> int:
    """Begin or go on with a run of `command`, here or in several processes, and print what came out.

    `check` refuses a new run's config before other processes are started for it.
    """
    run = begun_run(resume, out)
    if resume == "auto" and run is not None and is_over(run, quiet=quiet):
        return 0
    if run is None:
        refuse_existing(out, force=force or resume == "auto")
    if layout.is_parent(os.environ):
        if run is None:
            check(resolved.config)
        return start_others(layout, None if run else resolved.config, quiet=quiet)
    trained = train(command, resolved, make_job, run, allowed, out=out, quiet=quiet, verbose=verbose)
    if trained is not None:  # the first of several processes speaks
        result_json(trained.summary) if json else result(str(trained.path))
    return 0


def train(
    command: str,
    resolved: "Resolved[Any]",
    make_job: MakeJob,
    run: str | None,
    allowed: Sequence[str],
    *,
    out: Path | None,
    quiet: bool,
    verbose: bool,
) -> "Trained | None":
    """Train in this process: begin a run, or go on with `run`."""
    from llmctl.engine.ranks import is_guest
    from llmctl.recipe import given_values

    note("loading torch", quiet=quiet or is_guest(os.environ))  # the first second and a half; say something at once
    from llmctl.engine import train as engine

    line = shlex.join(["llmctl", command, *sys.argv[2:]])
    if run is None:
        return engine.begin(make_job(resolved), resolved.origins, command=line, out=out, quiet=quiet, verbose=verbose)
    given = given_values(resolved)
    return engine.resume(command, run, command=line, quiet=quiet, verbose=verbose, given=given, allowed=allowed)


def start_others(layout: "Layout", config: Any, *, quiet: bool) -> int:
    """Run this command in several processes; a batch that cannot be shared out is refused before."""
    from llmctl.engine.launch import relaunch

    if config is not None:
        from llmctl.engine.parallel import check_layout

        check_layout(config.train, config.parallel, layout.nproc * layout.nnodes)
    note(f"starting {layout.nproc} processes", quiet=quiet)
    return relaunch(layout, sys.argv[1:])


def is_over(run: str, *, quiet: bool) -> bool:
    """Tell whether a run has ended with a model, and print it if so."""
    from llmctl.engine.ranks import is_guest
    from llmctl.engine.runs import is_finished

    if not is_finished(Path(run)):
        return False
    if not is_guest(os.environ):
        note(f"{run} is finished", quiet=quiet)
        result(run)
    return True


def begun_run(resume: str | None, out: Path | None) -> str | None:
    """Return the run that `--resume` means; `auto` is the one in `-o` if it was begun, so that one command line does.

    Raises: UsageError for `auto` without a folder.
    """
    from llmctl.errors import UsageError

    if resume != "auto":
        return resume
    if out is None or out.suffix == ".safetensors":
        raise UsageError("`--resume auto` needs the run's folder", "name it with -o FOLDER")
    return str(out) if (out / "recipe.yaml").is_file() else None


def refuse_shared_stdin(recipe: str | None, n_processes: int) -> None:
    """Keep processes from sharing one standard input, of which the first reader leaves the others nothing.

    Raises: UsageError for `-r -` beside several processes.
    """
    from llmctl.engine.ranks import LAUNCHED, read_ranks
    from llmctl.errors import UsageError

    if recipe == "-" and (n_processes > 1 or LAUNCHED in os.environ or read_ranks(os.environ).world_size > 1):
        raise UsageError("`-r -` is read once, but several processes need the recipe", "write it to a file: -r FILE")


def refuse_existing(out: Path | None, *, force: bool) -> None:
    """Keep a run from writing over what is there.

    Under our launcher that has looked already, and a restart finds its own run.
    """
    from llmctl.engine.ranks import LAUNCHED
    from llmctl.errors import OutputError

    if out is None or force or LAUNCHED in os.environ:
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"`{out}` exists already", "-f replaces it, -o names another place")
