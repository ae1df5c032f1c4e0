"""Our own format, for every model that no published family expresses: config.json has the fields of ModelConfig."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.families.family import FamilyFormat
from llmctl.families.published import Published
from llmctl.families.rows import Row

NAME = "LlmctlForLanguageModel"


def read_fields(published: Published, config: ModelConfig) -> Mapping[str, Any]:
    """Read the fields of ModelConfig, each checked for its type and choices."""
    # Other keys of a config.json (architectures, torch_dtype) are not ours to check.
    known = {field.name for field in fields(config)}
    return {name: checked(name, value) for name, value in published.values.items() if name in known}


@cache
def kinds() -> Mapping[str, Any]:
    """Return the types of the fields of ModelConfig; resolving them takes as long as checking all fields."""
    return get_type_hints(ModelConfig)


def checked(name: str, value: Any) -> Any:
    """Return a field's value if it is of the field's type.

    Raises: ArtifactError naming the field.
    """
    kind = kinds()[name]
    choices = get_args(kind)
    if get_origin(kind) is tuple:
        allowed_types = (int, float) if choices[0] is float else (choices[0],)
        fits = isinstance(value, list) and all(type(item) in allowed_types for item in value)
    elif kind is float:
        fits = type(value) in (int, float)
    elif kind is str:
        fits = isinstance(value, str) and len(value) <= 100
    elif kind in (int, bool):
        # The bound keeps a damaged file from asking for more memory than any machine has.
        fits = type(value) is kind and (kind is bool or abs(value) < 2**31)
    else:
        fits = value in choices
    if not fits:
        is_listed = get_origin(kind) is Literal
        allowed = f"one of {', '.join(map(str, choices))}" if is_listed else "a value of its type"
        raise ArtifactError(f"the configuration of {NAME} has `{name}` {str(value)[:60]!r}", f"what is read: {allowed}")
    return tuple(value) if isinstance(value, list) else value


def write_fields(config: ModelConfig) -> dict[str, Any]:
    """Write the fields of ModelConfig."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


NATIVE = FamilyFormat(
    architecture=NAME,
    model_type="llmctl",
    source="llmctl",
    rows=(Row("", read_fields, write_fields),),  # every field has a key of its own name
    own_names=True,
)
