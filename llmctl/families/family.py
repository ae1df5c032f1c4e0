"""One published model family as data: the rows of its configuration, its tensors, and what follows from them.

Reading, writing, and whether the family expresses a config are all derived from one table, so that they cannot
disagree. The list of families is in `table.py`; each family is one file.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.families.defaults import with_defaults
from llmctl.families.parameters import HEAD, Stored, Tensors, expand, to_parameters, to_stored
from llmctl.families.published import Published
from llmctl.families.rows import Row
from llmctl.model.parameters import parameter_shapes
from llmctl.model.supports import close, unsupported

if TYPE_CHECKING:
    from torch import Tensor

MOST_LAYERS, MOST_EXPERTS = 10_000, 100_000
"""Limits for layers, and for the experts of all layers together: lists and names are made for each before the tensors
of a file are compared with them."""

FACTORS = ("attention_scale", "embedding_scale", "logits_scale", "alibi_scale", "residual_scale")
"""Fields that are computed, most of them as square roots, and equal up to rounding."""


@dataclass(frozen=True)
class Presence:
    """A boolean field that only the tensors of a file tell: its value where the tensor is there."""

    tensor: str
    field: str
    value: bool


@dataclass(frozen=True)
class FamilyFormat:
    """How one Hugging Face architecture is read and written.

    rows: the configuration, in the order in which it is written, constants first; a row may use fields of the rows before it. tensors:
    published names and parameters; own_names: parameters that `tensors` does not name are stored under their own
    names. presence: fields that only the tensors of a file tell. not_compared: fields that need not survive writing
    and reading, because they have no effect in this family or only repeat a default. is_written: False for a family
    as which only models that were read as it are written. ignored: parts of names of tensors that hold nothing of the
    model (buffers, copies, heads of other tasks). prefix: what files saved from the bare model lack. spellings: (old,
    today's) parts of names. key_spellings: the same for keys of config.json. aliases: architectures that are read as this
    one. substitutes: (name, the tensor that is read if a file has none of that name). constants: tensors that follow from
    the config, which other readers miss in a file; they are written and ignored.
    """

    architecture: str
    model_type: str
    source: str
    rows: tuple[Row, ...]
    tensors: Tensors = ()
    own_names: bool = False
    presence: tuple[Presence, ...] = ()
    not_compared: frozenset[str] = frozenset()
    is_written: bool = True
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    spellings: tuple[tuple[str, str], ...] = ()
    key_spellings: tuple[tuple[str, str], ...] = ()
    aliases: tuple[str, ...] = ()
    substitutes: tuple[tuple[str, str], ...] = ()
    constants: Callable[[ModelConfig], "dict[str, Tensor]"] = lambda _: {}

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        """Read a config.json; a field that no row names has its default.

        Raises: ArtifactError naming the key whose value our models cannot express.
        """
        renamed = {new: values[old] for old, new in self.key_spellings if old in values}
        known = with_defaults(str(values.get("model_type") or self.model_type), renamed | dict(values))
        published, config = Published(known, self.architecture), ModelConfig()
        for row in self.rows:
            # In order: a default such as 4 d_model needs the fields that stand before it.
            fields = row.read(published, config)
            for field, most in most_of(config).items():
                if fields.get(field, 0) > most:
                    raise published.refuse(row.key or field, fields[field], f"at most {most}")
            config = replace(config, **fields)
        return config

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """Write a config that the family expresses."""
        return {key: value for row in self.rows for key, value in row.write(config).items()}

    def resolve(self, config: ModelConfig, names: Mapping[str, str]) -> ModelConfig:
        """Return the config with the fields that only the names of the tensors in a file tell; see `canonical`."""
        values: dict[str, Any] = {row.field: (row.tensor in names) == row.value for row in self.presence}
        # A file of the bare model has no head, whatever its configuration says.
        has_prefix = any(stored.startswith(self.prefix) for stored in names.values())
        if not has_prefix and HEAD not in names:
            values["tie_embeddings"] = True
        return replace(config, **values)

    def expresses(self, config: ModelConfig) -> bool:
        """Tell whether a complete config survives writing and reading, and every parameter is stored.

        That is: reading each row back gives the config's value, so the constants of the table hold, and every field
        that the table does not name has its default. A switch added to ModelConfig is refused until a row names it.
        """
        if not all(row.allows(config) for row in self.rows):
            return False
        # Not a list of conditions: what is written is read, so that both directions and this answer cannot disagree.
        published, back = Published(self.write_config(config), self.architecture), ModelConfig()
        named = {*self.not_compared, *(row.field for row in self.presence)}
        for row in self.rows:
            try:
                values = {**row.read(published, back)}
            except ArtifactError:  # a value that has no name there
                return False
            # Most families differ in a constant, which stands first: this ends early.
            if not all(is_same(name, value, config) for name, value in values.items() if name not in named):
                return False
            back = replace(back, **values)
            named |= values.keys()
        return not unsupported(config, named) and self.stores_everything(config)

    def stores_everything(self, config: ModelConfig) -> bool:
        """Tell whether the table of tensors has a place for every parameter."""
        # A switch may add parameters that the rows express and the tensors do not.
        held = {name for stored in self.layout(config) for name in stored.holds}
        return parameter_shapes(config).keys() - held <= ({HEAD} if config.tie_embeddings else set())

    def layout(self, config: ModelConfig) -> list[Stored]:
        """Return the stored tensors of a complete config."""
        return expand(self.tensors, config, own_names=self.own_names)

    def canonical(self, names: Collection[str]) -> dict[str, str]:
        """Return today's full name -> name in the file, for files with older names or without the prefix."""
        # One name with the prefix shows that the file was saved with it; a head of its own never has it.
        prefix = "" if any(name.startswith(self.prefix) for name in names) else self.prefix
        full = {}
        for name in names:
            spelled = name
            for old, new in self.spellings:
                spelled = spelled.replace(old, new)
            full[spelled if spelled.startswith("lm_head") else prefix + spelled] = name
        for name, other in self.substitutes:
            if name not in full and other in full:
                full[name] = full[other]
        return full

    def is_ignored(self, name: str, config: ModelConfig) -> bool:
        """Tell whether a tensor of this name holds nothing of the model; a tied head is a copy."""
        heads = {HEAD, *(stored.name for stored in self.tensors if stored.holds == (HEAD,))}
        is_copy = config.tie_embeddings and name in heads
        return is_copy or any(part in name for part in self.ignored)

    def to_internal(self, state: Mapping[str, "Tensor"], config: ModelConfig) -> dict[str, "Tensor"]:
        """Turn published tensors into the state of `LanguageModel(config)`, including a tied head."""
        internal = to_parameters(self.layout(config), parameter_shapes(config), state.__getitem__)
        if config.tie_embeddings and not config.n_labels:
            internal[HEAD] = internal["model.embed_tokens.weight"]
        return internal

    def to_published(self, state: Mapping[str, "Tensor"], config: ModelConfig) -> dict[str, "Tensor"]:
        """Turn the state of `LanguageModel(config)` into the tensors to store; a tied head is stored once."""
        return to_stored(self.layout(config), state) | self.constants(config)


def most_of(config: ModelConfig) -> dict[str, int]:
    """Return the limits of what is repeated, given the fields read so far."""
    n_experts = MOST_EXPERTS // max(1, config.n_layers)
    return {"n_layers": MOST_LAYERS, "n_decoder_layers": MOST_LAYERS, "n_experts": n_experts}


def is_same(name: str, value: Any, config: ModelConfig) -> bool:
    """Tell whether a value of a field is the config's."""
    other = getattr(config, name)
    if name in ("attention_windows", "rope_thetas"):  # cycled over the layers
        idle = (0,) if name == "attention_windows" else (config.rope_theta,)
        return all(a == b for a, b, _ in zip(cycle(value or idle), cycle(other or idle), range(config.n_layers)))
    return close(value, other) if name in FACTORS else value == other
