"""Merge defaults, a YAML recipe, the environment and flags into one frozen config, with strict keys and typed values.

Precedence: defaults < recipe < `LLMCTL_SECTION_KEY` < `--set` < flags. All problems are reported together.
Works on any config class; knows nothing about what the settings do.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from llmctl.config import ModelChoice, ModelConfig
from llmctl.errors import NotFoundError, UsageError
from llmctl.tables.dtypes import full_name
from llmctl.tables.names import closest

Config = TypeVar("Config")
MAX_VALUES = 100_000
"""Of a recipe; the longest one has about 200."""
MAX_CHARS = 500_000
MAX_DEPTH = 100
OPEN_OR_CLOSED = re.compile(r"[\[\]{}]")
RESERVED_VARIABLES = {"LLMCTL_MODEL", "LLMCTL_RUNS", "LLMCTL_CACHE", "LLMCTL_NATIVE", "LLMCTL_DEBUG"}


@dataclass(frozen=True)
class Resolved(Generic[Config]):
    """A config and, for every key that was set, the origin of its value."""

    config: Config
    origins: dict[str, str]


@dataclass(frozen=True)
class Key:
    """One setting: its type, default and one-line description; `has_commas` marks comma-separated lists."""

    kind: Any
    default: Any
    meaning: str
    has_commas: bool = False
    choices: Callable[[], tuple[str, ...]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the setting takes; empty if it takes any value."""
        if self.choices is not None:
            return self.choices()
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def text(self) -> str:
        """The description with the names of the table that the setting takes."""
        if self.choices is None:
            return self.meaning
        return f"{self.meaning} [{', '.join(name or 'empty' for name in self.choices())}]"


def keys_of(config_class: type, prefix: str = "") -> dict[str, Key]:
    """Return every dotted key of a config class, nested sections included; a ModelChoice accepts ModelConfig's fields."""
    hints = get_type_hints(config_class)
    keys: dict[str, Key] = {}
    for item in dataclasses.fields(config_class):
        name, kind = prefix + item.name, hints[item.name]
        if kind is ModelChoice:
            # A model section is a preset name plus overrides of ModelConfig, so its keys come from two classes.
            preset = {field.name: field for field in dataclasses.fields(ModelChoice)}["preset"]
            keys[f"{name}.preset"] = Key(str, preset.default, preset.metadata["help"])
            keys |= keys_of(ModelConfig, f"{name}.")
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            keys |= keys_of(kind, f"{name}.")
        else:
            default = item.default
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            keys[name] = Key(
                kind, default, item.metadata["help"], "commas" in item.metadata, item.metadata.get("choices")
            )
    return keys


def load(
    config_class: type[Config],
    *,
    recipe: str | None = None,
    settings: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Resolved[Config]:
    """Resolve a config.

    recipe: a YAML file, or `-` for standard input; settings: `section.key=value` strings; flags: dotted key -> value,
    None if not given.
    Raises: UsageError naming every unknown key and every value of the wrong type; NotFoundError for a missing file.
    """
    keys = keys_of(config_class)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    problems: list[str] = []

    def take(pairs: Iterator[tuple[str, Any, str]]) -> None:
        for key, value, origin in pairs:
            if key in keys:
                values[key], origins[key] = value, origin
            else:
                problems.append(unknown_key(key, keys, origin))

    if recipe is not None:
        take((key, value, f"recipe {recipe}") for key, value in flatten(read_recipe(recipe), keys))
    # In order of precedence, lowest first: later sources overwrite values and origins.
    take(from_environment(keys, os.environ if environment is None else environment))
    take(from_settings(settings, keys, problems))
    take((key, value, "flag") for key, value in (flags or {}).items() if value is not None)
    config = None if problems else build(config_class, values, keys, origins, problems)
    if problems or config is None:
        raise UsageError("; ".join(problems), "`--print-config` lists every key with a description")
    return Resolved(config, origins)


USUAL = ("train.steps", "model.preset", "data.paths", "optim.lr", "loss.name", "weights.scheme", "student.shape")
"""The setting that is meant most often if only its section is named."""


def unknown_key(key: str, keys: Mapping[str, Key], origin: str) -> str:
    """Describe an unknown key, with the closest existing one."""
    # A key of the right name in the wrong section is the most common mistake, before typing errors.
    last = key.rsplit(".", 1)[-1]
    inside = [known for known in keys if known.startswith(f"{key}.")]
    if inside:
        usual = next((known for known in USUAL if known in inside), inside[0])
        return f"`{key}` ({origin}) is a section, not a setting, did you mean `{usual}`?"
    same_name = [known for known in keys if known.rsplit(".", 1)[-1] == last]
    close = same_name[0] if same_name else closest(key, keys)
    suffix = f", did you mean `{close}`?" if close else ""
    return f"`{key}` ({origin}) is not a setting{suffix}"


def read_recipe(path: str) -> dict[str, Any]:
    """Read a YAML mapping from a file or from standard input (`-`).

    Raises: NotFoundError for a missing file; UsageError if it is not text, not YAML or not a mapping.
    """
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFoundError(f"recipe `{path}` does not exist", "-r takes the path of a YAML file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe `{path}` is not a text file: {error}", "-r takes the path of a YAML file") from None
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"recipe `{path}` is not valid YAML: {error}", "correct the line named above") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            f"recipe `{path}` is a {type(content).__name__}, not a mapping of settings", "write `key: value` lines"
        )
    return content


