"""The rows of rotary positions: their base, their scaling, and how much of a head they rotate."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from llmctl.config import ModelConfig
from llmctl.families.published import Published
from llmctl.families.rows import FULL, WINDOWED, Row

Numbers = tuple[float, ...]


def read_llama3(rope: Published, config: ModelConfig) -> Numbers:
    """Read the scaling of Llama 3.1."""
    length = rope.number("original_max_position_embeddings", config.max_positions)
    return (rope.number("factor"), rope.number("low_freq_factor"), rope.number("high_freq_factor"), length)


def read_yarn(rope: Published, config: ModelConfig) -> Numbers:
    """Read YaRN, whose factor on cosines and sines follows from the others if it is not given."""
    length = rope.number("original_max_position_embeddings", config.max_positions)
    factor = rope.number("factor", config.max_positions / length if length > 0 else None)
    if factor <= 0 or length <= 0:
        raise rope.refuse("factor", factor, "a positive number")

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = rope.values.get("mscale") and rope.values.get("mscale_all_dim")
    attention = grown(rope.number("mscale")) / grown(rope.number("mscale_all_dim")) if both else grown(1.0)
    return (
        factor,
        rope.number("beta_fast", 32.0),
        rope.number("beta_slow", 1.0),
        length,
        rope.number("attention_factor", attention),
        float(rope.flag("truncate", default=True)),
    )


def read_longrope(rope: Published, config: ModelConfig) -> Numbers:
    """Read LongRoPE: one divisor per frequency, for short rows and for long ones."""
    length = rope.number("original_max_position_embeddings", config.max_positions)
    factor = config.max_positions / length if length > 1 else 1.0
    grown = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
    short, long = rope.numbers("short_factor"), rope.numbers("long_factor")
    if len(short) != len(long) or 0.0 in (*short, *long):
        raise rope.refuse("long_factor", list(long), "as many numbers as `short_factor`, none of them 0")
    return (length, rope.number("attention_factor", grown), *short, *long)


def write_longrope(length: float, attention: float, *divisors: float) -> dict[str, Any]:
    """Write LongRoPE."""
    n = len(divisors) // 2
    lists = {"short_factor": list(divisors[:n]), "long_factor": list(divisors[n:])}
    return {"original_max_position_embeddings": int(length), "attention_factor": attention, **lists}


SCALINGS: Mapping[str, tuple[Callable[[Published, ModelConfig], Numbers], Callable[..., dict[str, Any]]]] = {
    "linear": (lambda rope, _: (rope.number("factor"),), lambda factor: {"factor": factor}),
    "llama3": (
        read_llama3,
        lambda factor, low, high, length: {
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(length),
        },
    ),
    "yarn": (
        read_yarn,
        lambda factor, fast, slow, length, attention, truncate=1.0: {
            "factor": factor,
            "beta_fast": fast,
            "beta_slow": slow,
            "original_max_position_embeddings": int(length),
            "attention_factor": attention,
            "truncate": bool(truncate),
        },
    ),
    "longrope": (read_longrope, write_longrope),
}
"""Kind -> how its numbers are read, in the order of the arguments of its function in model/positions.py, and written."""


def read_rope(rope: Published, config: ModelConfig, *, partial: bool = False, share: float = 1.0) -> dict[str, Any]:
    """Read base, scaling and rotated channels from the parameters of one kind of layer.

    Raises: ArtifactError for a scaling that is not supported.
    """
    theta = float(rope.number("rope_theta", 10000.0))
    if theta <= 0:
        raise rope.refuse("rope_theta", theta, "a positive number")
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    kind = "longrope" if kind == "su" else kind  # the name in the first Phi-3
    fields: dict[str, Any] = {"rope_theta": theta}
    if kind not in ("default", None):
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise rope.refuse("rope_type", kind, f"default, {', '.join(SCALINGS)}")
        numbers = tuple(float(number) for number in SCALINGS[kind][0](rope, config))
        fields |= {"rope_scaling": kind, "rope_scaling_values": numbers}
    if not partial:
        rope.only("partial_rotary_factor", 1.0)
        return fields
    width = int(config.head_dim * rope.number("partial_rotary_factor", share))
    return fields | {"rotary_dim": 0 if width == config.head_dim else width}


def write_parameters(config: ModelConfig, *, partial: bool = False) -> dict[str, Any]:
    """Return the object of parameters that transformers 5 reads."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        rope["rope_type"] = config.rope_scaling
        rope |= SCALINGS[config.rope_scaling][1](*config.rope_scaling_values)
    if partial:
        rope["partial_rotary_factor"] = (config.rotary_dim or config.head_dim) / config.head_dim
    return rope


