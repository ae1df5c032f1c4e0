"""The student's shape, from a percentage of the teacher's parameters or from sizes.

A percentage is met by removing layers first and narrowing the feed-forward layers to hit it, since that recovers fastest
and is fastest to run; model width and heads are reduced only if that is not enough. In an encoder-decoder the decoder is
reduced first: it takes most of the time (DistilBART, Shleifer and Rush 2020, arXiv:2010.13002).
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.families.table import family_for
from llmctl.model.parameters import count
from llmctl.model.prunable import scales_at
from llmctl.model.shapes import complete
from llmctl.tables.names import closest

KEYS = {
    "layers": "n_layers",
    "encoder_layers": "n_layers",
    "decoder_layers": "n_decoder_layers",
    "dim": "d_model",
    "heads": "n_heads",
    "kv_heads": "n_kv_heads",
    "ffn": "d_ff",
}
NUMBER = re.compile(r"0*[1-9]\d{0,8}", re.ASCII)
SHARE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*%", re.ASCII)
NARROWEST_FFN = 0.6
"""Minimum fraction of feed-forward units kept for a percentage."""

WIDTH_WEIGHT = 4
"""Exponent of the width fraction relative to the depth fraction: all layers have learned to use the whole width."""

TOLERANCE = 0.02
HINT = "50%, or layers=6,dim=512,heads=8,ffn=1408, or an existing model"


def parse_student(text: str, teacher: ModelConfig) -> ModelConfig:
    """Parse a shape: `50%`, or `layers=6,dim=512`.

    Raises: UsageError naming what is wrong with it.
    """
    teacher = complete(teacher)
    share = SHARE.fullmatch(text.strip())
    if share:
        frac = float(share[1]) / 100
        if not 0 < frac <= 1:
            raise UsageError(f"`--student {text}` is not between 0% and 100% of the teacher", HINT)
        return within_budget(teacher, frac, text)
    values = read_numbers(text, teacher)
    return checked(teacher, values, text)


def read_numbers(text: str, teacher: ModelConfig) -> dict[str, int]:
    """Parse sizes, by their names in the config.

    Raises: UsageError for an invalid key or number.
    """
    values: dict[str, int] = {}
    has_both = False
    for part in text.split(","):
        key, sign, number = part.partition("=")
        key, number = key.strip(), number.strip()
        if not sign or key not in KEYS:
            near = closest(key, KEYS)
            meant = f", did you mean `{near}`?" if near else ""
            raise UsageError(f"`--student {text}`: `{part.strip()}` is neither a percentage nor a size{meant}", HINT)
        if not NUMBER.fullmatch(number):
            raise UsageError(f"`--student {text}`: `{key}` is `{number[:20]}`, it must be a number of at least 1", HINT)
        if KEYS[key] in values:
            raise UsageError(f"`--student {text}` says `{key}` twice", HINT)
        if key in ("decoder_layers", "encoder_layers") and teacher.family != "encoder_decoder":
            raise UsageError(f"`--student {text}`: the teacher has one stack, its layers are `layers`", HINT)
        values[KEYS[key]] = int(number)
        has_both |= key == "layers" and teacher.family == "encoder_decoder"
    if has_both:
        values.setdefault("n_decoder_layers", min(values["n_layers"], teacher.n_decoder_layers))
    return values


def checked(teacher: ModelConfig, values: dict[str, int], text: str) -> ModelConfig:
    """Return the shape with these sizes and those that follow from them.

    Raises: UsageError for a shape that cannot be pruned from the teacher or that no published architecture has.
    """
    for name, value in values.items():
        if value > getattr(teacher, name):
            key = next(key for key, known in KEYS.items() if known == name)
            raise UsageError(
                f"`--student {text}`: `{key}` is {value}, the teacher has {getattr(teacher, name)}",
                "a student is a part of its teacher; --student MODEL takes any other model of its tokenizer",
            )
    size = teacher.n_heads // teacher.n_kv_heads
    if "n_heads" in values and "n_kv_heads" not in values:
        values["n_kv_heads"] = values["n_heads"] // size
    if "n_kv_heads" in values and "n_heads" not in values:
        values["n_heads"] = values["n_kv_heads"] * size
    if not has_free_heads(teacher):
        if "d_model" in values and "n_heads" not in values:
            values["n_heads"] = values["n_kv_heads"] = max(1, values["d_model"] // teacher.head_dim)
        elif "n_heads" in values and "d_model" not in values:
            values["d_model"] = values["n_heads"] * teacher.head_dim
        heads, dim = values.get("n_heads", teacher.n_heads), values.get("d_model", teacher.d_model)
        if heads * teacher.head_dim != dim:
            raise UsageError(
                f"`--student {text}`: dim {dim} is not {heads} heads of {teacher.head_dim}, as this architecture has them",
                f"dim={heads * teacher.head_dim} goes with heads={heads}",
            )
    if "n_heads" in values and (values["n_kv_heads"] < 1 or values["n_heads"] != values["n_kv_heads"] * size):
        raise UsageError(
            f"`--student {text}`: {values['n_heads']} heads do not divide into groups of {size}",
            f"heads={max(1, values['n_heads'] // size) * size}",
        )
    heads, dim = values.get("n_heads", teacher.n_heads), values.get("d_model", teacher.d_model)
    if dim % heads:
        raise UsageError(
            f"`--student {text}`: dim {dim} is not divisible by {heads} heads", f"dim={max(1, dim // heads) * heads}"
        )
    if dim < teacher.d_model and teacher.positions == "sinusoidal":
        raise UsageError(f"`--student {text}`: a narrower model has other sinusoidal positions", "leave dim away")
    return buildable(resized(teacher, values), teacher, text)


def has_free_heads(teacher: ModelConfig) -> bool:
    """Return whether heads * head width may differ from the model width in this architecture."""
    wider = resized(teacher, {"d_model": 3 * teacher.n_heads * teacher.head_dim})
    return family_for(wider) is family_for(teacher)


def resized(teacher: ModelConfig, values: dict[str, int]) -> ModelConfig:
    """Return the teacher's shape with other sizes and those that follow from them."""
    changes: dict[str, object] = dict(values)
    if "d_model" in values:
        changes |= scales_at(teacher, values["d_model"])
    return complete(replace(teacher, **changes))  # type: ignore[arg-type]


