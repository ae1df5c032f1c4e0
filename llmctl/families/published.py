"""Typed access to a `config.json` that nobody vouches for: every value is checked, none is guessed."""

from collections.abc import Mapping
from typing import Any

from llmctl.errors import UnsupportedModelError

# Hugging Face activation name -> ours; the first name of each is the one written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


def activation_name(activation: str) -> str | None:
    """Return Hugging Face's name of one of our activations; None if it has none."""
    return next((name for name, ours in ACTIVATIONS.items() if ours == activation), None)


LARGEST = 1e18
"""Its square is a float32; JSON can hold integers that are no float at all, and NaN is not below any number."""


class Published:
    """The values of a config.json, and the architecture that error messages name.

    Raises: ArtifactError from every method, naming the key and showing the value.
    """

    def __init__(self, values: Mapping[str, Any], architecture: str) -> None:
        self.values: Mapping[str, Any] = values
        self.architecture = architecture

    def refuse(self, key: str, value: Any, read: str) -> UnsupportedModelError:
        """Return the error for a value that is not supported."""
        return UnsupportedModelError(
            f"the configuration of {self.architecture} has `{key}` {str(value)[:60]!r}, which llmctl does not read",
            f"what is read: {read}",
        )

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number; null is the default."""
        value = self.values.get(key)
        value = default if value is None else value
        # bool is a subclass of int, but `true` is not a number in JSON.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
            raise self.refuse(key, value, "a number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer from 1 to below 2**31; null is the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self.refuse(key, value, "a whole number from 1")
        return value

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return a boolean; null is the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def token(self, key: str) -> int:
        """Return a token id, the first if several are listed, or -1 for null."""
        value = self.values.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            return -1
        if type(value) is not int or not -1 <= value < 2**31:
            raise self.refuse(key, value, "a token id or null")
        return value

    def activation(self, key: str, default: str) -> str:
        """Return our name of an activation."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.refuse(key, value, ", ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse any other value of a key that changes the math; absent and null pass."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.refuse(key, value, ", ".join(str(item) for item in allowed) or "null")

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of integers."""
        value = self.values.get(key)
        if not isinstance(value, list) or any(type(item) is not int or abs(item) >= 2**31 for item in value):
            raise self.refuse(key, value, "a list of whole numbers")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) > MOST_NUMBERS:
            raise self.refuse(key, value, "a list of numbers")
        return tuple(float(Published({key: item}, self.architecture).number(key)) for item in value)

    def rope_parameters(self, kind: str = "") -> "Published":
        """Return the settings of rotary positions, for one kind of layer (`full_attention`) if it is named.

        `rope_parameters` (transformers 5) takes precedence over `rope_scaling` and `rope_theta` (4), as in transformers
        itself. Each of the two may be one object for all layers or one per kind.
        """
        settings: dict[str, Any] = {key: self.values[key] for key in ROPE_KEYS if self.values.get(key) is not None}
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.values.get(key) or {}
            if not isinstance(rope, dict):
                raise self.refuse(key, rope, "an object")
            if any(isinstance(value, dict) for value in rope.values()):
                if not kind:
                    raise self.refuse(key, rope, "one set of parameters for all layers")
                rope = rope.get(kind) or {}
                if not isinstance(rope, dict):
                    raise self.refuse(f"{key}.{kind}", rope, "an object")
            settings |= {name: value for name, value in rope.items() if value is not None}
        return Published(settings, self.architecture)


ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
MOST_NUMBERS = 4096
"""Limit for lists of numbers: longrope has one per two channels of a head, twice."""
