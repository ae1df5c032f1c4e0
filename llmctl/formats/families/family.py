"""What one published model family is: its configuration, its tensor names, and which of our models it can express.

The table of them is in `families.py`; each family is one file. `Published` reads a `config.json` that nobody vouches
for: every value is checked, and what our model core cannot express is refused, never guessed.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.formats.families.parameters import Stored, to_parameters, to_stored
from llmctl.model.parameters import parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

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
}


def same_config(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """Leave the config as it is: the family's config.json says everything."""
    del names
    return config


@dataclass(frozen=True)
class FamilyFormat:
    """How one Hugging Face architecture is read and written.

    layout: the stored tensors of a complete config; resolve: adjusts a config to the tensor names really there, where
    config.json does not tell; ignored: parts of tensor names that hold nothing of the model (buffers, copies, heads
    of other tasks); prefix: what files saved from the bare model lack; spellings: (old, today's) parts of names.
    """

    architecture: str
    model_type: str
    source: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    matches: Callable[[ModelConfig], bool]
    layout: Callable[[ModelConfig], list[Stored]]
    resolve: Callable[[ModelConfig, Collection[str]], ModelConfig] = same_config
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    spellings: tuple[tuple[str, str], ...] = ()

    def canonical(self, names: Collection[str]) -> dict[str, str]:
        """Return today's full name -> name in the file, where older or barer files name tensors otherwise."""
        prefix = "" if any(name.startswith(self.prefix) for name in names) else self.prefix
        full = {}
        for name in names:
            spelled = name
            for old, new in self.spellings:
                spelled = spelled.replace(old, new)
            full[spelled if spelled.startswith("lm_head") else prefix + spelled] = name
        return full

    def is_ignored(self, name: str, config: ModelConfig) -> bool:
        """Say whether a tensor of this name holds nothing of the model; a tied head is a copy."""
        copy = config.tie_embeddings and name in ("lm_head.weight", "cls.predictions.decoder.weight")
        return copy or any(part in name for part in self.ignored)

    def to_internal(self, state: Mapping[str, "Tensor"], config: ModelConfig) -> dict[str, "Tensor"]:
        """Turn published tensors into the state of `LanguageModel(config)`, the tied head included."""
        internal = to_parameters(self.layout(config), parameter_shapes(config), state.__getitem__)
        if config.tie_embeddings and not config.n_labels:
            internal["lm_head.weight"] = internal["model.embed_tokens.weight"]
        return internal

    def to_published(self, state: Mapping[str, "Tensor"], config: ModelConfig) -> dict[str, "Tensor"]:
        """Turn the state of `LanguageModel(config)` into the tensors to store; a tied head is stored once."""
        return to_stored(self.layout(config), state)


class Published:
    """A config.json under suspicion: typed access that names what is wrong.

    Raises: ArtifactError from every method.
    """

    def __init__(self, values: Mapping[str, Any], architecture: str) -> None:
        self.values, self.architecture = values, architecture

    def refuse(self, key: str, value: Any, read: str) -> ArtifactError:
        """Return the error for a value that is not read."""
        return ArtifactError(
            f"the configuration of {self.architecture} has `{key}` {str(value)[:60]!r}, which llmctl does not read",
            f"what is read: {read}",
        )

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.refuse(key, value, "a number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number from 1 to 2**31."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self.refuse(key, value, "a whole number from 1")
        return value

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Return a truth value; null is the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def token(self, key: str) -> int:
        """Return a token id, the first where several are listed, or -1."""
        value = self.values.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            return -1
        if type(value) is not int or not -1 <= value < 2**31:
            raise self.refuse(key, value, "a token id or null")
        return value

    def ids(self) -> dict[str, int]:
        """Return every special token id that ModelConfig has."""
        return {
            "pad_id": self.token("pad_token_id"),
            "bos_id": self.token("bos_token_id"),
            "eos_id": self.token("eos_token_id"),
            "mask_id": self.token("mask_token_id"),
            "decoder_start_id": self.token("decoder_start_token_id"),
        }

    def activation(self, key: str, default: str) -> str:
        """Return our name of an activation."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.refuse(key, value, ", ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def only(self, key: str, *allowed: Any) -> None:
        """Refuse a setting that changes the maths; absent and null pass."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.refuse(key, value, ", ".join(str(item) for item in allowed) or "null")

    def equal(self, first: str, second: str) -> int:
        """Return a size that encoder and decoder must share."""
        value, other = self.integer(first), self.integer(second)
        if value != other:
            raise self.refuse(second, other, f"the same as `{first}`, {value}")
        return value

    def rope_theta(self) -> float:
        """Return the base of the rotary frequencies; any scaling of them is refused.

        `rope_parameters` (transformers 5) goes before `rope_theta` (4), as in transformers itself.
        """
        theta = self.number("rope_theta", 10000.0)
        for key in ("rope_scaling", "rope_parameters"):
            rope = self.values.get(key) or {}
            if not isinstance(rope, dict):
                raise self.refuse(key, rope, "an object")
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind not in ("default", None):
                raise self.refuse(f"{key}.rope_type", kind, "default (no scaling)")
            if any(isinstance(value, dict) for value in rope.values()):
                raise self.refuse(key, rope, "one set of parameters for all layers")
            theta = Published(rope, self.architecture).number("rope_theta", theta)
            Published(rope, self.architecture).only("partial_rotary_factor", 1.0)
        self.only("partial_rotary_factor", 1.0)
        if theta <= 0:
            raise self.refuse("rope_theta", theta, "a positive number")
        return float(theta)


def token_ids(config: ModelConfig) -> dict[str, int | None]:
    """Return the special token ids under Hugging Face's names; each one stands there, so that no default sneaks in."""
    ids = {
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "mask_token_id": config.mask_id,
        "decoder_start_token_id": config.decoder_start_id,
    }
    return {key: value if value >= 0 else None for key, value in ids.items()}


def activation_name(config: ModelConfig) -> str:
    """Return Hugging Face's name of the model's activation."""
    return next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)


def close(value: float, other: float) -> bool:
    """Say whether two settings are the same number, however they were computed."""
    return math.isclose(value, other, rel_tol=1e-6)


def has(config: ModelConfig, **values: Any) -> bool:
    """Say whether the config has all these values."""
    return all(getattr(config, name) == value for name, value in values.items())


def is_common(config: ModelConfig) -> bool:
    """Say whether the config has a head over the vocabulary and none of the parts that only the native format knows."""
    return not any(config.attention_windows) and not config.query_layer and not config.n_labels


def is_standard_attention(config: ModelConfig) -> bool:
    """Say whether heads are D / N wide, as many keys as queries, and scores scaled by the root of the width."""
    return (
        config.n_kv_heads == config.n_heads
        and config.n_heads * config.head_dim == config.d_model
        and close(config.attention_scale, config.head_dim**-0.5)
        and not config.qk_norm
    )
