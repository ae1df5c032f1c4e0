"""The rows of a family's configuration table, each with both directions: config.json to `ModelConfig` and back.

A family lists its rows once; `FamilyFormat` reads and writes with them. To support another kind of setting (a list per
layer, two keys that determine one field), add a function here that returns a `Row` with both directions.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.published import Published, activation_name
from llmctl.model.shapes import window_of

WINDOWED, FULL = "sliding_attention", "full_attention"

Default = Any
"""A value, a function of the fields read so far, or None for a key that must be there."""


@dataclass(frozen=True)
class Row:
    """One row of a family's table.

    key: the key in config.json, by which `replaced` finds the row; empty if it has none. read: config.json and the
    fields read so far -> fields of ModelConfig. write: config -> keys and values of config.json. allows: a condition
    for writing that does not follow from reading the written values back.
    """

    key: str = ""
    read: Callable[[Published, ModelConfig], Mapping[str, Any]] = lambda *_: {}
    write: Callable[[ModelConfig], Mapping[str, Any]] = lambda *_: {}
    allows: Callable[[ModelConfig], bool] = lambda _: True


def converted(
    key: str,
    field: str,
    read: Callable[[Published, ModelConfig], Any],
    write: Callable[[Any], Any] = lambda value: value,
) -> Row:
    """Return the row of a key that stands for one field, with a converter for each direction."""
    return Row(
        key,
        lambda published, config: {field: read(published, config)},
        lambda config: {key: write(getattr(config, field))},
    )


def value_of(default: Default, config: ModelConfig) -> Any:
    """Return a default, computed from the fields read so far if it is a function."""
    # None passes through: `Published` refuses a missing key without a default.
    return default(config) if callable(default) else default


def integer(key: str, field: str, default: Default = None) -> Row:
    """Return the row of a positive integer."""
    return converted(key, field, lambda published, config: published.integer(key, value_of(default, config)))


def number(key: str, field: str, default: Default = None) -> Row:
    """Return the row of a finite number."""
    return converted(key, field, lambda published, config: published.number(key, value_of(default, config)))


def flag(key: str, field: str, *, default: bool = False) -> Row:
    """Return the row of a boolean."""
    return converted(key, field, lambda published, _: published.flag(key, default=default))


def activation(key: str, default: str) -> Row:
    """Return the row of the activation, under Hugging Face's name of it."""
    return converted(key, "activation", lambda published, _: published.activation(key, default), activation_name)


def token(key: str, field: str, *, absent: int | None = None) -> Row:
    """Return the row of a special token; `absent` is written if the model has none."""
    return converted(
        key, field, lambda published, _: published.token(key), lambda index: index if index >= 0 else absent
    )


def window() -> Row:
    """Return the row of one attention window for all layers, or none; one that spans the context is none."""

    def read(published: Published, config: ModelConfig) -> dict[str, Any]:
        if published.values.get("sliding_window") is None:
            return {}
        size = published.integer("sliding_window")
        return {} if size >= config.max_positions else {"attention_windows": (size,)}

    def write(config: ModelConfig) -> dict[str, Any]:
        sizes = set(config.attention_windows)
        return {"sliding_window": sizes.pop() or None if len(sizes) == 1 else None}

    return Row("sliding_window", read, write)


def windows(pattern: Callable[[Published, ModelConfig], list[str]] | None = None) -> Row:
    """Return the row of one attention window in the layers that `layer_types` names.

    pattern: the kinds of the layers of a file that does not name them.
    """

    def read(published: Published, config: ModelConfig) -> dict[str, Any]:
        kinds = published.values.get("layer_types")
        if kinds is None and pattern is not None:
            kinds = pattern(published, config)
        if not isinstance(kinds, list) or not set(map(str, kinds)) <= {WINDOWED, FULL}:
            raise published.refuse("layer_types", kinds, f"a list of {WINDOWED} and {FULL}")
        if len(kinds) != config.n_layers:
            raise published.refuse("layer_types", f"of {len(kinds)} layers", f"one kind for each of {config.n_layers}")
        size = published.integer("sliding_window") if WINDOWED in kinds else 0
        return {"attention_windows": tuple(size if kind == WINDOWED else 0 for kind in kinds) if size else ()}

    def write(config: ModelConfig) -> dict[str, Any]:
        sizes = [window_of(config, layer) for layer in range(config.n_layers)]
        kinds = [WINDOWED if size else FULL for size in sizes]
        return {"sliding_window": max(sizes) or None, "layer_types": kinds}

    return Row("sliding_window", read, write)