def buildable(shape: ModelConfig, teacher: ModelConfig, text: str) -> ModelConfig:
    """Return the shape if the teacher's architecture supports it, so that the same programs open both.

    Raises: UsageError.
    """
    if family_for(shape) is not family_for(teacher):
        raise UsageError(f"`--student {text}` is not a shape of {family_for(teacher).architecture}", HINT)
    return shape


def within_budget(teacher: ModelConfig, frac: float, text: str) -> ModelConfig:
    """Return the best shape with a fraction of the parameters.

    Raises: UsageError with the smallest possible fraction.
    """
    total = count(teacher)
    budget = frac * total
    if frac > 1 - TOLERANCE / 2:
        return teacher
    fitting: list[ModelConfig] = []
    for narrowest in (NARROWEST_FFN, 0.0):  # fewer units only where nothing else is small enough
        shapes = [shape for wide in widths(teacher) for shape in depths(wide, teacher, budget, narrowest)]
        fitting = fitting or [shape for shape in shapes if count(shape) <= budget * (1 + TOLERANCE)]
    near = [shape for shape in fitting if count(shape) >= budget * (1 - TOLERANCE)]
    if near:
        return buildable(max(near, key=lambda shape: preference(shape, teacher)), teacher, text)
    if fitting:
        return buildable(max(fitting, key=count), teacher, text)
    smallest = resized(list(widths(teacher))[-1], {"n_layers": 1, "d_ff": 8} | only_pairs(teacher, 1))
    raise UsageError(
        f"`--student {text}` is {budget:,.0f} parameters, the smallest student of this teacher has {count(smallest):,}",
        f"{100 * count(smallest) / total + 1:.0f}% or more: most of it is the vocabulary",
    )


