"""Weights in few bits on disk: which modules have them, under what scheme, in which tensors.

`config.json` says it in `quantization_config` as compressed-tensors does, so that what fits there opens in transformers
and vLLM. Modules go by the names of our parameters. Codes lie packed in words (`pack-quantized`) or, eight bits of them,
one a byte (`int-quantized`); both are read wherever they stand.

transformers 5.24 has two ways to open such a file, and what is written here is what one of them takes. The usual one
knows rounded inputs and embeddings in bytes only, and makes no room for packed zeros, which its library packs when it
saves. With `dequantize` it multiplies weights out as it reads, zeros and all, by one scheme for the whole file.
"""

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.formats.families.family import FamilyFormat
from llmctl.formats.families.native import NATIVE
from llmctl.formats.families.table import family_for
from llmctl.model.parameters import Shape, parameter_shapes
from llmctl.quant.schemes import FEWEST_BITS, MOST_BITS, SCALE_BITS, Scheme

if TYPE_CHECKING:
    from torch import Tensor

KEY = "quantization_config"
METHOD = "compressed-tensors"
IN_WORDS, IN_BYTES, IN_BOTH = "pack-quantized", "int-quantized", "mixed-precision"
SMALL_SCALES = "llmctl-pack-quantized"
"""Codes in words whose scales are in eight bits, which is ours alone: by this name others refuse it.

A method that it does not know transformers leaves out, and goes on with weights that mean nothing.
"""

FORMS = (IN_WORDS, IN_BYTES, SMALL_SCALES)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
EXPONENT = "weight_scale_exponent"
WEIGHT = "weight"
PARTS = (PACKED, SCALE, ZERO)
HEAD_SCALE = f"{HEAD}.{SCALE}"
WHOLE_DTYPES = {PACKED: "I32", ZERO: "I32", SHAPE: "I64", EXPONENT: "I8"}

Schemes = Mapping[str, Scheme]
"""Module -> scheme; a tied head goes by the embedding's name alone."""


def is_inside(name: str) -> bool:
    """Tell whether a module is part of a block, not a table or a head."""
    return "layers." in name or "query_layer." in name


def linear_modules(config: ModelConfig) -> dict[str, Shape]:
    """Return the linear maps of a complete config's model and their shapes (O, I), the head over the vocabulary included.

    A tied head is left out: it is the embedding.
    """
    shapes = {name.removesuffix(".weight"): shape for name, shape in parameter_shapes(config).items()}
    tables = (EMBEDDING, "embed_positions", "relative_bias", "embed_token_types", "query_embeddings")
    return {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2 and not name.endswith(tables) and not (name == HEAD and config.tie_embeddings)
    }


def family_with(config: ModelConfig, schemes: Schemes) -> FamilyFormat:
    """Return the family that a model in few bits is written as: the published one where it has our names, else our own."""
    family = family_for(config)
    if not schemes:
        return family
    plain = {
        stored.name for stored in family.layout(config) if stored.layout == "plain" and stored.holds == (stored.name,)
    }
    return family if all(f"{name}.weight" in plain for name in schemes) else NATIVE


def fits_bytes(scheme: Scheme) -> bool:
    """Tell whether codes can lie one a byte, as signed numbers."""
    return scheme.bits == 8 and scheme.symmetric and not scheme.group and not scheme.has_small_scales


def whole_dtypes(schemes: Schemes, forms: Mapping[str, str]) -> dict[str, str]:
    """Return the dtypes of the tensors that hold whole numbers under a name that others of them use for real ones."""
    found = {f"{name}.{WEIGHT}": "I8" for name, form in forms.items() if form == IN_BYTES}
    small = [name for name, scheme in schemes.items() if scheme.has_small_scales]
    return found | {f"{name}.{SCALE}": "U8" for name in small}


def form_of(name: str, scheme: Scheme) -> str:
    """Return how the codes of a module are written."""
    if scheme.has_small_scales:
        return SMALL_SCALES
    wants_bytes = scheme.activations or name in (EMBEDDING, HEAD)
    return IN_BYTES if wants_bytes and fits_bytes(scheme) else IN_WORDS


def shares_bytes(schemes: Schemes, config: ModelConfig) -> bool:
    """Tell whether a tied head reads codes that lie in bytes; it then has the scales beside it once more.

    transformers ties the codes, and each of the two is multiplied out by scales of its own.
    """
    is_tied = config.tie_embeddings and not config.n_labels
    return is_tied and EMBEDDING in schemes and form_of(EMBEDDING, schemes[EMBEDDING]) == IN_BYTES


