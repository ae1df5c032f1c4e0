"""Resolve the model of a command: an explicit name, the current directory, the newest suitable run, the default."""

import os
import shlex
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmctl.errors import LlmctlError, NotFoundError, UsageError
from llmctl.files import contents, download_hint
from llmctl.runs.folder import read_record, run_paths, runs_folder
from llmctl.tables.heads import HEADS
from llmctl.tables.tasks import TASKS

if TYPE_CHECKING:
    from llmctl.config import ModelConfig


Ability = Literal["generate", "fill", "classify", "any"]


EVERY = ("decoder", "encoder", "encoder_decoder")


FAMILIES: dict[str, tuple[str, ...]] = {
    "generate": ("decoder", "encoder_decoder"),
    "fill": ("encoder",),
    "classify": EVERY,
    "any": EVERY,
}


WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
"""A model folder contains one of these files; the last marks an adapter."""


MAKE_ONE = {
    "generate": "`llmctl pretrain` trains one in a minute",
    "fill": "`llmctl pretrain --objective mlm` trains one in a minute",
    "classify": "`llmctl finetune MODEL DATA --task classify` trains one",
    "any": "`llmctl pretrain` trains one in a minute",
}


@dataclass(frozen=True)
class Found:
    """A model's path and the reason it was chosen."""

    path: Path
    why: str


def default_file() -> Path:
    """Return the file in which `llmctl use` stores the default model's path."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "llmctl" / "default"


def resolve_model(name: str | None, *, able: Ability) -> Found:
    """Resolve the model to use: `name` > LLMCTL_MODEL > this directory > the newest finished run > `llmctl use`.

    A name is a file, a folder, a run's number or prefix (with or without `runs/`), `latest`, or `org/name` of the
    Hugging Face Hub, which is downloaded. Only the search among runs checks `able`.
    Raises: NotFoundError if there is no model; UsageError for an empty name.
    """
    if name is not None:
        return Found(find_named(name, able), "named")
    variable = os.environ.get("LLMCTL_MODEL")
    if variable:
        try:
            return Found(find_named(variable, able), "LLMCTL_MODEL")
        except NotFoundError as error:
            raise NotFoundError(f"LLMCTL_MODEL: {error}", error.hint) from None
    if any(Path(weights).is_file() for weights in WEIGHTS):
        return Found(Path(), "in this directory")
    newest = newest_run(able)
    if newest is not None:
        return Found(newest, f"newest run able to {able}" if able != "any" else "newest run")
    chosen = default_file()
    if chosen.is_file():
        default = Path(chosen.read_text(encoding="utf-8").strip())
        if not default.exists():  # do not fall back silently: the user chose this model
            raise NotFoundError(f"the default model `{default}` no longer exists", "`llmctl use MODEL` sets another")
        return Found(default, "set by `llmctl use`")
    raise nothing_found(able)


def find_named(name: str, able: Ability) -> Path:
    """Resolve a model name to a path.

    Raises: NotFoundError; UsageError for an empty name (a command substitution that failed), an ambiguous one, or data.
    """
    if not name:
        raise UsageError("the model name is empty", "pass a model folder, a .safetensors file, or a run in runs/")
    path = Path(name)
    if path.exists():
        refuse_data(path)
        return path
    folder = runs_folder()
    if name == "latest" or path == folder / "latest":
        newest = newest_run(able)
        if newest is None:
            raise nothing_found(able)
        return newest
    # Only bare names and paths into the runs folder are looked up there; `x/y` is a path.
    is_run = folder.is_dir() and path.parent in (Path(), folder)
    models = sorted(run for run in folder.iterdir() if is_model(run)) if is_run else []
    # `12` and `runs/12` mean run 0012 first, and only then a run whose name starts with 12.
    number = f"{int(path.name):04d}-" if path.name.isdecimal() else path.name
    numbered, named = ([run for run in models if run.name.startswith(prefix)] for prefix in (number, path.name))
    matches = numbered or named
    if len(matches) == 1 or (matches and matches[0].name == path.name):
        return matches[0]
    if matches:
        names = ", ".join(f"`{run.name}`" for run in matches[:5])
        raise UsageError(f"`{name}` matches more than one run: {names}", "give a longer prefix")
    from llmctl.artifacts import hub

    if path.parent != folder and (reference := hub.parse(name)) is not None:
        return hub.find(reference)
    hint = download_hint(name) or "pass a model folder, a .safetensors file, a run in runs/, or org/name of the Hub"
    raise NotFoundError(f"model `{name}` does not exist", hint)


def refuse_data(path: Path) -> None:
    """Refuse data in the place of a model: a file of another kind, or a folder of texts.

    Raises: UsageError with the right order.
    """
    from llmctl.data.sources import is_data

    if is_data(path):
        what = (
            f"has no model in it (no `config.json`): {contents(path)}"
            if path.is_dir()
            else "is not a model: it is data"
        )
        raise UsageError(
            f"`{path}` {what}",
            "pass a model folder, a .safetensors file, or a run in runs/; the order is MODEL DATA, and where data is an "
            f"option, it goes after `-d`: MODEL -d {shlex.quote(str(path))}",
        )


def is_model(folder: Path) -> bool:
    """Tell whether a folder contains weights; links are skipped, so that `latest` does not duplicate its run."""
    return not folder.is_symlink() and any((folder / weights).is_file() for weights in WEIGHTS)


def finished_runs() -> list[tuple[Path, dict[str, Any]]]:
    """Return the finished runs with their records, newest first: those that `llmctl runs` lists."""
    records = ((path, read_record(path)) for path in run_paths())
    runs = [(path, record) for path, record in records if record.get("status") == "finished" and is_model(path)]
    return sorted(runs, key=lambda run: (moment(run[1].get("finished")), run[0].name), reverse=True)


def moment(text: Any) -> float:
    """Return a time with its zone as seconds since 1970; 0 if it is none. As text, times of two zones do not compare."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def newest_run(able: Ability) -> Path | None:
    """Return the newest finished run whose model is `able`, or None."""
    return next(
        (path for path, record in finished_runs() if can(able, record.get("family"), bool(record.get("has_head")))),
        None,
    )