def flatten(tree: Mapping[Any, Any], keys: Mapping[str, Key], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of a nested mapping; a scalar for a section with presets names one (`model: tiny`)."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in keys:
            yield from flatten(value, keys, f"{key}.")
        elif f"{key}.preset" in keys and key not in keys:
            yield f"{key}.preset", value
        else:
            yield key, value


def from_environment(keys: Mapping[str, Key], environment: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, origin) of the `LLMCTL_...` variables."""
    for key in keys:
        variable = "LLMCTL_" + key.replace(".", "_").upper()
        if variable in environment and variable not in RESERVED_VARIABLES:
            yield key, parse_for(key, environment[variable], keys), f"environment {variable}"


def from_settings(
    settings: Sequence[str], keys: Mapping[str, Key], problems: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, origin) of `--set key=value`; malformed ones are added to `problems`."""
    for item in settings:
        key, equals, text = item.partition("=")
        if not equals:
            problems.append(f"`--set {item}` has no `=`: write --set section.key=value")
            continue
        yield key.strip(), parse_for(key.strip(), text, keys), "--set"


def parse_for(key: str, text: str, keys: Mapping[str, Key]) -> Any:
    """Parse a key's value as YAML, but keep string settings as they are: `{source}` is a template, not a mapping."""
    value = parse(text)
    is_text = key in keys and keys[key].kind is str
    return text if is_text and not isinstance(value, str) else value


def parse(text: str) -> Any:
    """Parse a value as YAML; if that fails, return the string."""
    try:
        return parse_yaml(text)
    except ValueError:
        return text


def parse_yaml(text: str) -> Any:
    """Parse YAML of a file that others made.

    Raises: ValueError for whatever the library raises, and for aliases that make a small text a large value.
    """
    import yaml

    loader = None
    check_text(text)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        check_nodes(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # The library converts dates and numbers without checks, and refuses control characters with a ReaderError.
        raise ValueError(" ".join(str(error).split())[:500] or type(error).__name__) from None
    finally:
        if loader is not None:
            loader.dispose()


def check_text(text: str) -> None:
    """Check the size and nesting of a text, for which the library takes time by the square.

    Raises: ValueError.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"it has {len(text):,} characters, more than {MAX_CHARS:,}")
    depth = 0
    for sign in OPEN_OR_CLOSED.findall(text):
        depth = depth + 1 if sign in "[{" else max(depth - 1, 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_DEPTH} brackets that are not closed")


def check_nodes(root: Any) -> None:
    """Check the size that a document has with its aliases written out, before any of it is built.

    Nine aliases of nine aliases, nine times, are 387 million values ("billion laughs").
    Raises: ValueError.
    """
    sizes: dict[int, int] = {}  # of what is under each node; 0 while it is being counted
    waiting = [(root, False)]
    while waiting:
        node, is_counted = waiting.pop()
        value = node.value if isinstance(node.value, list) else []
        parts = [part for item in value for part in (item if isinstance(item, tuple) else (item,))]
        if is_counted:
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
            if sizes[id(node)] > MAX_VALUES:
                raise ValueError(
                    f"line {node.start_mark.line + 1} has more than {MAX_VALUES:,} values, with its aliases"
                )
        elif id(node) not in sizes:
            sizes[id(node)] = 0
            waiting += [(node, True), *((part, False) for part in parts)]
        elif not sizes[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1} contains itself")


def build(
    config_class: type[Config],
    values: Mapping[str, Any],
    keys: Mapping[str, Key],
    origins: Mapping[str, str],
    problems: list[str],
    prefix: str = "",
) -> Config | None:
    """Build the nested dataclasses, coercing each value to its field's type; errors are added to `problems`."""
    fields: dict[str, Any] = {}
    for name, kind in get_type_hints(config_class).items():
        key = prefix + name
        if kind is ModelChoice:
            typed = {k: coerce(k, values[k], keys[k], origins, problems) for k in values if k.startswith(f"{key}.")}
            preset = typed.pop(f"{key}.preset", "auto")
            fields[name] = ModelChoice(preset, {k.removeprefix(f"{key}."): v for k, v in typed.items()})
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            fields[name] = build(kind, values, keys, origins, problems, f"{key}.")
        elif key in values:
            fields[name] = coerce(key, values[key], keys[key], origins, problems)
    return None if problems else config_class(**fields)


def coerce(key: str, value: Any, info: Key, origins: Mapping[str, str], problems: list[str]) -> Any:
    """Convert a value to the field's type, or add the reason to `problems`."""
    from pydantic import TypeAdapter, ValidationError

    if info.has_commas and isinstance(value, str):
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    if get_origin(info.kind) is tuple and isinstance(value, (str, int)):
        value = (value,)
    # YAML parses `name: 2024` as a number, but it is a valid string.
    if info.kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if info.kind is int and isinstance(value, str):
        value = whole_number(value)
    if info.names and all(isinstance(name, str) for name in info.names):
        return chosen(key, "" if value is None else str(value), info.names, origins, problems)
    try:
        return TypeAdapter(info.kind).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        problems.append(f"`{key}` is `{str(value)[:200]}`{origin_of(key, origins)}: {reason[0].lower()}{reason[1:]}")
        return None


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Return where a value came from, in parentheses; a flag needs none: the command names it instead of the key."""
    origin = origins.get(key, "default")
    return "" if origin == "flag" else f" ({origin})"


def chosen(key: str, value: str, names: Sequence[str], origins: Mapping[str, str], problems: list[str]) -> str:
    """Return the name that is meant, or note that there is none."""
    name = value if value in names else full_name(value)
    if name not in names:
        close = closest(value, names)
        suffix = f", did you mean `{close}`?" if close else ""
        known = ", ".join(f"`{each}`" for each in names if each)
        problems.append(f"`{key}` is `{str(value)[:200]}`{origin_of(key, origins)}: it must be one of {known}{suffix}")
    return name


def whole_number(text: str) -> Any:
    """Convert text such as `1e6`, which YAML 1.1 parses as a string, to an integer; return anything else unchanged."""
    try:
        return int(float(text)) if float(text).is_integer() else text
    except ValueError:
        return text


def nested(config: Any) -> dict[str, Any]:
    """Return a config as a recipe's nested mapping (tuples as lists, a ModelChoice as one section)."""
    tree: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, ModelChoice):
            tree[item.name] = {"preset": value.preset, **{k: plain(v) for k, v in value.overrides.items()}}
        elif dataclasses.is_dataclass(value):
            tree[item.name] = nested(value)
        else:
            tree[item.name] = plain(value)
    return tree


def values_of(config: Any) -> dict[str, Any]:
    """Return a config's values by dotted key."""
    return dict(flatten(nested(config), keys_of(type(config))))


def given_values(resolved: Resolved[Any]) -> dict[str, Any]:
    """Return the values set by a recipe file, `--set` or a flag, by dotted key; not those of the environment."""
    values = values_of(resolved.config)
    origins = resolved.origins.items()
    return {key: values[key] for key, origin in origins if origin in ("flag", "--set") or origin.startswith("recipe")}


def changed_keys(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two configs of one class differ, with (old, new)."""
    left, right = values_of(old), values_of(new)
    pairs = {key: (left.get(key), right.get(key)) for key in {**left, **right}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def plain(value: Any) -> Any:
    """Convert tuples to lists, for YAML and JSON."""
    return list(value) if isinstance(value, tuple) else value


def dump(resolved: Resolved[Any]) -> str:
    """Return the complete config as YAML, with a comment per key: its description and the origin of its value.

    `load(recipe=...)` of this text returns the same config.
    """
    keys = keys_of(type(resolved.config))
    lines: list[str] = []

    def walk(tree: Mapping[str, Any], prefix: str, indent: str) -> None:
        for name, value in tree.items():
            key = prefix + name
            if isinstance(value, Mapping):
                lines.append(f"{indent}{name}:")
                walk(value, f"{key}.", indent + "  ")
                continue
            origin = f" [{resolved.origins[key]}]" if key in resolved.origins else ""
            text = f"{indent}{name}: {scalar(value)}"
            lines.append(f"{text:<36}  # {keys[key].text}{origin}")

    walk(nested(resolved.config), "", "")
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> str:
    """Format a value in YAML flow style on one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