def part_shapes(scheme: Scheme, shape: Shape, form: str = IN_WORDS) -> dict[str, Shape]:
    """Return the tensors that hold a matrix (O, I), and their shapes."""
    n_out, n_in = shape
    n_groups = scheme.n_groups(n_in)
    if form == IN_BYTES:
        return {WEIGHT: shape, SCALE: (n_out, n_groups)}
    shapes: dict[str, Shape] = {PACKED: (n_out, -(-n_in * scheme.bits // 32)), SCALE: (n_out, n_groups), SHAPE: (2,)}
    if scheme.has_small_scales:
        shapes[EXPONENT] = (n_out, 1)
    return shapes if scheme.symmetric else shapes | {ZERO: (-(-n_out * scheme.bits // 32), n_groups)}


def write_schemes(schemes: Schemes, config: ModelConfig) -> dict[str, Any]:
    """Return what `config.json` says of quantized modules."""
    groups: dict[tuple[Scheme, str], list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault((scheme, form_of(name, scheme)), []).append(name)
    linear = set(linear_modules(config)) - {HEAD}
    shares = shares_bytes(schemes, config)
    written = {}
    # What is meant by a kind of module comes before what is meant by name.
    ordered = sorted(groups.items(), key=lambda group: set(group[1]) != linear)
    for number, ((scheme, form), names) in enumerate(ordered):
        targets = ["Linear"] if set(names) == linear else names
        written[f"group_{number}"] = {
            "targets": [*targets, HEAD] if shares and EMBEDDING in names else targets,
            "format": form,
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": scheme.symmetric,
                "strategy": "group" if scheme.group else "channel",
                "group_size": scheme.group or None,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None
            if not scheme.activations
            else {
                "num_bits": scheme.activations,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
            "output_activations": None,
        }
    forms = {form for _, form in groups}
    record = {
        "quant_method": METHOD,
        "format": forms.pop() if len(forms) == 1 else IN_BOTH,
        "quantization_status": "compressed",
        "config_groups": written,
        "ignore": [] if HEAD in schemes or shares else [HEAD],
        "kv_cache_scheme": None,
    }
    has_zeros = any(not scheme.symmetric for scheme in schemes.values())
    return record | ({"dequantize": True} if has_zeros and len(groups) == 1 else {})


def read_schemes(hf: Mapping[str, Any], config: ModelConfig, where: str) -> dict[str, Scheme]:
    """Return the scheme of every quantized module that a `config.json` names.

    Raises: ArtifactError naming what is not read.
    """
    record = hf.get(KEY)
    if record is None:
        return {}
    if not isinstance(record, dict) or record.get("quant_method") != METHOD:
        method = record.get("quant_method") if isinstance(record, dict) else record
        raise refused(where, "quant_method", method, METHOD)
    if record.get("format") not in (*FORMS, IN_BOTH):
        raise refused(where, "format", record.get("format"), f"{', '.join(FORMS)} and {IN_BOTH}")
    groups = record.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise refused(where, "config_groups", groups, "an object with groups")
    linear = linear_modules(config)
    known = [*linear, EMBEDDING]
    ignored = matching(record.get("ignore") or [], known, where)
    schemes: dict[str, Scheme] = {}
    for group in groups.values():
        if not isinstance(group, dict):
            raise refused(where, "config_groups", group, "an object with groups")
        targets = group.get("targets") or []
        named = matching([target for target in targets if target != "Linear"], known, where)
        names = named | (set(linear) - ignored if "Linear" in targets else set())
        scheme = read_scheme(group, where)
        schemes |= {name: scheme for name in known if name in names}
    shapes = linear | {EMBEDDING: parameter_shapes(config)[f"{EMBEDDING}.weight"]}
    unfit = next((name for name, scheme in schemes.items() if not scheme.fits(shapes[name][1])), None)
    if unfit:
        raise refused(
            where, "group_size", schemes[unfit].group, f"a divisor of the {shapes[unfit][1]} inputs of {unfit}"
        )
    return schemes


def matching(patterns: Any, names: Collection[str], where: str) -> set[str]:
    """Return the names that a list of names and `re:` patterns means."""
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise refused(where, "targets", patterns, "a list of names")
    found: set[str] = set()
    for pattern in patterns:
        if not pattern.startswith("re:"):
            found |= {name for name in names if name == pattern}
            continue
        try:
            rule = re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise refused(where, "targets", pattern, "a regular expression") from error
        found |= {name for name in names if rule.match(name)}
    return found


def read_scheme(group: Mapping[str, Any], where: str) -> Scheme:
    """Return the scheme of a group."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if group.get("format") not in (None, *FORMS):
        raise refused(where, "format", group["format"], " and ".join(FORMS))
    if not isinstance(weights, dict) or weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise refused(where, "weights", weights, "static integers")
    bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    if type(bits) is not int or not FEWEST_BITS <= bits <= MOST_BITS:
        raise refused(where, "num_bits", bits, f"{FEWEST_BITS} to {MOST_BITS}")
    if strategy not in ("group", "channel") or (strategy == "group" and (type(size) is not int or size < 1)):
        raise refused(where, "strategy", f"{strategy} {size}", "group with a group_size, or channel")
    if weights.get("actorder") not in (None, "static", "weight"):
        raise refused(where, "actorder", weights.get("actorder"), "null, static or weight")
    if inputs is not None and (
        not isinstance(inputs, dict)
        or inputs.get("num_bits") != 8
        or inputs.get("type", "int") != "int"
        or inputs.get("strategy") != "token"
        or not inputs.get("dynamic")
        or not inputs.get("symmetric", True)
    ):
        raise refused(where, "input_activations", inputs, "8 bits, symmetric, dynamic, per token")
    group_size = int(size or 0) if strategy == "group" else 0
    symmetric, activations = bool(weights.get("symmetric", True)), 8 if inputs else 0
    scale_bits = 8 if group.get("format") == SMALL_SCALES else SCALE_BITS
    return Scheme(bits, group_size, symmetric=symmetric, activations=activations, scale_bits=scale_bits)


def refused(where: str, key: str, value: Any, read: str) -> ArtifactError:
    """Return the error for a way of quantizing that is not read."""
    return ArtifactError(
        f"`{where}` has `{KEY}.{key}` {str(value)[:60]!r}, which llmctl does not read", f"what is read: {read}"
    )


def dequantized(tensors: Mapping[str, "Tensor"], schemes: Schemes) -> dict[str, "Tensor"]:
    """Return a state in which quantized modules have the float32 weights that their codes mean."""
    from llmctl.quant.grid import decode
    from llmctl.quant.weight import unpacked

    state = {name: tensor for name, tensor in tensors.items() if not name.endswith((*PARTS, SHAPE))}
    for name, scheme in schemes.items():
        parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
        n_out, n_in = tensors[f"{name}.{SHAPE}"].tolist()
        state[f"{name}.weight"] = decode(unpacked(parts, scheme, n_out, n_in), scheme)
    return state


def in_words(tensors: Mapping[str, "Tensor"], schemes: Schemes) -> dict[str, "Tensor"]:
    """Return the tensors of a file with all codes packed in words and scales multiplied out, as modules hold them."""
    import torch

    from llmctl.quant.grid import scales_of
    from llmctl.quant.packing import pack

    found = dict(tensors)
    for name, scheme in schemes.items():
        codes_OI = found.pop(f"{name}.{WEIGHT}", None)
        if codes_OI is not None:
            found[f"{name}.{PACKED}"] = pack(codes_OI.view(torch.uint8) ^ scheme.middle, scheme.bits)
            found[f"{name}.{SHAPE}"] = torch.tensor(codes_OI.shape)
        if scheme.has_small_scales:
            scales_OG = scales_of(found[f"{name}.{SCALE}"], found.pop(f"{name}.{EXPONENT}"))
            found[f"{name}.{SCALE}"] = scales_OG.bfloat16()
    return found


def stored_parts(state: Mapping[str, "Tensor"], schemes: Schemes, config: ModelConfig) -> dict[str, "Tensor"]:
    """Return the tensors of quantized modules as they are stored."""
    import torch

    from llmctl.quant.grid import scale_codes
    from llmctl.quant.packing import unpack

    shapes = parameter_shapes(config)
    stored: dict[str, Tensor] = {HEAD_SCALE: state[f"{EMBEDDING}.{SCALE}"]} if shares_bytes(schemes, config) else {}
    for name, scheme in schemes.items():
        if form_of(name, scheme) == IN_BYTES:
            n_in = shapes[f"{name}.weight"][1]
            codes_OI = unpack(state[f"{name}.{PACKED}"], scheme.bits, n_in) ^ scheme.middle
            stored |= {f"{name}.{WEIGHT}": codes_OI.view(torch.int8), f"{name}.{SCALE}": state[f"{name}.{SCALE}"]}
            continue
        stored |= {
            f"{name}.{part}": state[f"{name}.{part}"]
            for part in PARTS
            if part in part_shapes(scheme, (1, scheme.group or 1))
        }
        if scheme.has_small_scales:
            stored[f"{name}.{SCALE}"], stored[f"{name}.{EXPONENT}"] = scale_codes(state[f"{name}.{SCALE}"])
        stored[f"{name}.{SHAPE}"] = torch.tensor(shapes[f"{name}.weight"], dtype=torch.int64)
    return stored
