"""`llmctl distill`: flags -> DistillConfig -> one training run -> the student's path on stdout, a report on stderr."""

from typing import Annotated, Any

import typer

from llmctl.commands.common import command_app
from llmctl.commands.training import Options, run_training, with_model, with_options

app = command_app()


@app.command()
@with_options
def distill(
    *,
    options: Options,
    model: Annotated[
        str | None, typer.Argument(metavar="TEACHER", help="The teacher: a folder, a file or a run.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("-d", "--data", help="Text or examples; else the embedded corpus.")
    ] = None,
    val: Annotated[list[str] | None, typer.Option(help="What is held out; else a share of the data.")] = None,
    task: Annotated[str | None, typer.Option(help="text, chat, classify, translate, ...; else the teacher's.")] = None,
    student: Annotated[
        str | None, typer.Option(help="50%, layers=6,dim=512,heads=8,ffn=1408, or a model that is there.")
    ] = None,
    init: Annotated[str | None, typer.Option(help="prune: cut out of the teacher; random: fresh weights.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="fkl, rkl, jsd, skl, srkl, akl, taid, tvd; seq: the teacher's texts.")
    ] = None,
    on_policy: Annotated[float | None, typer.Option(help="Share of the batches that the student writes.")] = None,
    teacher_dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or int8.")] = None,
    stages: Annotated[int | None, typer.Option(help="Steps in which the student is cut.")] = None,
    baseline: Annotated[
        bool | None, typer.Option("--baseline", help="Train the same model from scratch too, and compare.")
    ] = None,
    max_drop: Annotated[
        str | None, typer.Option(help="Exit with 10 if the student is worse than this: 0.05, or 5%.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
) -> int:
    """Make a small model of a large one: cut a student out of a teacher, and let it learn what the teacher says.

    Prints the student's folder; the report is a table and `report.json`.

    Examples:

      llmctl distill teacher.safetensors --steps 100

      llmctl distill runs/0003 -d corpus/ --student 30% --baseline -o student

      llmctl distill encoder -d texts.txt --student layers=3 --max-drop 5%
    """
    from llmctl.config import DistillConfig

    flags: dict[str, Any] = {
        "data.paths": data or None,
        "data.val_paths": val or None,
        "task": task,
        "student.shape": student,
        "student.init": init,
        "loss.name": loss,
        "loss.on_policy": on_policy,
        "teacher.dtype": teacher_dtype,
        "stages": stages,
        "baseline.enabled": baseline,
        "max_drop": max_drop,
        "optim.lr": lr,
    }
    resolved = options.resolve(DistillConfig, flags)
    if options.resume in (None, "auto"):
        resolved = with_model(resolved, model, quiet=options.quiet)

    return run_training("distill", resolved, options)
