"""`llmctl pretrain`: flags -> PretrainConfig -> one training run -> the model's path on stdout."""

from typing import Annotated

import typer

from llmctl.commands.common import command_app, result, result_json
from llmctl.commands.grouped_help import settings_of
from llmctl.commands.model_argument import with_preset
from llmctl.commands.options import Options, help_of, with_options
from llmctl.commands.training import run_training
from llmctl.config import PretrainConfig

app = command_app()


SETTINGS = {
    "data": "data.paths",
    "objective": "objective",
    "model": "model.preset",
    "tokens": "train.tokens",
    "epochs": "train.epochs",
    "lr": "optim.lr",
    "val": "data.val_paths",
}
"""The config keys that the options set."""


@app.command(cls=help_of(PretrainConfig, SETTINGS))
@with_options
def pretrain(
    *,
    options: Options,
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA", help="Text: files, folders, globs or `-`; default: the built-in corpus."),
    ] = None,
    objective: Annotated[str | None, typer.Option()] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Preset (`llmctl presets`), or a model to continue from.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Existing tokenizer, or bpe, char or unigram to train one.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Budget in tokens, such as 1e9.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Budget in passes over the text.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate of adamw; that of muon: --set optim.muon_lr=X.")
    ] = None,
    val: Annotated[list[str] | None, typer.Option(help="Validation text; default: a fraction of the data.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print size, memory, FLOPs and time, and exit.")] = False,
) -> int:
    """Train a model from raw text and print its folder.

    Examples:

      llmctl pretrain --minutes 1

      llmctl pretrain --objective mlm book.txt -o encoder.safetensors

      llmctl pretrain --nproc 2 --minutes 1

      llmctl pretrain --model gpt3-175b --dry-run
    """
    is_kind = tokenizer in ("char", "unigram", "bpe")
    flags = settings_of(SETTINGS, locals()) | {"tokenizer.model_type" if is_kind else "tokenizer.path": tokenizer}
    resolved = with_preset(options.resolve(PretrainConfig, flags))
    if dry_run and not options.print_config:
        from llmctl.jobs.dry_run import dry_run as plan

        estimate = plan(resolved.config, n_processes=options.nproc * options.nnodes)
        result_json(estimate.to_dict()) if options.json else result(estimate.render())
        return 0
    return run_training("pretrain", resolved, options)
