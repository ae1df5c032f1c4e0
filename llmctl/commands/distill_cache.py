"""`llmctl distill cache`: flags -> DistillConfig -> a folder of cached teacher outputs -> its path on stdout."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from llmctl.commands.common import SameModel, command_app, note, one_name, result, result_json
from llmctl.commands.model_argument import with_model
from llmctl.commands.server_teacher import collect_answers, is_url

app = command_app()


@app.command()
def cache(
    model: Annotated[
        str | None, typer.Argument(metavar="TEACHER", help="Teacher: folder, file, run, or a server http://HOST/v1.")
    ] = None,
    named: SameModel = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Output folder; an interrupted cache is resumed.")] = Path(
        "signals"
    ),
    data: Annotated[
        list[str] | None, typer.Option("-d", "--data", help="Text or examples; default: the built-in corpus.")
    ] = None,
    val: Annotated[list[str] | None, typer.Option(help="Validation data; default: a fraction of the data.")] = None,
    task: Annotated[str | None, typer.Option(help="text, chat, translate, ...; default: the teacher's.")] = None,
    kind: Annotated[str | None, typer.Option(help="What to store: sampled, topk or hidden.")] = None,
    draws: Annotated[int | None, typer.Option(help="Samples per token (sampled).")] = None,
    top_k: Annotated[int | None, typer.Option(help="Most likely tokens to store (topk).")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per row; must match the training.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling and masking.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    teacher_backend: Annotated[str | None, typer.Option(help="auto, native or transformers.")] = None,
    teacher_model: Annotated[str | None, typer.Option(help="Name of the teacher at a server.")] = None,
    recipe: Annotated[str | None, typer.Option("-r", "--recipe", help="Recipe of the distillation.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key: section.key=value.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
) -> int:
    """Cache a teacher's outputs for a corpus, or a server's answers to prompts, for any number of students.

    Examples:

      llmctl distill cache teacher.safetensors -o signals

      llmctl distill teacher.safetensors --set teacher.cache=signals

      llmctl distill cache http://localhost:8000/v1 --teacher-model NAME -d prompts.jsonl -o answers
    """
    from llmctl.config import DistillConfig
    from llmctl.recipe import load

    flags = {
        "data.paths": data or None,
        "data.val_paths": val or None,
        "task": task,
        "teacher.kind": kind,
        "teacher.draws": draws,
        "teacher.top_k": top_k,
        "train.seq_len": seq_len,
        "train.seed": seed,
        "train.device": device,
        "teacher.backend": teacher_backend,
        "server.model": teacher_model,
    }
    resolved = load(DistillConfig, recipe=recipe, settings=set_ or [], flags=flags)
    if is_url(name := one_name(model, named) or resolved.config.model):
        found = collect_answers(replace(resolved.config, model=name), out, quiet=quiet)
        note(f"next: llmctl finetune MODEL -d {shlex.quote(str(found.path))}", quiet=quiet)
        result_json(found.record()) if json else result(str(found.path))
        return 0
    resolved = with_model(resolved, one_name(model, named), quiet=quiet)
    note("loading torch", quiet=quiet)
    from llmctl.jobs.distill_cache import make_cache

    store = make_cache(resolved.config, out, lambda text: note(text, quiet=quiet))
    record = {
        "path": str(out),
        "kind": store.kind,
        "n_rows": store.n_rows,
        "n_labels": store.n_labels,
        "bytes_per_token": round(store.bytes_per_token, 2),
    }
    note(
        f"{store.n_labels:,} tokens, {store.bytes_per_token:.1f} bytes each\n"
        f"next: llmctl distill {shlex.quote(resolved.config.model)} --set {shlex.quote(f'teacher.cache={out}')}",
        quiet=quiet,
    )
    result_json(record) if json else result(str(out))
    return 0
