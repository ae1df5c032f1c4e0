"""Which model a command uses: by name, the current directory, the newest run that can do it, the default."""

import json
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmctl.errors import LlmctlError, NotFoundError, UsageError
from llmctl.runs.folder import runs_folder

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
"""The files of which a model folder has one; the last makes it an adapter's."""


MAKE_ONE = {
    "generate": "make one in a minute: llmctl pretrain",
    "fill": "make one in a minute: llmctl pretrain --objective mlm",
    "classify": "llmctl finetune MODEL DATA --task classify makes one",
    "any": "make one in a minute: llmctl pretrain",
}


@dataclass(frozen=True)
class Found:
    """A model's place and why it was chosen."""

    path: Path
    why: str


def default_file() -> Path:
    """Return the file in which `llmctl use` keeps its choice."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "llmctl" / "default"


def resolve_model(name: str | None, *, able: Ability) -> Found:
    """Find the model to use: `name` > LLMCTL_MODEL > this directory > the newest finished run > `llmctl use`.

    A name is a file, a folder, a run's number or prefix, or `latest`. Only models able to do what is asked are
    taken from runs; one that was named is taken as it is.
    Raises: NotFoundError saying what was looked for and how to make one; UsageError for an empty name.
    """
    if name is not None:
        return Found(find_named(name, able), "named")
    variable = os.environ.get("LLMCTL_MODEL")
    if variable:
        return Found(find_named(variable, able), "LLMCTL_MODEL")
    if any(Path(weights).is_file() for weights in WEIGHTS):
        return Found(Path(), "in this directory")
    newest = newest_run(able)
    if newest is not None:
        return Found(newest, f"newest run able to {able}" if able != "any" else "newest run")
    chosen = default_file()
    if chosen.is_file():
        default = Path(chosen.read_text(encoding="utf-8").strip())
        if not default.exists():
            raise NotFoundError(f"the default model `{default}` is gone", "llmctl use MODEL chooses another")
        return Found(default, "set by `llmctl use`")
    raise nothing_found(able)


def find_named(name: str, able: Ability) -> Path:
    """Return the model that a name means.

    Raises: NotFoundError; UsageError for an empty name (a command substitution that failed) or an ambiguous one.
    """
    if not name:
        raise UsageError("the model's name is empty", "name a model folder, a .safetensors file, or a run in runs/")
    path = Path(name)
    if path.exists():
        return path
    folder = runs_folder()
    if name == "latest":
        newest = newest_run(able)
        if newest is None:
            raise nothing_found(able)
        return newest
    is_run = folder.is_dir() and path.parent in (Path(), folder)
    beginnings = (f"{int(name):04d}-", name) if name.isdecimal() else (path.name,)
    matches = (
        sorted(run for run in folder.iterdir() if run.name.startswith(beginnings) and is_model(run)) if is_run else []
    )
    if len(matches) == 1 or (matches and matches[0].name == path.name):
        return matches[0]
    if matches:
        names = ", ".join(f"`{run.name}`" for run in matches[:5])
        raise UsageError(f"`{name}` means more than one run: {names}", "write more of the name")
    raise NotFoundError(f"there is no model `{name}`", "name a model folder, a .safetensors file, or a run in runs/")


def is_model(folder: Path) -> bool:
    """Tell whether a folder holds weights; the link `latest` is not counted beside the run it means."""
    return not folder.is_symlink() and any((folder / weights).is_file() for weights in WEIGHTS)


def finished_runs() -> list[tuple[Path, dict[str, Any]]]:
    """Return the finished runs with their records, newest first."""
    runs = []
    for path in runs_folder().glob("[0-9][0-9][0-9][0-9]-*"):
        try:
            record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("status") == "finished" and is_model(path):
            runs.append((path, record))
    return sorted(runs, key=lambda run: (str(run[1].get("finished", "")), run[0].name), reverse=True)


def newest_run(able: Ability) -> Path | None:
    """Return the newest finished run that can do what is asked."""
    return next(
        (path for path, record in finished_runs() if can(able, record.get("family"), bool(record.get("has_head")))),
        None,
    )


def can(able: Ability, family: Any, has_head: bool) -> bool:
    """Tell whether a model of a family, with a classification head or without, can do what is asked."""
    return family in FAMILIES[able] and (able == "any" or has_head == (able == "classify"))


def nothing_found(able: Ability) -> NotFoundError:
    """Return the error for no model at all, or none of the kind that is needed."""
    runs = finished_runs()
    if runs:
        path, record = runs[0]
        family, has_head = str(record.get("family", "unknown")), bool(record.get("has_head"))
        what = "a classifier" if has_head else a_model(family)
        return NotFoundError(
            f"no run can {able}: the newest, `{path}`, is {what}",
            f"`llmctl {use_of(family, has_head=has_head)}` uses it; or {MAKE_ONE[able]}",
        )
    return NotFoundError("no model yet", MAKE_ONE[able])


def announce(found: Found) -> str:
    """Return the one line that says which model is used, why, and how large and old it is."""
    facts = [found.why, parameters_in(found.path)]
    record = found.path / "run.json"
    if record.is_file():
        facts.append(ago(time.time() - record.stat().st_mtime))
    shown = found.path.resolve() if found.path == Path() else found.path
    return f"model: {shown} ({', '.join(fact for fact in facts if fact)})"


def parameters_in(path: Path) -> str:
    """Return how many numbers a model's weights have, as a person says it; nothing where loading will complain."""
    from llmctl.formats.adapter import is_adapter, read_adapter
    from llmctl.formats.artifact import check_kind, n_numbers, read_headers

    try:
        if is_adapter(path):
            return f"an adapter of `{read_adapter(path).base}`"
        check_kind(path)
        headers = read_headers(path)
    except (LlmctlError, OSError):
        return ""
    count = sum(n_numbers(header) for header in headers.values())
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit} parameters"
    return f"{count} parameters"


def ago(seconds: float) -> str:
    """Return an age as a person says it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def a_model(family: str) -> str:
    """Return `a decoder model`, `an encoder model`."""
    kind = family.replace("_", "-")
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind} model"


def require_family(config: "ModelConfig", able: Ability, path: Path) -> None:
    """Refuse a model that cannot do what is asked.

    Raises: UsageError naming the command that can use it.
    """
    has_head = config.n_labels > 0
    if not can(able, config.family, has_head):
        what = "a classifier" if has_head else a_model(config.family)
        other = use_of(config.family, has_head=has_head)
        raise UsageError(f"`{path}` is {what}, which cannot {able}", f"`llmctl {other}` uses it; or {MAKE_ONE[able]}")


def use_of(family: str, *, has_head: bool) -> str:
    """Return the command that uses a model."""
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
    text = "a <mask> text" if verb == "fill" else "a text"
    return f'llmctl {verb} -m {name} "{text}"'
