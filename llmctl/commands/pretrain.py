"""`llmctl pretrain`: flags -> PretrainConfig -> one training run -> the model's path on stdout."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmctl.commands.common import command_app, result, result_json
from llmctl.commands.training import (
    AllowChange,
    BatchSize,
    Compile,
    Deterministic,
    Device,
    Dtype,
    Force,
    Json,
    Master,
    MaxRestarts,
    Minutes,
    Nnodes,
    NodeRank,
    Nproc,
    Out,
    Parallel,
    PrintConfig,
    Quiet,
    Recipe,
    Resume,
    Seed,
    SeqLen,
    Set,
    Steps,
    Track,
    Verbose,
    loop_flags,
    refuse_shared_stdin,
    run_training,
)

if TYPE_CHECKING:
    from llmctl.config import PretrainConfig
    from llmctl.engine.job import Job
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
    recipe: Recipe = None,
    out: Out = None,
    steps: Steps = None,
    tokens: Annotated[str | None, typer.Option(help="Budget in tokens, such as 1e9.")] = None,
    minutes: Minutes = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    compile_: Compile = None,
    set_: Set = None,
    nproc: Nproc = 1,
    nnodes: Nnodes = 1,
    node_rank: NodeRank = 0,
    master: Master = "",
    max_restarts: MaxRestarts = 0,
    parallel: Parallel = None,
    deterministic: Deterministic = None,
    track: Track = None,
    resume: Resume = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print size, memory, FLOPs and time, and end.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Train a model from raw text; prints the model folder.

    Examples:

      llmctl pretrain --minutes 1

      llmctl pretrain --objective mlm book.txt -o encoder.safetensors

      llmctl pretrain --nproc 2 --minutes 1

      llmctl pretrain --model gpt3-175b --dry-run
    """
    from llmctl.config import PretrainConfig
    from llmctl.recipe import dump, load

    known_kinds = {"char", "unigram", "bpe"}
    flags: dict[str, Any] = {
        "data.paths": data or None,
        "objective": objective,
        "model.preset": model,
        "tokenizer.model_type": tokenizer if tokenizer in known_kinds else None,
        "tokenizer.path": tokenizer if tokenizer not in known_kinds else None,
        "train.tokens": tokens,
    }
    flags |= loop_flags(
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        compile_=compile_,
        track=track,
        parallel=parallel,
        deterministic=deterministic,
    )
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
    from llmctl.engine.launch import Layout

    return run_training(
        "pretrain",
        resolved,
        make_job,
        Layout(nproc, nnodes, node_rank, master, max_restarts, resolved.config.parallel.timeout_seconds),
        check=check_config,
        out=out,
        resume=resume,
        allowed=allow_change or (),
        force=force,
        json=json,
        quiet=quiet,
        verbose=verbose,
    )


def make_job(resolved: "Resolved[PretrainConfig]") -> "Job":
    """Return the job of a new run."""
    from llmctl.engine.checks import with_budget
    from llmctl.engine.pretrain import Pretraining

    return Pretraining(with_budget(resolved.config))


def check_config(config: "PretrainConfig") -> None:
    """Refuse settings that exclude each other."""
    from llmctl.engine.checks import check

    check(config)
