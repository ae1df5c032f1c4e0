"""The names and shapes of a model's parameters as plain data, and how a published family stores each of them.

A second view of what `model/transformer.py` builds, without torch and without building it: a file is checked against
its configuration before a tensor is read. A test holds the two equal.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmctl.model.parameters import Shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """One tensor as a family stores it: its name, the parameters it holds, and in which layout.

    plain: as it is, or stacked along the rows when it holds several; transposed: (in, out) instead of (out, in), the
    Conv1D of GPT-2; row: a vector stored as a matrix of one row.
    """

    name: str
    holds: tuple[str, ...]
    layout: Literal["plain", "transposed", "row"] = "plain"


def plain(name: str, parameter: str) -> Stored:
    """Return a tensor that is stored as it is, under another name."""
    return Stored(name, (parameter,))


def with_bias(names: Mapping[str, str]) -> Iterator[Stored]:
    """Rename modules that have a weight and a bias."""
    for published, internal in names.items():
        yield plain(published + ".weight", internal + ".weight")
        yield plain(published + ".bias", internal + ".bias")


def stored_shape(stored: Stored, shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape in which a family stores a tensor."""
    parts = [shapes[name] for name in stored.holds]
    whole = (sum(part[0] for part in parts), *parts[0][1:])
    if stored.layout == "row":
        return (1, *whole)
    return whole[::-1] if stored.layout == "transposed" else whole


def to_parameters(
    layout: list[Stored], shapes: Mapping[str, Shape], take: Callable[[str], "Tensor"]
) -> dict[str, "Tensor"]:
    """Turn published tensors, fetched one by one with `take`, into the model's parameters."""
    import torch

    state: dict[str, Tensor] = {}
    for stored in layout:
        tensor = take(stored.name)
        if stored.layout == "row":
            tensor = tensor[0]
        elif stored.layout == "transposed":
            tensor = tensor.t() if tensor.dim() == 2 else tensor
        parts = torch.split(tensor, [shapes[name][0] for name in stored.holds]) if len(stored.holds) > 1 else (tensor,)
        state |= {name: part.contiguous() for name, part in zip(stored.holds, parts, strict=True)}
    return state


def to_stored(layout: list[Stored], state: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Turn the model's parameters into the tensors that a family publishes."""
    import torch

    published: dict[str, Tensor] = {}
    for stored in layout:
        parts = [state[name].detach() for name in stored.holds]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if stored.layout == "row":
            tensor = tensor[None]
        elif stored.layout == "transposed":
            tensor = tensor.t()
        published[stored.name] = tensor
    return published
