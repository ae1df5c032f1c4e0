"""The tensors of a published family: their names, the parameters that they hold, and in which form.

A family lists its tensors once, with `{}` in place of the layer's number; the same list reads and writes. Nothing here
needs torch before a tensor is read, so that a file is checked against its configuration first.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from llmctl.config import ModelConfig
from llmctl.model.parameters import Shape, parameter_shapes

if TYPE_CHECKING:
    from torch import Tensor

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Heads:
    """The sizes by which the rows of projections are divided; `rotated`: channels of a head."""

    n_heads: int = 1
    n_kv_heads: int = 1
    head_dim: int = 1
    rotated: int = 0
    n_experts: int = 0


def unchanged(tensor: "Tensor", _: Heads) -> "Tensor":
    """Return the tensor."""
    return tensor


def transposed(tensor: "Tensor", _: Heads) -> "Tensor":
    """Return the transposed matrix."""
    return tensor.t()


def plus_one(tensor: "Tensor", _: Heads) -> "Tensor":
    """Return 1 + w in float32: half precision would round the sum, which the published models compute in float32."""
    return tensor.float() + 1.0


def minus_one(tensor: "Tensor", _: Heads) -> "Tensor":
    """Return w - 1."""
    return tensor - 1.0


def from_pairs(tensor: "Tensor", heads: Heads) -> "Tensor":
    """Return the rows of heads whose rotated channels are stored pair by pair, in halves (first members, second members)."""
    return tensor[pair_order(len(tensor), heads)]


def to_pairs(tensor: "Tensor", heads: Heads) -> "Tensor":
    """Undo `from_pairs`."""
    return tensor[pair_order(len(tensor), heads).argsort()]


def pair_order(n_rows: int, heads: Heads) -> "Tensor":
    """Return where each row of ours is stored."""
    import torch

    pairs = torch.arange(heads.rotated).view(-1, 2).t().flatten()
    own = torch.cat([pairs, torch.arange(heads.rotated, heads.head_dim)])
    return (torch.arange(0, n_rows, heads.head_dim)[:, None] + own).flatten()


def from_groups(tensor: "Tensor", heads: Heads) -> "Tensor":
    """Return stacked queries, keys and values, stored group by group: the queries of a group, its key, its value."""
    return tensor[group_order(heads)]


def to_groups(tensor: "Tensor", heads: Heads) -> "Tensor":
    """Undo `from_groups`."""
    return tensor[group_order(heads).argsort()]


def group_order(heads: Heads) -> "Tensor":
    """Return where each row of stacked queries, keys and values is stored."""
    import torch

    per_group = heads.n_heads // heads.n_kv_heads + 2
    n_rows = heads.n_kv_heads * per_group * heads.head_dim
    rows = torch.arange(n_rows).view(heads.n_kv_heads, per_group, heads.head_dim)
    return torch.cat([rows[:, :-2].flatten(), rows[:, -2].flatten(), rows[:, -1].flatten()])


def from_experts(tensor: "Tensor", _: Heads) -> "Tensor":
    """Return matrices stored as one tensor (E, O, I) below each other."""
    return tensor.flatten(0, 1)


def to_experts(tensor: "Tensor", heads: Heads) -> "Tensor":
    """Undo `from_experts`."""
    return tensor.unflatten(0, (heads.n_experts, -1))


@dataclass(frozen=True)
class Form:
    """How a stored tensor differs from our parameter: its shape, and both directions, of which `write` undoes `read`."""

    read: Callable[["Tensor", Heads], "Tensor"] = unchanged
    write: Callable[["Tensor", Heads], "Tensor"] = unchanged
    shape: Callable[[Shape, Heads], Shape] = lambda shape, _: shape


# A new form is a row here, which the tensors of a family name.
FORMS = {
    "plain": Form(),
    # (in, out) instead of (out, in): the Conv1D of GPT-2.
    "transposed": Form(transposed, transposed, lambda shape, _: shape[::-1]),
    # A vector stored as a matrix of one row: the logits bias of BART.
    "row": Form(lambda tensor, _: tensor[0], lambda tensor, _: tensor[None], lambda shape, _: (1, *shape)),
    # The norms of Gemma multiply by 1 + w.
    "plus_one": Form(plus_one, minus_one),
    # Rotary pairs side by side, as in GPT-J and Cohere.
    "pairs": Form(from_pairs, to_pairs),
    # Queries, keys and values together, head by head (GPT-NeoX, BLOOM) or group by group (Falcon).
    "groups": Form(from_groups, to_groups),
    # All experts of a layer in one tensor (Granite-MoE).
    "experts": Form(
        from_experts,
        to_experts,
        lambda shape, heads: (heads.n_experts, shape[0] // max(1, heads.n_experts), *shape[1:]),
    ),
}


@dataclass(frozen=True)
class Stored:
    """One tensor of a family: its name, the parameters it holds (stacked along the rows if several), and its form.

    `*` in a parameter stands for every expert in turn. when: tells for which configs it is stored, if that does not
    follow from the parameters that the model has.
    """

    name: str
    holds: tuple[str, ...]
    form: str = "plain"
    when: Callable[[ModelConfig], bool] | None = None
    heads: Heads = Heads()  # filled in by `expand`

    def in_layer(self, layer: int) -> "Stored":
        """Return the tensor of one layer."""
        return replace(self, name=self.name.format(layer), holds=tuple(name.format(layer) for name in self.holds))

    def of_experts(self, n_experts: int) -> "Stored":
        """Return the tensor with the parameters of every expert."""
        if not any("*" in name for name in self.holds):
            return self
        return replace(self, holds=tuple(name.replace("*", str(e)) for e in range(n_experts) for name in self.holds))


Tensors = tuple[Stored, ...]


def module(
    name: str,
    *modules: str,
    form: str = "plain",
    bias_form: str = "plain",
    when: Callable[[ModelConfig], bool] | None = None,
) -> Tensors:
    """Return weight and bias of a module of ours, or of several that are stored as one; the form is the weight's."""
    return (
        Stored(name + ".weight", tuple(own + ".weight" for own in modules), form, when),
        Stored(name + ".bias", tuple(own + ".bias" for own in modules), bias_form, when),
    )


