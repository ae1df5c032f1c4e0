"""`llmctl finetune`: flags -> FinetuneConfig -> one training run -> the path of the model or adapter on stdout."""

from typing import Annotated, Any

import typer

from llmctl.commands.common import command_app, result, result_json
from llmctl.commands.grouped_help import settings_of
from llmctl.commands.model_argument import needs_model, with_model
from llmctl.commands.options import Options, help_of, with_options
from llmctl.commands.training import run_training
from llmctl.config import FinetuneConfig

app = command_app()


SETTINGS = {
    "data": "data.paths",
    "val": "data.val_paths",
    "strict": "data.strict",
    "task": "task",
    "method": "method",
    "loss": "preference.loss",
    "qat": "qat",
    "columns": "columns.names",
    "labels": "labels",
    "merge": "merge",
    "rank": "adapter.rank",
    "lr": "optim.lr",
    "epochs": "train.epochs",
    "freeze": "train.freeze",
}
"""The config keys that the options set."""


@app.command(cls=help_of(FinetuneConfig, SETTINGS))
@with_options
def finetune(
    *,
    options: Options,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Model to fine-tune: folder, file or run.")
    ] = None,
    named: Annotated[str | None, typer.Option("-m", "--model", help="The model; all arguments are then data.")] = None,
    data: Annotated[
        list[str] | None, typer.Argument(metavar="DATA", help="Examples: files, folders, globs or `-`.")
    ] = None,
    task: Annotated[str | None, typer.Option()] = None,
    qat: Annotated[str | None, typer.Option()] = None,
    method: Annotated[
        str | None, typer.Option(help="full, or an adapter: lora, dora; qlora, qdora on a 4-bit base.")
    ] = None,
    loss: Annotated[str | None, typer.Option(help="prefer: dpo, ipo, orpo, simpo or kto.")] = None,
    val: Annotated[list[str] | None, typer.Option(help="Validation examples; default: a fraction of the data.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="classify: comma-separated labels, or a file with one per line.")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="Column names of a table without a header: text,label.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Budget in passes over the examples.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    merge: Annotated[bool | None, typer.Option("--merge", help="Merge the adapter and write the full model.")] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(help="Parameters to freeze: embeddings, layers.0-3, or a name pattern.")
    ] = None,
    show_example: Annotated[
        bool, typer.Option("--show-example", help="Show the first example and which tokens are trained.")
    ] = False,
    strict: Annotated[bool | None, typer.Option("--strict", help="Fail if the data has problems.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the data, print the report, and exit.")] = False,
) -> int:
    """Fine-tune a model on a task and print the folder of the model or adapter.

    Examples:

      llmctl finetune latest chats.jsonl --task chat --show-example

      llmctl finetune encoder reviews.csv --task classify --method lora

      llmctl finetune chat-model pairs.jsonl --task prefer --method lora

      llmctl finetune runs/0003 train.tsv --val dev.tsv --task translate -o translator
    """
    if named is not None:
        data = [*([] if model is None else [model]), *(data or [])] or None
        model = named
    flags = settings_of(SETTINGS, locals())
    resolved = options.resolve(FinetuneConfig, flags)
    if needs_model(options, model, resolved.config):
        resolved = with_model(resolved, model, quiet=options.quiet)
        refuse_single_file(resolved.config, options.out)
    if dry_run and not options.print_config:
        from llmctl.jobs.finetune_dry_run import examine

        report = examine(resolved.config, with_example=show_example)
        result_json(report.to_dict()) if options.json else result(report.render())
        return 0

    return run_training("finetune", resolved, options, show_example=show_example)


def refuse_single_file(config: "FinetuneConfig", out: Any) -> None:
    """Refuse to write an adapter as a single file.

    Raises: UsageError.
    """
    from llmctl.errors import UsageError

    if out is not None and out.suffix == ".safetensors" and config.method != "full" and not config.merge:
        raise UsageError(f"`{out}` is a single file, an adapter is a folder", "-o FOLDER, or --merge for a whole model")
