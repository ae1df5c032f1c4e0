"""`llmctl compress`: flags -> CompressConfig -> one run -> the model's path on stdout, the report on stderr."""

import time
from typing import Annotated

import typer

from llmctl.commands.before_torch import refuse_early
from llmctl.commands.common import SameModel, command_app, one_name, result, result_json
from llmctl.commands.grouped_help import settings_of
from llmctl.commands.model_argument import needs_model, with_model
from llmctl.commands.options import Options, help_of, with_options
from llmctl.commands.training import run_training
from llmctl.config import CompressConfig

app = command_app()


SETTINGS = {
    "size": "size",
    "data": "data.paths",
    "val": "data.val_paths",
    "task": "task",
    "format_": "format",
    "keep": "keep",
    "trials": "plan.trials",
    "max_drop": "max_drop",
}
"""The config keys that the options set."""


@app.command(cls=help_of(CompressConfig, SETTINGS))
@with_options
def compress(
    *,
    options: Options,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model folder, file or run.")] = None,
    named: SameModel = None,
    size: Annotated[str | None, typer.Option("--to", help="Size of the file: 30MB.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("-d", "--data", help="Text or examples; default: text that a decoder generates itself."),
    ] = None,
    val: Annotated[list[str] | None, typer.Option(help="Validation data; default: a fraction of the data.")] = None,
    task: Annotated[str | None, typer.Option(help="Task; default: the model's")] = None,
    format_: Annotated[
        str | None,
        typer.Option(
            "--for", help="single: our quantized file; gguf: for llama.cpp; hf: 16-bit weights; onnx: 8-bit encoders."
        ),
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Leave as it is: vocabulary, depth, width, bits.")] = None,
    trials: Annotated[int | None, typer.Option(help="Plans to try before one is trained.")] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Exit with code 10 if the model gets worse by more: 0.05 or 5%.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure, print the plans that fit, and exit; nothing is written.")
    ] = False,
) -> int:
    """Compress a model to a file of a given size, and print its path.

    Smaller vocabularies, fewer layers, narrower layers and fewer bits are measured alone, combined into plans that fit the
    size, and the best plans tried. The best one is trained on the original's outputs (--minutes), then quantized.

    Examples:

      llmctl compress model.safetensors --to 2MB -o small.safetensors

      llmctl compress runs/0003 --to 30MB --data corpus/ --minutes 30 --max-drop 20%

      llmctl compress latest --to 60MB --for gguf --keep depth,width -o small.gguf

      llmctl compress latest --to 1MB --dry-run
    """
    model = one_name(model, named)
    flags = settings_of(SETTINGS, locals())
    resolved = options.resolve(CompressConfig, flags)
    if needs_model(options, model, resolved.config):
        resolved = with_model(resolved, model, quiet=options.quiet)
    if dry_run and not options.print_config:
        refuse_early("compress", resolved.config)
        from llmctl.jobs.compress_dry_run import dry_run as plan

        found = plan(resolved.config, started=options.called_at or time.monotonic(), quiet=options.quiet)
        result_json(found.to_dict()) if options.json else result(found.render())
        return 0
    return run_training("compress", resolved, options)