def rope(*, partial: bool = False, share: float = 1.0, theta: float = 10000.0) -> Row:
    """Return the row of rotary positions, for old readers (`rope_theta`, `rope_scaling`) and new ones (`rope_parameters`).

    partial: the family may rotate only a part of a head; share, theta: those of a file that does not say.
    """

    def write(config: ModelConfig) -> dict[str, Any]:
        parameters = write_parameters(config, partial=partial)
        values: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_parameters": parameters}
        if config.rope_scaling != "none":
            values["rope_scaling"] = parameters
            if config.rope_scaling == "longrope":  # where the code of Phi-3 looks for it
                values["original_max_position_embeddings"] = parameters["original_max_position_embeddings"]
        if "partial_rotary_factor" in parameters:
            values["partial_rotary_factor"] = parameters["partial_rotary_factor"]
        return values

    def read(published: Published, config: ModelConfig) -> dict[str, Any]:
        parameters = published.rope_parameters()
        parameters.values = {"rope_theta": theta, **parameters.values}
        return read_rope(parameters, config, partial=partial, share=share)

    return Row("rope_theta", read, write)


def rope_by_kind(
    local_key: str = "", global_key: str = "rope_theta", default: float = 10000.0, local_default: float | None = 10000.0
) -> Row:
    """Return the row of rotary positions that differ in layers with a window, as in Gemma 3.

    local_key, global_key: where old files have the two bases; default, local_default: those of a file that does not say;
    None: the same as in the other layers. Layers with a window are never scaled. The row of the windows stands before.
    """

    def read(published: Published, config: ModelConfig) -> dict[str, Any]:
        whole = published.rope_parameters(FULL)
        old = published.values.get(global_key)
        whole.values = {"rope_theta": default if old is None else old, **whole.values}
        fields = read_rope(whole, config)
        own = published.rope_parameters(WINDOWED)
        own.values = {key: value for key, value in own.values.items() if key in ("rope_theta", "rope_type")}
        if "rope_parameters" not in published.values:  # old files scale layers without a window alone
            theta = published.values.get(local_key)
            own.values = {} if theta is None else {"rope_theta": theta}
        own.only("rope_type", "default")
        inner = own.number("rope_theta", fields["rope_theta"] if local_default is None else local_default)
        outer = fields["rope_theta"]
        thetas = () if inner == outer else tuple(inner if size else outer for size in config.attention_windows)
        if "rope_scaling" in fields and any(config.attention_windows):
            fields["rope_scaling_layers"] = "full"
        return fields | {"rope_thetas": thetas}

    def write(config: ModelConfig) -> dict[str, Any]:
        local = next((theta for theta in config.rope_thetas if theta != config.rope_theta), config.rope_theta)
        parameters = write_parameters(config)
        by_kind = {FULL: parameters, WINDOWED: {"rope_type": "default", "rope_theta": local}}
        values = {global_key: config.rope_theta, "rope_parameters": by_kind} | ({local_key: local} if local_key else {})
        return values | ({"rope_scaling": parameters} if config.rope_scaling != "none" else {})

    return Row("rope_theta", read, write)