def in_form(form: str, *names: str) -> Tensors:
    """Return weights and biases in a form, of modules that are stored under their own names."""
    return tuple(stored for name in names for stored in module(name, name, form=form, bias_form=form))


def modules(names: Mapping[str, str], published: str = "", own: str = "") -> Tensors:
    """Return weights and biases of several modules, with a prefix on both sides."""
    return tuple(stored for key, value in names.items() for stored in module(published + key, own + value))


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors with a prefix before their published names."""
    return tuple(replace(stored, name=prefix + stored.name) for stored in tensors)


def expand(tensors: Tensors, config: ModelConfig, *, own_names: bool) -> list[Stored]:
    """Return the tensors that a model of this config has, layer by layer.

    A tensor is stored if the model has its parameters; a tied head is not. own_names: parameters that no row names are
    stored under their own names.
    """
    shapes = parameter_shapes(config)
    # A tied head is the embedding itself, which is stored once.
    if config.tie_embeddings:
        shapes.pop(HEAD, None)
    rotated = config.rotary_dim or config.head_dim
    heads = Heads(config.n_heads, config.n_kv_heads, config.head_dim, rotated, config.n_experts)
    rows = (row.of_experts(config.n_experts) for row in numbered(tensors, config))
    stored = [
        row if row.form == "plain" else replace(row, heads=heads)
        for row in rows
        if row.holds and all(name in shapes for name in row.holds)
    ]
    if not own_names:
        return stored
    held = {name for row in stored for name in row.holds}
    return [Stored(name, (name,)) for name in shapes if name not in held] + stored


def numbered(tensors: Tensors, config: ModelConfig) -> Iterator[Stored]:
    """Yield the tensors with layer numbers: neighboring rows of one stack are repeated together for every layer."""
    wanted = (row for row in tensors if row.when is None or row.when(config))
    for prefix, rows in groupby(wanted, key=stack_of):
        if prefix is None:
            yield from rows
            continue
        in_layer = list(rows)  # groupby's group can be read only once
        for layer in range(config.n_decoder_layers if "decoder" in prefix else config.n_layers):
            yield from (row.in_layer(layer) for row in in_layer)


def stack_of(stored: Stored) -> str | None:
    """Return the prefix of the stack whose layers have this tensor; None for tensors outside of layers."""
    prefix, numbers, _ = stored.holds[0].partition("{}")
    return prefix if numbers else None


def stored_shape(stored: Stored, shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape in which a family stores a tensor."""
    parts = [shapes[name] for name in stored.holds]
    return FORMS[stored.form].shape((sum(part[0] for part in parts), *parts[0][1:]), stored.heads)


def to_parameters(
    layout: Iterable[Stored], shapes: Mapping[str, Shape], take: Callable[[str], "Tensor"]
) -> dict[str, "Tensor"]:
    """Turn published tensors, fetched one by one with `take`, into the model's parameters."""
    import torch

    state: dict[str, Tensor] = {}
    for stored in layout:
        tensor = FORMS[stored.form].read(take(stored.name), stored.heads)
        parts = torch.split(tensor, [shapes[name][0] for name in stored.holds]) if len(stored.holds) > 1 else (tensor,)
        state |= {name: part.contiguous() for name, part in zip(stored.holds, parts, strict=True)}
    return state


def to_stored(layout: Iterable[Stored], state: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Turn the model's parameters into the tensors that a family publishes."""
    import torch

    published: dict[str, Tensor] = {}
    for stored in layout:
        parts = [state[name].detach() for name in stored.holds]
        published[stored.name] = FORMS[stored.form].write(
            parts[0] if len(parts) == 1 else torch.cat(parts), stored.heads
        )
    return published
