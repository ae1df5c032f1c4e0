"""A teacher behind a server: its answers to prompts are collected, and a student is trained on them."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.commands.common import note, result
from llmctl.commands.options import Options
from llmctl.commands.training import run_training

if TYPE_CHECKING:
    from llmctl.config import DistillConfig
    from llmctl.distilling.server_rows import Collected
    from llmctl.recipe import Resolved


def is_url(name: str) -> bool:
    """Tell whether a teacher is the address of a server."""
    return name.startswith(("http://", "https://"))


def collect_answers(config: "DistillConfig", out: Path, *, quiet: bool) -> "Collected":
    """Ask the server for answers to the prompts of a recipe's data, and write them into a folder.

    Raises: UsageError, NotFoundError, StoppedError.
    """
    from llmctl.data.conversations import Message
    from llmctl.data.prompts import read_prompts
    from llmctl.distilling.server import Server
    from llmctl.distilling.server_answers import collect
    from llmctl.errors import UsageError
    from llmctl.files import ensure_writable

    if not config.data.paths:
        raise UsageError(
            "a teacher behind a server needs prompts", "-d prompts.jsonl, or a text file with one on each line"
        )
    server = Server(config.model, config.server)
    prompts = list(read_prompts(config.data.paths))
    if config.system:
        first = Message("system", config.system)
        prompts = [
            asked._replace(messages=(first, *asked.messages))
            if asked.messages and asked.messages[0].role != "system"
            else asked
            for asked in prompts
        ]
    ensure_writable(out)
    found = collect(server, prompts, out, config.server, lambda text: note(text, quiet=quiet))
    note(found.line(), quiet=quiet)
    return found


def train_on_answers(resolved: "Resolved[DistillConfig]", options: Options) -> int:
    """Collect answers, and fine-tune the student on them.

    Raises: UsageError for a student that is no existing model.
    """
    from llmctl.artifacts.find import find_named
    from llmctl.config import FinetuneConfig
    from llmctl.errors import UsageError
    from llmctl.recipe import dump, given_values, keys_of, load

    config = resolved.config
    if options.print_config:
        result(dump(resolved).rstrip("\n"))
        return 0
    shape = config.student.shape
    if "%" in shape or "=" in shape:
        raise UsageError(
            f"`--student {shape}`: the weights of a teacher behind a server cannot be pruned",
            "--student MODEL: an existing model, such as a run of `llmctl pretrain`",
        )
    student = str(find_named(shape, "any"))
    out = answers_folder(config, options.out)
    found = collect_answers(config, out, quiet=options.quiet)
    known = keys_of(FinetuneConfig)
    values: dict[str, Any] = {key: value for key, value in given_values(resolved).items() if key in known}
    values |= {"model": student, "data.paths": (str(found.path),)}
    if config.task == "auto":
        values["task"] = ("prefer" if config.server.keep == "pairs" else "chat") if found.has_messages else "text"
    tuning = load(FinetuneConfig, settings=[], flags=values)
    return run_training("finetune", tuning, replace(options, recipe=None, set_=None))


def answers_folder(config: "DistillConfig", out: Path | None) -> Path:
    """Return where answers are kept: beside the run, or by what is asked, so that a repeated command finds them."""
    if out is not None:
        return out.with_name(f"{out.name}-answers")
    asked = repr((config.model, config.server, config.data.paths, config.system))
    return Path("runs") / f"answers-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
