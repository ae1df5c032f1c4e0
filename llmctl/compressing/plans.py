"""Plans of a compression: a vocabulary, a shape, the scheme of the tables, and the bits that a file size leaves for the blocks.

The cost of a plan is predicted as the sum of what its parts cost alone; it is in nats per token of the original tokenizer.
Knows no models and no files.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

from llmctl.config import ModelConfig
from llmctl.distilling.student_shape import resized
from llmctl.errors import UsageError

GPTQ_FRACTION = 0.4
"""The cost of calibrated codes as a fraction of that of clipped rounding, before a trial has measured it."""

Changes = Mapping[str, int]
"""Sizes of a model that differ from the original's, by their names in the config."""


@dataclass(frozen=True)
class Point:
    """A setting of one lever, and what it costs alone."""

    changes: dict[str, int]
    cost: float


@dataclass
class Sensitivity:
    """What was measured of a model.

    labels: original tokens that the costs are per. loss: of the model, or 0 where it is compared by its outputs. vocabulary:
    size -> cost. structure: lever -> points. tables: scheme -> cost of embedding and head. bits: (bits per weight, cost of
    clipped rounding) of the blocks in ascending order. layers: module -> scheme -> cost, by the names of `scheme_name`.
    """

    labels: float
    loss: float
    vocabulary: dict[int, float] = field(default_factory=dict)
    structure: dict[str, list[Point]] = field(default_factory=dict)
    tables: dict[str, float] = field(default_factory=dict)
    bits: list[tuple[float, float]] = field(default_factory=list)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Sensitivity":
        """Return the measurements that `to_dict` has written."""
        return cls(
            record["labels"],
            record["loss"],
            {int(size): cost for size, cost in record["vocabulary"].items()},
            {name: [Point(**each) for each in points] for name, points in record["structure"].items()},
            dict(record["tables"]),
            [(bits, cost) for bits, cost in record["bits"]],
            {name: dict(each) for name, each in record["layers"].items()},
        )

    def bits_cost(self, bits: float) -> float:
        """Return the cost of the blocks at a mean of bits per weight, interpolated."""
        if not self.bits:
            return 0.0
        at = bisect_left(self.bits, (bits, -1.0))
        if at == 0:
            return self.bits[0][1]
        if at == len(self.bits):
            return self.bits[-1][1]
        (low, before), (high, after) = self.bits[at - 1], self.bits[at]
        return before + (after - before) * (bits - low) / (high - low)


@dataclass(frozen=True)
class Plan:
    """One way to a file of a size.

    vocabulary: its size. changes: of the shape. table: scheme of embedding and head. bits: mean bits per weight of the blocks.
    predicted: cost of all parts. fixed: the part of it that does not depend on the bits of the blocks.
    """

    vocabulary: int
    changes: dict[str, int]
    table: str
    bits: float
    n_bytes: int
    predicted: float
    fixed: float

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return asdict(self)

    @property
    def structure(self) -> tuple[int, tuple[tuple[str, int], ...]]:
        """What is tried: plans with the same vocabulary and shape differ in bits only."""
        return self.vocabulary, tuple(sorted(self.changes.items()))


@dataclass(frozen=True)
class Room:
    """What a size leaves for the blocks of a shape.

    bits, fewest, most: mean bits per weight that fit, and that are possible. n_weights: in the blocks. rest_bytes: of all
    else in the file.
    """

    bits: float
    fewest: float
    most: float
    n_weights: int
    rest_bytes: int

    @property
    def smallest(self) -> int:
        """The bytes of the smallest file."""
        return self.rest_bytes + int(self.fewest * self.n_weights / 8) + 1


RoomOf = Callable[[ModelConfig, str], Room]
"""Config and scheme of the tables -> the room of a shape."""


def shape_of(original: ModelConfig, vocabulary: int, changes: Changes) -> ModelConfig:
    """Return a model's shape with another vocabulary and other sizes."""
    return replace(resized(original, dict(changes)) if changes else original, vocab_size=vocabulary)


def combined(structure: Mapping[str, Sequence[Point]]) -> Iterator[Point]:
    """Yield all combinations of the levers, each with the sum of the costs; two levers that set the same size exclude each other."""
    none = Point({}, 0.0)
    for points in product(*([none, *each] for each in structure.values())):
        names = [name for point in points for name in point.changes]
        if len(names) == len(set(names)):
            changes = {name: value for point in points for name, value in point.changes.items()}
            yield Point(changes, sum(point.cost for point in points))


def find_plans(
    original: ModelConfig,
    measured: Sensitivity,
    room_of: RoomOf,
    size: int,
    *,
    gptq_fraction: float = GPTQ_FRACTION,
    more_bytes: int = 0,
) -> list[Plan]:
    """Return the plans that fit a size, the cheapest first: of each vocabulary and shape the best scheme of the tables.

    more_bytes: what is added to the size that `room_of` knows.
    Raises: UsageError with the smallest size that is possible.
    """
    best: dict[Any, Plan] = {}
    smallest = 0
    whole = None
    for vocabulary, vocabulary_cost in measured.vocabulary.items():
        for point in combined(measured.structure):
            shape = shape_of(original, vocabulary, point.changes)
            for table, table_cost in measured.tables.items():
                room = room_of(shape, table)
                whole = whole or room.n_weights
                smallest = min(smallest or room.smallest, room.smallest)
                bits = min(room.bits + 8 * more_bytes / room.n_weights, room.most)
                if bits < room.fewest:
                    continue
                fixed = vocabulary_cost + point.cost + table_cost
                cost = fixed + gptq_fraction * measured.bits_cost(bits) * room.n_weights / whole
                n_bytes = room.rest_bytes + int(bits * room.n_weights / 8)
                plan = Plan(vocabulary, point.changes, table, bits, n_bytes, cost, fixed)
                held = best.get(plan.structure)
                if held is None or (plan.predicted, plan.n_bytes) < (held.predicted, held.n_bytes):
                    best[plan.structure] = plan
    if not best:
        raise UsageError(
            f"the model cannot be compressed to {(size + more_bytes) / 1e6:,.3f} MB",
            f"the smallest possible is {-(-smallest // 1000) / 1e3:,.3f} MB",
        )
    return sorted(best.values(), key=lambda plan: (plan.predicted, plan.n_bytes))


def described(plan: Mapping[str, Any], original: ModelConfig) -> str:
    """Return a plan in a few words."""
    parts = []
    if plan["vocabulary"] != original.vocab_size:
        parts.append(f"vocabulary {plan['vocabulary']:,}")
    parts += [f"{LABELS[name]} {value}" for name, value in plan["changes"].items() if name in LABELS]
    # The mean bits of an ONNX file are of 8-bit codes and some tensors in float32.
    whole = "8 bits" if plan["bits"] < 12 else "16 bits"
    parts.append(whole if plan["table"] == "float" else f"{plan['bits']:.2f} bits, tables {plan['table']}")
    return ", ".join(parts)


LABELS = {
    "n_layers": "layers",
    "n_decoder_layers": "decoder layers",
    "d_ff": "ffn",
    "d_model": "dim",
    "n_heads": "heads",
}


def fractions(value: int, wanted: Iterable[float], step: int = 1) -> list[int]:
    """Return distinct sizes at fractions of a value, in multiples of a step, smaller than it, the largest first."""
    found = {max(step, round(frac * value / step) * step) for frac in wanted}
    return sorted((size for size in found if size < value), reverse=True)
