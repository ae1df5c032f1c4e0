"""`llmctl pretrain`: flags -> PretrainConfig -> one training run -> the model's path on stdout."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from llmctl.commands.common import command_app, note, result, result_json

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
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per row.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data order and masks.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    compile_: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key: section.key=value.")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with a run: its folder or number, or `latest`.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved recipe and end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print size, memory, FLOPs and time, and end.")] = False,
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace what -o names.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the figures.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="A line per step.")] = False,
) -> None:
    """Train a model from raw text; prints the model folder.

    Examples:

      llmctl pretrain --minutes 1

      llmctl pretrain --objective mlm book.txt -o encoder.safetensors

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
        "train.steps": steps,
        "train.tokens": tokens,
        "train.minutes": minutes,
        "train.batch_size": batch_size,
        "train.seq_len": seq_len,
        "train.seed": seed,
        "train.device": device,
        "train.dtype": dtype,
        "train.compile": compile_,
    }
    resolved = load(PretrainConfig, recipe=recipe, settings=set_ or [], flags=flags)
    if print_config:
        result(dump(resolved).rstrip("\n"))
        return
    if dry_run:
        from llmctl.engine.plan import dry_run as plan

        estimate = plan(resolved.config)
        result_json(estimate.to_dict()) if json else result(estimate.render())
        return
    if resume is not None:
        refuse_changes(resolved.origins)
    else:
        refuse_existing(out, force=force)
    command = shlex.join(["llmctl", "pretrain", *sys.argv[2:]])
    note("loading torch", quiet=quiet)  # the first second and a half; say something at once
    from llmctl.engine.train import pretrain as train
    from llmctl.engine.train import resume as go_on

    if resume is not None:
        trained = go_on(resume, command=command, quiet=quiet, verbose=verbose)
    else:
        trained = train(resolved, command=command, out=out, quiet=quiet, verbose=verbose)
    result_json(trained.summary) if json else result(str(trained.path))


def refuse_changes(origins: Mapping[str, str]) -> None:
    """Keep settings beside --resume from being passed over in silence: the run's own recipe decides."""
    from llmctl.errors import UsageError

    given = [key for key, origin in origins.items() if origin in ("flag", "--set") or origin.startswith("recipe")]
    if given:
        raise UsageError(
            f"--resume goes on with the run's own recipe; `{given[0]}` cannot be changed",
            "leave everything but --resume away, or start a new run",
        )


def refuse_existing(out: Path | None, *, force: bool) -> None:
    """Keep a run from writing over what is there."""
    from llmctl.errors import OutputError

    if out is None or force:
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"`{out}` exists already", "-f replaces it, -o names another place")