def repeated(key: str, field: str) -> Row:
    """Return the row of a key that repeats a field of another row; it is written and not read."""
    return Row(key, write=lambda config: {key: getattr(config, field)})


def equal(key: str, field: str, first: str) -> Row:
    """Return the row of a key that must have the value of the key `first`, which stands for the field."""

    def read(published: Published, config: ModelConfig) -> dict[str, Any]:
        # The row of `first` stands before this one, so the field has been read.
        value, other = getattr(config, field), published.integer(key)
        if other != value:
            raise published.refuse(key, other, f"the same as `{first}`, {value}")
        return {}

    return Row(key, read, lambda config: {key: getattr(config, field)})


def written(key: str, value: Any) -> Row:
    """Return the row of a constant for other readers, which does not change our math and is not read."""
    return Row(key, write=lambda _: {key: value})


def only(key: str, *allowed: Any) -> Row:
    """Return the row of a key that is read as absent, null or one of these values, and not written."""

    def read(published: Published, _: ModelConfig) -> dict[str, Any]:
        published.only(key, *allowed)
        return {}

    return Row(key, read)


def constant(key: str, value: Any) -> Row:
    """Return the row of a key that is written with this value and read with no other."""
    return Row(key, only(key, value).read, written(key, value).write)


def fixed(**values: Any) -> Row:
    """Return the row of fields that all models of the family share and that no key states."""
    return Row(read=lambda *_: values)


def derived(field: str, formula: Callable[[ModelConfig], Any]) -> Row:
    """Return the row of a field that follows from fields of earlier rows."""
    return Row(read=lambda _, config: {field: formula(config)})


def requires(condition: Callable[[ModelConfig], bool]) -> Row:
    """Return a row that allows writing only configs that other readers of the family accept."""
    return Row(allows=condition)


def replaced(rows: Iterable[Row], *others: Row, **by_key: Row | None) -> tuple[Row, ...]:
    """Return the rows, with each of the others in place of the row of the same key, or of the key that is named.

    None removes the row.
    """
    # In place, because the order of the keys in a written file is that of the rows.
    new = {row.key: row for row in others} | by_key
    return tuple(kept for row in rows if (kept := new.get(row.key, row)) is not None)


# Every id is written, if only as null: where a key is absent, transformers uses a default of its own.
TOKENS = (
    token("bos_token_id", "bos_id"),
    token("eos_token_id", "eos_id"),
    token("pad_token_id", "pad_id"),
    token("mask_token_id", "mask_id"),
    token("decoder_start_token_id", "decoder_start_id"),
)

SCALED_SCORES = Row("attention_scale", derived("attention_scale", lambda config: config.head_dim**-0.5).read)

SQUARE = requires(lambda config: config.n_heads * config.head_dim == config.d_model)
"""For readers that take the width of a head from the others: its heads must be d_model / n_heads wide."""

# Heads are d_model / n_heads wide, and each has keys and values of its own.
STANDARD_HEADS = (
    derived("n_kv_heads", lambda config: config.n_heads),
    derived("head_dim", lambda config: max(config.d_model // config.n_heads, 1)),
    SCALED_SCORES,
    SQUARE,
)


def token_ids(config: ModelConfig) -> dict[str, int | None]:
    """Return the special token ids under Hugging Face's names."""
    return {key: value for row in TOKENS for key, value in row.write(config).items()}