def can(able: Ability, family: Any, has_head: bool) -> bool:
    """Tell whether a model of this family, with or without a classification head, is `able`."""
    return family in FAMILIES[able] and (able == "any" or has_head == (able == "classify"))


def nothing_found(able: Ability) -> NotFoundError:
    """Return the error for no model at all, or for no run with a suitable one."""
    runs = finished_runs()
    if runs:
        path, record = runs[0]
        family, has_head = str(record.get("family", "unknown")), bool(record.get("has_head"))
        what = "a classifier" if has_head else a_model(family)
        return NotFoundError(
            f"no run can {able}: the newest, `{path}`, is {what}",
            f"use it with `llmctl {use_of(family, has_head=has_head)}`; {MAKE_ONE[able]}",
        )
    return NotFoundError(f"no model found: there is no finished run in `{runs_folder()}`", MAKE_ONE[able])


def announce(found: Found) -> str:
    """Format one line with the model's path, why it was chosen, its size and its age."""
    facts = [found.why, parameters_in(found.path)]
    record = found.path / "run.json"
    if record.is_file():
        facts.append(ago(time.time() - record.stat().st_mtime))
    from llmctl.artifacts import hub

    shown = found.path.resolve() if found.path == Path() else hub.shown(found.path)
    return f"model: {shown} ({', '.join(fact for fact in facts if fact)})"


def parameters_in(path: Path) -> str:
    """Format a model's parameter count, such as `124M parameters`; empty if its files cannot be read."""
    from llmctl.formats.adapter import is_adapter, read_adapter
    from llmctl.formats.artifact import check_kind, count_parameters, read_headers

    try:
        if is_adapter(path):
            return f"an adapter for `{read_adapter(path).base}`"
        check_kind(path)
        headers = read_headers(path)
    except (LlmctlError, OSError):
        return ""
    count = sum(count_parameters(header) for header in headers.values())
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit} parameters"
    return f"{count} parameters"


def ago(seconds: float) -> str:
    """Format an age, such as `3 h ago`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def a_model(family: str) -> str:
    """Return `a decoder model`, `an encoder model`."""
    kind = family.replace("_", "-")
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind} model"


def kind_of(config: "ModelConfig") -> str:
    """Return what a model is: `a token classifier`, `an encoder model`."""
    return HEADS[config.head].model if config.n_labels else a_model(config.family)


def refuse_token_head(config: "ModelConfig", name: str, doing: str) -> None:
    """Refuse a model with a head over tokens where only other heads are known; `doing`: `fine-tuned`.

    Raises: UsageError naming the head.
    """
    if config.n_labels and config.head != "text":
        raise UsageError(
            f"`{name}` is {kind_of(config)} (`model.head` {config.head}), which cannot be {doing}",
            "`llmctl classify` uses it, `llmctl evaluate` measures it, and `llmctl quantize` makes it smaller",
        )


def require_family(config: "ModelConfig", able: Ability, path: Path) -> None:
    """Check that a model is `able`.

    Raises: UsageError naming the command that can use it.
    """
    has_head = config.n_labels > 0
    if not can(able, config.family, has_head):
        what = kind_of(config)
        other = use_of(config.family, has_head=has_head)
        if able == "classify":
            raise UsageError(
                f"`{path}` is {what} without a classification head, which `llmctl classify` needs",
                f"`llmctl finetune {shlex.quote(str(path))} DATA --task classify` trains one; as it is, use it with "
                f"`llmctl {other}`",
            )
        raise UsageError(f"`{path}` is {what}, which cannot {able}", f"use it with `llmctl {other}`; {MAKE_ONE[able]}")


def use_of(family: str, *, has_head: bool) -> str:
    """Return the command that can use such a model."""
    if has_head:
        return "classify"
    return "fill" if family == "encoder" else "generate"


def usage(config: "ModelConfig", model: str, *, is_chat: bool = False, is_bare: bool = False) -> str:
    """Return a command line that uses a model.

    is_chat: it was trained on conversations. is_bare: it is an encoder without a head.
    """
    verb = use_of(config.family, has_head=config.n_labels > 0)
    name = shlex.quote(model)
    if is_bare:
        return f"llmctl evaluate {name} -d pairs.tsv --task similarity"
    if is_chat:
        return f"llmctl chat {name}"
    text = '"a <mask> text"' if verb == "fill" else HEADS[config.head].given
    return f"llmctl {verb} -m {name} {text}"


OTHERS = "`llmctl runs` lists other models"


def needs_data(path: Path, config: "ModelConfig", task: str) -> UsageError:
    """Return the error for a task without data; it names the model, since `latest` can be another than was meant."""
    what = kind_of(config)
    roles = ", ".join(name for name, role in TASKS[task].roles.items() if role.required) or TASKS[task].reads
    return UsageError(
        f"`{path}` is {what}, and `--task {task}` needs data",
        f"`-d FILE` names data with {roles}; {OTHERS}, to name instead of this one",
    )