def preference(shape: ModelConfig, teacher: ModelConfig) -> tuple[float, float]:
    """Return the sort key of shapes: a complete encoder first, then the mildest reduction of the most reduced size."""
    layers = (shape.n_layers + shape.n_decoder_layers) / (teacher.n_layers + teacher.n_decoder_layers)
    units = (shape.d_ff / shape.d_model) / (teacher.d_ff / teacher.d_model)
    width = (shape.d_model / teacher.d_model) ** WIDTH_WEIGHT
    return float(shape.n_layers) * (teacher.family == "encoder_decoder"), min(layers, units, width)


def only_pairs(teacher: ModelConfig, n_layers: int) -> dict[str, int]:
    """Return the decoder layers to change if the model is an encoder-decoder."""
    return {"n_decoder_layers": n_layers} if teacher.family == "encoder_decoder" else {}


def depths(wide: ModelConfig, teacher: ModelConfig, budget: float, narrowest: float) -> Iterator[ModelConfig]:
    """Yield shapes of every depth, with as many feed-forward units as the budget allows; narrowest: the least fraction."""
    unit = step_of(teacher.d_ff)
    decoders = range(1, teacher.n_decoder_layers + 1) if teacher.family == "encoder_decoder" else (0,)
    for n_layers in range(1, teacher.n_layers + 1):
        for n_decoder in decoders:
            layers = {"n_layers": n_layers} | ({"n_decoder_layers": n_decoder} if n_decoder else {})
            full = resized(wide, layers)
            slope = (count(full) - count(replace(full, d_ff=full.d_ff - 1))) or 1
            room = full.d_ff + (budget - count(full)) / slope
            units = min(full.d_ff, int(room // unit * unit) if room < full.d_ff else full.d_ff)
            if units >= max(narrowest * full.d_ff, 1):
                yield replace(full, d_ff=units)


def widths(teacher: ModelConfig) -> Iterator[ModelConfig]:
    """Yield the teacher's shape at its own width, then at smaller widths."""
    yield teacher
    if teacher.positions == "sinusoidal":  # a narrower model has another table
        return
    size = teacher.n_heads // teacher.n_kv_heads
    for groups in range(teacher.n_kv_heads - 1, 0, -1):
        heads = groups * size
        dim, rest = divmod(teacher.d_model * heads, teacher.n_heads)
        if rest:
            continue
        units = max(8, round(teacher.d_ff * groups / teacher.n_kv_heads / 8) * 8)
        yield resized(teacher, {"d_model": dim, "n_heads": heads, "n_kv_heads": groups, "d_ff": units})


def step_of(width: int) -> int:
    """Return the step of a width: 64 if fine enough, less in small models."""
    return next((step for step in (64, 32, 16) if width >= 12 * step), 8)


def shape_between(teacher: ModelConfig, student: ModelConfig, share: float) -> ModelConfig:
    """Interpolate the shape between teacher (0) and student (1)."""
    teacher, student = complete(teacher), complete(student)
    if share in (0.0, 1.0):
        return student if share else teacher

    def between(name: str, step: int = 1) -> int:
        first, last = getattr(teacher, name), getattr(student, name)
        here = first + (last - first) * share
        return last if first == last else min(first, max(last, round(here / step) * step))

    values = {"n_layers": between("n_layers"), "d_ff": between("d_ff", step_of(teacher.d_ff))}
    if teacher.family == "encoder_decoder":
        values["n_decoder_layers"] = between("n_decoder_layers")
    size = teacher.n_heads // teacher.n_kv_heads
    values["n_kv_heads"] = between("n_kv_heads")
    values["n_heads"] = values["n_kv_heads"] * size
    values["d_model"] = student.d_model
    if student.d_model < teacher.d_model:  # a multiple of the number of heads
        heads = values["n_heads"]
        wide = heads * teacher.head_dim if not has_free_heads(teacher) else between("d_model") // heads * heads
        values["d_model"] = max(student.d_model // heads * heads, wide)
    return resized(teacher, values)
