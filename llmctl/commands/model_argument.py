"""The model that a training command is given, and what it decides about the settings."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.commands.common import find_model, note
from llmctl.commands.options import Options

if TYPE_CHECKING:
    from llmctl.config import DistillConfig, PretrainConfig
    from llmctl.recipe import Resolved


def needs_model(options: Options, model: str | None, config: Any) -> bool:
    """Tell whether a command has to find its model: not to resume, nor to print the defaults."""
    is_named = bool(model or config.model)
    return options.resume in (None, "auto") and (is_named or not options.print_config)


def with_model(resolved: "Resolved[Any]", model: str | None, *, quiet: bool) -> "Resolved[Any]":
    """Return the config with the model resolved: the argument, the recipe's, or the default model."""
    from llmctl.artifacts.hub import shown
    from llmctl.recipe import Resolved

    name = model or resolved.config.model or None
    path = find_model(name, "any", quiet=quiet or name is not None)
    if name is not None and str(path) != name:
        note(f"model: {shown(path)}", quiet=quiet)
    origins = resolved.origins | ({"model": "flag"} if model else {})
    return Resolved(replace(resolved.config, model=str(path)), origins)


def with_other_models(resolved: "Resolved[DistillConfig]") -> "Resolved[DistillConfig]":
    """Return the config of a distillation with further teachers, and a student that is a model, resolved."""
    from llmctl.artifacts import hub
    from llmctl.artifacts.find import find_named
    from llmctl.recipe import Resolved

    config = resolved.config
    more = tuple(str(find_named(name, "any")) for name in config.teacher.more)
    shape = config.student.shape
    shape = str(find_named(shape, "any")) if hub.parse(shape) is not None else shape
    config = replace(config, teacher=replace(config.teacher, more=more), student=replace(config.student, shape=shape))
    return Resolved(config, resolved.origins)


def settled(command: str, resolved: "Resolved[Any]") -> "Resolved[Any]":
    """Return the config with what the model would decide in the origins, if a model is named; else as it is.

    The values stay as given: printed as a recipe, a value of the model's choosing would be pinned for other flags too.
    """
    if not getattr(resolved.config, "model", ""):
        return resolved
    from llmctl.jobs.runner import JOBS
    from llmctl.recipe import Resolved, changed_keys, plain, scalar

    changes = changed_keys(resolved.config, JOBS[command].settle(resolved.config))
    chosen = {key: f"this model: {scalar(plain(value))}" for key, (_, value) in changes.items()}
    return Resolved(resolved.config, {**resolved.origins, **chosen})


def with_preset(resolved: "Resolved[PretrainConfig]") -> "Resolved[PretrainConfig]":
    """Return the config of a pretraining run with a model in the place of the preset resolved."""
    from llmctl.recipe import Resolved

    model = resolved.config.model
    model = replace(model, preset=preset_or_model(model.preset))
    return Resolved(replace(resolved.config, model=model), resolved.origins)


def preset_or_model(name: str) -> str:
    """Return a preset's name as it is, and the path of a model that is named as in other commands: `latest`, a run's number."""
    from llmctl.artifacts.find import find_named
    from llmctl.artifacts.hub import parse
    from llmctl.errors import NotFoundError
    from llmctl.model.presets import ALIASES, PRESETS

    if not name or name == "auto" or name.lower() in {*PRESETS, *ALIASES}:
        return name
    try:
        return str(find_named(name, "any"))
    except NotFoundError:
        if name == "latest" or Path(name).name.isdecimal() or parse(name) is not None:
            raise
        return name  # a misspelled preset: the closest one is suggested
