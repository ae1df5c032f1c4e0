"""Options of every command that trains, the config keys they set, and how a command takes them."""

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from llmctl.commands.grouped_help import settings_of, training_command

if TYPE_CHECKING:
    from llmctl.recipe import Resolved


# Options of multi-process training, shared with `doctor`.
Nproc = Annotated[int, typer.Option(help="Processes to start on this host.")]


Nnodes = Annotated[int, typer.Option(help="Number of hosts; run the command on each.")]


NodeRank = Annotated[int, typer.Option(help="Number of this host, from 0.")]


Master = Annotated[str, typer.Option(help="HOST:PORT of host 0.")]


KEYS = {
    "steps": "train.steps",
    "minutes": "train.minutes",
    "batch_size": "train.batch_size",
    "seq_len": "train.seq_len",
    "seed": "train.seed",
    "device": "train.device",
    "dtype": "train.dtype",
    "compile_": "train.compile",
    "track": "train.track",
    "parallel": "parallel.strategy",
    "deterministic": "parallel.deterministic",
}
"""The config keys that these options set, by their names below."""


@dataclass(frozen=True)
class Options:
    """Options of every training command."""

    recipe: Annotated[str | None, typer.Option("-r", "--recipe", help="YAML recipe; `-`: standard input.")] = None
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output folder, or X.safetensors for a single file.")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Budget in optimizer steps")] = None
    minutes: Annotated[float | None, typer.Option(help="Budget in minutes of wall time.")] = None
    batch_size: Annotated[
        str | None,
        typer.Option(
            "--batch-size", "--batch", help="Rows per step; `auto`: the default, in micro-batches that fit in memory."
        ),
    ] = None
    seq_len: Annotated[int | None, typer.Option(help="Tokens per row.")] = None
    seed: Annotated[int | None, typer.Option(help="Seed for weights, data order and masking.")] = None
    device: Annotated[str | None, typer.Option()] = None
    dtype: Annotated[str | None, typer.Option()] = None
    compile_: Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = None
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other key: section.key=value.")] = None
    nproc: Nproc = 1
    nnodes: Nnodes = 1
    node_rank: NodeRank = 0
    master: Master = ""
    max_restarts: Annotated[int, typer.Option(help="Restarts from the last checkpoint when a process dies.")] = 0
    parallel: Annotated[str | None, typer.Option()] = None
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="Bit-identical weights on 1, 2 or 4 processes.")
    ] = None
    track: Annotated[list[str] | None, typer.Option(help="Log metrics to tensorboard, trackio, wandb, ...")] = None
    resume: Annotated[
        str | None,
        typer.Option(help="Run to resume: folder, number, `latest`, or `auto`: the run in -o if it exists."),
    ] = None
    allow_change: Annotated[
        list[str] | None, typer.Option(help="With --resume: key that may differ from the run's recipe.")
    ] = None
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the resolved recipe and exit.")] = False
    force: Annotated[bool, typer.Option("-f", "--force", help="Replace an existing output.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the metrics.")] = False
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print a line per step.")] = False
    called_at: float | None = None
    """No option: when the command line was called (`time.monotonic`); imports count in a budget of minutes."""

    def flags(self) -> dict[str, Any]:
        """Return the config keys that these options set."""
        values = {name: getattr(self, name) for name in option_names()}
        if self.batch_size == "auto":
            values["batch_size"] = None
        micro_batch_size = -1 if self.batch_size == "auto" else None
        return settings_of(KEYS, values) | {"train.micro_batch_size": micro_batch_size}

    def resolve(self, config_class: type, flags: Mapping[str, Any]) -> "Resolved[Any]":
        """Resolve the config from recipe, environment and options; `flags` are the keys set by the command itself."""
        from llmctl.recipe import load

        refuse_shared_stdin(self.recipe, self.nproc * self.nnodes)
        settings = self.set_ or []
        resolved: Resolved[Any] = load(
            config_class, recipe=self.recipe, settings=settings, flags=self.flags() | dict(flags)
        )
        return with_one_budget(resolved)


def option_names() -> list[str]:
    """Return the names of the options."""
    return [item.name for item in fields(Options) if item.name != "called_at"]


BUDGETS = ("train.steps", "train.tokens", "train.epochs", "train.minutes")
"""The settings that say how long to train; the first three are counts, of which a run has one."""


def with_one_budget(resolved: "Resolved[Any]") -> "Resolved[Any]":
    """Keep the budget of the highest precedence: `--epochs` replaces the steps of a recipe.

    Raises: UsageError for two counts at once, and for a budget of nothing, which is not the same as none.
    """
    from llmctl.errors import UsageError
    from llmctl.recipe import Resolved

    values = {key: getattr(resolved.config.train, key.removeprefix("train.")) for key in BUDGETS}
    given = [key for key in BUDGETS if resolved.origins.get(key) in ("flag", "--set")]
    zeros = [key for key in given if not values[key]]
    if zeros and not any(values.values()):
        raise UsageError(f"`{zeros[0]}` is {values[zeros[0]]:g}: nothing would be trained", "omit it for the default")
    counts = [key for key in BUDGETS[:-1] if values[key]]
    chosen = [key for key in counts if key in given]
    if len(chosen) > 1:
        listed = ", ".join(f"`{key}` {values[key]:g}" for key in chosen)
        raise UsageError(f"a run has one budget, but these are given: {listed}", "keep one; `--minutes` may limit it")
    replaced = {key for key in counts if chosen and key not in chosen}
    if not replaced:
        return resolved
    train = replace(resolved.config.train, **{key.removeprefix("train."): 0 for key in replaced})
    origins = {key: origin for key, origin in resolved.origins.items() if key not in replaced}
    return Resolved(replace(resolved.config, train=train), origins)


def help_of(config_class: type, keys: Mapping[str, str]) -> type:
    """Return the class of a training command whose own parameters set `keys`, beside the shared options."""
    return training_command(config_class, {**KEYS, **keys})


def with_options(command: Callable[..., int]) -> Callable[..., int]:
    """Replace the `options` parameter of a command by one command-line option per field of Options."""
    own = inspect.signature(command, eval_str=False)
    hints = get_type_hints(Options, include_extras=True)
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(Options, name), annotation=hints[name])
        for name in option_names()
    ]
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)

    @wraps(command)
    def run(**values: Any) -> int:
        started = values.pop("context").obj
        options = Options(
            **{name: values.pop(name) for name in option_names()},
            called_at=started if isinstance(started, float) else None,
        )
        return command(options=options, **values)

    kept = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in own.parameters.items()
        if name != "options"
    ]
    parameters = [*kept, *shared, context]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def refuse_shared_stdin(recipe: str | None, n_processes: int) -> None:
    """Refuse a recipe on standard input with several processes: only the first would read it.

    Raises: UsageError for `-r -` with several processes.
    """
    from llmctl.distributed.ranks import LAUNCHED, read_ranks
    from llmctl.errors import UsageError

    if recipe == "-" and (n_processes > 1 or LAUNCHED in os.environ or read_ranks(os.environ).world_size > 1):
        raise UsageError("`-r -` can be read only once, but several processes need the recipe", "use `-r FILE`")
