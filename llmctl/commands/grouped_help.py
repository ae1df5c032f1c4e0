"""`--help` of all commands: options in groups, in one order, with the values and defaults of the settings they set.

`GROUPS` is the one place that says where an option is shown. An option that sets a config key takes its description, its
values and its default from the config, unless it has a description of its own.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from typer.core import TyperCommand, TyperGroup

from llmctl.commands.option_names import name_as_typed
from llmctl.errors import LlmctlError

if TYPE_CHECKING:
    from llmctl.recipe import Key

FIRST = "Options"
GROUPS: Mapping[str, tuple[str, ...]] = {
    FIRST: (
        "size", "model", "objective", "bits", "task", "method", "student", "loss", "data", "calib",
        "steps", "minutes", "tokens", "epochs", "lr", "format_", "keep", "out",
    ),
    "Data": ("val", "columns", "labels", "tokenizer", "seq_len", "strict", "show_example", "dry_run"),
    "Model and method": (
        "scheme", "group", "embedding", "target_size", "target_bpw", "to", "kind", "init", "stages", "on_policy", "teacher_dtype",
        "teacher_backend", "teacher_model", "baseline", "qat", "rank", "merge", "freeze", "trials", "max_drop",
    ),
    "Compute": ("batch_size", "seed", "device", "dtype", "backend", "compile_", "track"),
    "Several processes": (
        "nproc", "nnodes", "node_rank", "master", "max_restarts", "parallel", "deterministic",
    ),
    "Recipe and resuming": ("recipe", "set_", "print_config", "resume", "allow_change"),
    "Output": ("force", "json", "quiet", "verbose", "help"),
}  # fmt: skip
"""Groups of options in their order, and the parameters in each; other options of a command stay in the first group."""

METAVARS = {"text": "TEXT", "str": "TEXT", "integer": "N", "int": "N", "float": "X", "path": "PATH"}
VALUE = re.compile(rf"<?(?:list\[)?\b({'|'.join(METAVARS)})\b\]?(?: range)?>?$", re.IGNORECASE)
"""The value of an option as Typer's versions write it: `<int>`, `<list[str]>`, `INTEGER`."""

NAMES_FIRST = re.compile(r"[\w-]+:")
"""A description that begins by explaining a value, as in `prune: ...`, which keeps its case."""

PLACES = {name: (index, place) for index, names in enumerate(GROUPS.values()) for place, name in enumerate(names)}


class Grouped:
    """Shows options in groups.

    keys: config keys by parameter, with what is known of each key.
    """

    keys: ClassVar[Mapping[str, "Key"]] = {}

    def write_options(self, parameters: Any, ctx: Any, formatter: Any) -> None:
        """Write arguments and groups of options."""
        arguments = [record for p in parameters if p.param_type_name == "argument" and (record := self.row(p, ctx))]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        has_groups = any(p.name in GROUPS["Recipe and resuming"] for p in parameters)
        for title, rows in self.groups(parameters, ctx) if has_groups else [(FIRST, self.rows(parameters, ctx))]:
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def groups(self, parameters: Any, ctx: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yield the title and the rows of every group."""
        for index, title in enumerate(GROUPS):
            inside = [p for p in parameters if PLACES.get(p.name, (0, 0))[0] == index]
            yield title, self.rows(sorted(inside, key=lambda p: PLACES.get(p.name, (0, len(PLACES)))[1]), ctx)

    def rows(self, parameters: Any, ctx: Any) -> list[tuple[str, str]]:
        """Return the rows of options."""
        return [row for p in parameters if p.param_type_name == "option" and (row := self.row(p, ctx))]

    def row(self, parameter: Any, ctx: Any) -> tuple[str, str] | None:
        """Return an option or argument with its value, and its description with values and default."""
        record = parameter.get_help_record(ctx)
        if record is None:
            return None
        key = self.keys.get(parameter.name)
        text = (parameter.help or "").strip() or (key.meaning if key else "")
        if not NAMES_FIRST.match(text):
            text = text[:1].upper() + text[1:]
        text = text.removesuffix(".") if not text.endswith("...") else text
        names = [name for name in key.names if name] if key else []
        if not all(re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) for name in names):
            text += f" [{', '.join(names)}]"
        default = key.default if key is not None else parameter.default
        if is_shown(default) and "default" not in text:
            text += f" [default: {default}]"
        if parameter.param_type_name == "argument":
            name = parameter.metavar or parameter.name.upper()
            return f"{name} ..." if parameter.nargs == -1 else name, text
        value = "NAME" if names else ""
        return VALUE.sub(lambda match: value or METAVARS[match[1].lower()], record[0]), text


class GroupedCommand(Grouped, TyperCommand):
    """A command with options in groups, whose errors name an option where it set the config key.

    settings: every key of the config. set_by: the keys by the parameters that set them.
    """

    settings: ClassVar[Mapping[str, "Key"]] = {}
    set_by: ClassVar[Mapping[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the command line for errors, and parse it."""
        ctx.meta["llmctl.arguments"] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises: what the command raises; its errors name `--steps` as typed, not `train.steps`.
        """
        try:
            return super().invoke(ctx)
        except LlmctlError as error:
            given = [p for p in self.params if getattr(ctx.get_parameter_source(p.name), "name", "") == "COMMANDLINE"]
            text, typed = str(error), ctx.meta["llmctl.arguments"]
            error.args = (name_as_typed(text, self.set_by, given, typed),)
            error.hint = name_as_typed(error.hint, self.set_by, given, typed)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        self.write_options(self.get_params(ctx), ctx, formatter)


class GroupedGroup(Grouped, TyperGroup):
    """A command with subcommands, with options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, options and subcommands."""
        self.write_options(self.get_params(ctx), ctx, formatter)
        self.format_commands(ctx, formatter)


def is_shown(default: Any) -> bool:
    """Tell whether a default says something: not whether it is off, empty, or chosen later."""
    return not callable(default) and default not in (None, False, True, "", (), [], 0, 0.0, "auto")


def training_command(config_class: type, keys: Mapping[str, str]) -> type[GroupedCommand]:
    """Return the class of a command whose parameters set these keys of a config."""
    from llmctl.recipe import keys_of

    known = keys_of(config_class)
    values = {"keys": {name: known[key] for name, key in keys.items()}, "settings": known, "set_by": keys}
    return type("TrainingCommand", (GroupedCommand,), values)


def settings_of(keys: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by config key from a command's parameters by name (`locals()` at its first line); None if not given."""
    return {key: values[name] or None if values[name] in ([], "") else values[name] for name, key in keys.items()}
