"""`llmctl pretrain`: flags -> PretrainConfig -> one training run -> the model's path on stdout."""

from typing import Annotated, Any

import typer

from llmctl.commands.common import command_app, result, result_json
from llmctl.commands.training import Options, run_training, with_options

app = command_app()


@app.command()
@with_options
def pretrain(
    *,
    options: Options,
    data: Annotated[
        list[str] | None, typer.Argument(help="Text: files, folders, globs or `-`; default: the built-in corpus.")
    ] = None,
    objective: Annotated[str | None, typer.Option(help="clm, mlm, span or seq2seq.")] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Preset (`llmctl presets`), or a model to continue from.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Existing tokenizer, or bpe, char or unigram to train one.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Budget in tokens, such as 1e9.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print size, memory, FLOPs and time, and exit.")] = False,
) -> int:
    """Train a model from raw text and print its folder.

    Examples:

      llmctl pretrain --minutes 1

      llmctl pretrain --objective mlm book.txt -o encoder.safetensors

      llmctl pretrain --nproc 2 --minutes 1

      llmctl pretrain --model gpt3-175b --dry-run
    """
    from llmctl.config import PretrainConfig

    known_kinds = {"char", "unigram", "bpe"}
    flags: dict[str, Any] = {
        "data.paths": data or None,
        "objective": objective,
        "model.preset": model,
        "tokenizer.model_type": tokenizer if tokenizer in known_kinds else None,
        "tokenizer.path": tokenizer if tokenizer not in known_kinds else None,
        "train.tokens": tokens,
    }
    resolved = options.resolve(PretrainConfig, flags)
    if dry_run and not options.print_config:
        from llmctl.jobs.dry_run import dry_run as plan

        estimate = plan(resolved.config, n_processes=options.nproc * options.nnodes)
        result_json(estimate.to_dict()) if options.json else result(estimate.render())
        return 0
    return run_training("pretrain", resolved, options)
