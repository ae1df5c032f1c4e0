"""`llmctl pretrain`: flags -> PretrainConfig -> one training run -> the model's path on stdout."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmctl.commands.common import (
    AllowChange,
    Master,
    MaxRestarts,
    Nnodes,
    NodeRank,
    Nproc,
    Parallel,
    command_app,
    note,
    result,
    result_json,
)

if TYPE_CHECKING:
    from llmctl.config import PretrainConfig
    from llmctl.engine.launch import Layout
    from llmctl.engine.outcome import Trained
    from llmctl.recipe import Resolved

app = command_app()


@app.command()
def pretrain(
    data: Annotated[
        list[str] | None, typer.Argument(help="Text: files, folders, globs or `-`. None is the embedded corpus.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="clm, mlm, span or seq2seq.")] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="A preset (`llmctl presets`), or a model to go on from.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer, or `char` or `unigram` to train one of that kind.")
    ] = None,
    recipe: Annotated[str | None, typer.Option("-r", "--recipe", help="A YAML recipe, `-` for standard input.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A folder, or X.safetensors for a single file.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in optimizer steps.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Budget in tokens, such as 1e9.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes.")] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            "--batch-size", "--batch", help="Rows per step; `auto` keeps it and fits micro-batches to the memory."
        ),
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order and masks.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    compile_: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key: section.key=value.")] = None,
    nproc: Nproc = 1,
    nnodes: Nnodes = 1,
    node_rank: NodeRank = 0,
    master: Master = "",
    max_restarts: MaxRestarts = 0,
    parallel: Parallel = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="The same weights, bit for bit, on 1, 2 or 4 processes.")
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="tensorboard, trackio, wandb, ...: send figures there.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Go on with a run: its folder or number, `latest`, or `auto`: the one in -o if it is begun."),
    ] = None,
    allow_change: AllowChange = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved recipe and end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print size, memory, FLOPs and time, and end.")] = False,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace what -o names.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="A line per step.")] = False,
) -> int:
    """Train a model from raw text; prints the model folder.

    Examples:

      llmctl pretrain --minutes 1

      llmctl pretrain --objective mlm book.txt -o encoder.safetensors

      llmctl pretrain --nproc 2 --minutes 1

      llmctl pretrain --model gpt3-175b --dry-run
    """
    from llmctl.config import PretrainConfig
    from llmctl.engine.launch import Layout
    from llmctl.recipe import dump, load

    known_kinds = {"char", "unigram", "bpe"}
    flags: dict[str, Any] = {
        "data.paths": data or None,
        "objective": objective,
        "model.preset": model,
        "tokenizer.model_type": tokenizer if tokenizer in known_kinds else None,
        "tokenizer.path": tokenizer if tokenizer not in known_kinds else None,
        "train.steps": steps,
        "train.tokens": tokens,
        "train.minutes": minutes,
        "train.batch_size": None if batch_size == "auto" else batch_size,
        "train.micro_batch_size": -1 if batch_size == "auto" else None,
        "train.seq_len": seq_len,
        "train.seed": seed,
        "train.device": device,
        "train.dtype": dtype,
        "train.compile": compile_,
        "train.track": track or None,
        "parallel.strategy": parallel,
        "parallel.deterministic": deterministic,
    }
    refuse_shared_stdin(recipe, nproc * nnodes)
    resolved = load(PretrainConfig, recipe=recipe, settings=set_ or [], flags=flags)
    if print_config:
        result(dump(resolved).rstrip("\n"))
        return 0
    if dry_run:
        from llmctl.engine.plan import dry_run as plan

        estimate = plan(resolved.config, n_processes=nproc * nnodes)
        result_json(estimate.to_dict()) if json else result(estimate.render())
        return 0
    layout = Layout(nproc, nnodes, node_rank, master, max_restarts, resolved.config.parallel.timeout_seconds)
    run = begun_run(resume, out)
    if resume == "auto" and run is not None and is_over(run, quiet=quiet):
        return 0
    if run is None:
        refuse_existing(out, force=force or resume == "auto")
    if layout.is_parent(os.environ):
        return start_others(layout, None if run else resolved.config, quiet=quiet)
    trained = train(resolved, run, allow_change or (), out=out, quiet=quiet, verbose=verbose)
    if trained is not None:  # the first of several processes speaks
        result_json(trained.summary) if json else result(str(trained.path))
    return 0


def train(
    resolved: "Resolved[PretrainConfig]",
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
    from llmctl.engine.checks import with_budget
    from llmctl.engine.pretrain import Pretraining

    command = shlex.join(["llmctl", "pretrain", *sys.argv[2:]])
    if run is None:
        job = Pretraining(with_budget(resolved.config))
        return engine.begin(job, resolved.origins, command=command, out=out, quiet=quiet, verbose=verbose)
    given = given_values(resolved)
    return engine.resume("pretrain", run, command=command, quiet=quiet, verbose=verbose, given=given, allowed=allowed)


def start_others(layout: "Layout", config: "PretrainConfig | None", *, quiet: bool) -> int:
    """Run this command in several processes; what makes no sense in a new run's config is refused before."""
    from llmctl.engine.launch import relaunch

    if config is not None:
        from llmctl.engine.checks import check
        from llmctl.engine.parallel import check_layout

        check(config)
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
