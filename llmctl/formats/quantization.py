"""Quantized weights on disk: which modules are quantized, with which scheme, in which tensors.

`quantization_config` in `config.json` follows compressed-tensors, so that transformers and vLLM can load whatever that
format supports. Modules go by our parameter names. Codes are packed into 32-bit words (`pack-quantized`) or, if they
have eight bits, stored one per byte (`int-quantized`); both are read for any module.

transformers 5.24 can load such a file in two ways, and every file we write suits one of them. The default way supports
quantized inputs and embeddings only as bytes, and does not allocate packed zero points, although its library packs them
when saving. With `dequantize` it dequantizes weights while loading, including zero points, but with one scheme per file.
"""

import math
import re
import time
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.families.family import FamilyFormat
from llmctl.families.native import NATIVE
from llmctl.families.table import family_for
from llmctl.model.parameters import Shape, parameter_shapes
from llmctl.quant.schemes import FEWEST_BITS, MOST_BITS, SCALE_BITS, Scheme
from llmctl.tokenizer.patterns import check_pattern

if TYPE_CHECKING:
    from torch import Tensor

KEY = "quantization_config"
METHOD = "compressed-tensors"
IN_WORDS, IN_BYTES, IN_BOTH = "pack-quantized", "int-quantized", "mixed-precision"
SMALL_SCALES = "llmctl-pack-quantized"
"""Packed codes with 8-bit scales, our own extension: an unknown format makes other programs refuse the file.

An unknown `quant_method` would not: transformers ignores it and loads meaningless weights.
"""

FORMS = (IN_WORDS, IN_BYTES, SMALL_SCALES)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TOKEN_TABLES = (EMBEDDING, "model.encoder.embed_tokens")
"""The tables of tokens; an encoder with a vocabulary of its own has one."""
PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
EXPONENT = "weight_scale_exponent"
WEIGHT = "weight"
PARTS = (PACKED, SCALE, ZERO)
HEAD_SCALE = f"{HEAD}.{SCALE}"
WHOLE_DTYPES = {PACKED: "I32", ZERO: "I32", SHAPE: "I64", EXPONENT: "I8"}

MATCH_SECONDS = 10.0
"""For a list of expressions; each is quick, but a file could have a million."""

Schemes = Mapping[str, Scheme]
"""Module -> scheme; a tied head is listed under the embedding's name only."""


def is_inside(name: str) -> bool:
    """Tell whether a module is part of a transformer block, not an embedding or a head."""
    return "layers." in name or "query_layer." in name


def linear_modules(config: ModelConfig) -> dict[str, Shape]:
    """Return the linear layers of a model and their shapes (O, I), including the vocabulary head unless it is tied."""
    shapes = {name.removesuffix(".weight"): shape for name, shape in parameter_shapes(config).items()}
    tables = ("embed_tokens", "embed_positions", "embed_distances", "relative_bias", "embed_token_types")
    return {
        name: shape
        for name, shape in shapes.items()
        if len(shape) == 2
        and not name.endswith((*tables, "query_embeddings", "mlp.router"))
        and not (name == HEAD and config.tie_embeddings)
    }


def packable_modules(config: ModelConfig) -> dict[str, Shape]:
    """Return the modules of a model that can have packed weights, and their shapes (O, I): also embeddings, (V, E)."""
    shapes = parameter_shapes(config)
    tables = (name for name in TOKEN_TABLES if f"{name}.weight" in shapes)
    return linear_modules(config) | {name: shapes[f"{name}.weight"] for name in tables}


def family_with(config: ModelConfig, schemes: Schemes) -> FamilyFormat:
    """Return the family to write a quantized model as: the published one if it uses our names, else our own.

    Packed codes cannot be fused, transposed or renamed on the way to a published layout.
    """
    family = family_for(config)
    if not schemes:
        return family
    plain = {
        stored.name for stored in family.layout(config) if stored.form == "plain" and stored.holds == (stored.name,)
    }
    return family if all(f"{name}.weight" in plain for name in schemes) else NATIVE


def fits_bytes(scheme: Scheme) -> bool:
    """Tell whether codes can be stored one per byte, as signed integers."""
    return scheme.bits == 8 and scheme.symmetric and not scheme.group and not scheme.has_small_scales


def whole_dtypes(schemes: Schemes, forms: Mapping[str, str]) -> dict[str, str]:
    """Return the dtypes of tensors that contain integer codes, although their names usually mean floating point."""
    dtypes = {f"{name}.{WEIGHT}": "I8" for name, form in forms.items() if form == IN_BYTES}
    small = [name for name, scheme in schemes.items() if scheme.has_small_scales]
    return dtypes | {f"{name}.{SCALE}": "U8" for name in small}


def form_of(name: str, scheme: Scheme) -> str:
    """Return the form in which a module's codes are written."""
    if scheme.has_small_scales:
        return SMALL_SCALES
    # transformers supports quantized inputs and embeddings only with codes as bytes.
    wants_bytes = scheme.activations or name in (*TOKEN_TABLES, HEAD)
    return IN_BYTES if wants_bytes and fits_bytes(scheme) else IN_WORDS


def shares_bytes(schemes: Schemes, config: ModelConfig) -> bool:
    """Tell whether a tied head shares codes stored as bytes; its scales are then written a second time.

    transformers ties only the codes: embedding and head each dequantize with their own scales.
    """
    is_tied = config.tie_embeddings and not config.n_labels
    return is_tied and EMBEDDING in schemes and form_of(EMBEDDING, schemes[EMBEDDING]) == IN_BYTES


def part_shapes(scheme: Scheme, shape: Shape, form: str = IN_WORDS) -> dict[str, Shape]:
    """Return the names and shapes of the tensors that store a quantized matrix of shape (O, I)."""
    n_out, n_in = shape
    n_groups = scheme.n_groups(n_in)
    if form == IN_BYTES:
        return {WEIGHT: shape, SCALE: (n_out, n_groups)}
    shapes: dict[str, Shape] = {PACKED: (n_out, -(-n_in * scheme.bits // 32)), SCALE: (n_out, n_groups), SHAPE: (2,)}
    if scheme.has_small_scales:
        shapes[EXPONENT] = (n_out, 1)
    return shapes if scheme.symmetric else shapes | {ZERO: (-(-n_out * scheme.bits // 32), n_groups)}


def stored_bytes(schemes: Schemes, config: ModelConfig) -> int:
    """Return the bytes of the tensors that store quantized matrices, with padding."""
    shapes, total = packable_modules(config), 0
    for name, scheme in schemes.items():
        widths = {WEIGHT: 1, EXPONENT: 1, SCALE: 1 if scheme.has_small_scales else 2, SHAPE: 8}  # others: words of 4
        for part, shape in part_shapes(scheme, shapes[name], form_of(name, scheme)).items():
            total += widths.get(part, 4) * math.prod(shape)
    if shares_bytes(schemes, config):
        total += 2 * shapes[EMBEDDING][0]
    return total


def write_schemes(schemes: Schemes, config: ModelConfig) -> dict[str, Any]:
    """Return the `quantization_config` of `config.json`."""
    # compressed-tensors describes groups of modules with the same scheme and format, not single modules.
    groups: dict[tuple[Scheme, str], list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault((scheme, form_of(name, scheme)), []).append(name)
    linear = set(linear_modules(config)) - {HEAD}  # what transformers means by the target `Linear`
    shares = shares_bytes(schemes, config)
    written = {}
    # A group that targets a module type comes before groups that target modules by name.
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
    # See the module's docstring: with `dequantize`, transformers reads zero points, but only one scheme.
    has_zeros = any(not scheme.symmetric for scheme in schemes.values())
    return record | ({"dequantize": True} if has_zeros and len(groups) == 1 else {})


def read_schemes(hf: Mapping[str, Any], config: ModelConfig, where: str) -> dict[str, Scheme]:
    """Return the scheme of every quantized module from the `quantization_config` of a `config.json`.

    Raises: ArtifactError naming what is unsupported.
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
    known = list(packable_modules(config))
    ignored = matching(record.get("ignore") or [], known, where)
    schemes: dict[str, Scheme] = {}
    for group in groups.values():
        if not isinstance(group, dict):
            raise refused(where, "config_groups", group, "an object with groups")
        targets = group.get("targets") or []
        if not isinstance(targets, list):
            raise refused(where, "targets", targets, "a list of names")
        # Later groups override earlier ones: a group for all linear layers comes before exceptions by name.
        named = matching([target for target in targets if target != "Linear"], known, where)
        names = named | (set(linear) - ignored if "Linear" in targets else set())
        scheme = read_scheme(group, where)
        schemes |= {name: scheme for name in known if name in names}
    shapes = packable_modules(config)
    misfit = next((name for name, scheme in schemes.items() if not scheme.fits(shapes[name][1])), None)
    if misfit:
        raise refused(
            where, "group_size", schemes[misfit].group, f"a divisor of the {shapes[misfit][1]} inputs of {misfit}"
        )
    return schemes


def matching(patterns: Any, names: Collection[str], where: str) -> set[str]:
    """Return the names selected by a list of names and `re:` patterns."""
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise refused(where, "targets", patterns, "a list of names")
    selected: set[str] = set()
    deadline = time.monotonic() + MATCH_SECONDS
    for pattern in patterns:
        if not pattern.startswith("re:"):
            selected |= {name for name in names if name == pattern}
            continue
        try:
            check_pattern(pattern.removeprefix("re:"), f"a target `re:` of `{where}`")
            rule = re.compile(pattern.removeprefix("re:"))
        except (re.error, OverflowError, RecursionError) as error:
            raise refused(where, "targets", pattern, "a regular expression") from error
        for name in names:
            if rule.match(name):
                selected.add(name)
            if time.monotonic() > deadline:
                raise refused(where, "targets", pattern, f"expressions that match in {MATCH_SECONDS:g} s")
    return selected


def read_scheme(group: Mapping[str, Any], where: str) -> Scheme:
    """Parse the scheme of one entry of `config_groups`."""
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
    # With these orders, codes and scales are stored in the original column order; `group` would need a permutation.
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


def refused(where: str, key: str, value: Any, supported: str) -> ArtifactError:
    """Return the error for an unsupported quantization setting."""
    return ArtifactError(
        f"`{where}` has `{KEY}.{key}` {str(value)[:60]!r}, which llmctl does not read", f"supported: {supported}"
    )


def dequantized(tensors: Mapping[str, "Tensor"], schemes: Schemes) -> dict[str, "Tensor"]:
    """Return a state in which quantized modules have dequantized float32 weights."""
    from llmctl.quant.grid import decode
    from llmctl.quant.weight import unpacked

    state = {name: tensor for name, tensor in tensors.items() if not name.endswith((*PARTS, SHAPE))}
    for name, scheme in schemes.items():
        parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
        n_out, n_in = tensors[f"{name}.{SHAPE}"].tolist()  # packed words do not determine the number of codes
        state[f"{name}.weight"] = decode(unpacked(parts, scheme, n_out, n_in), scheme)
    return state


def in_words(tensors: Mapping[str, "Tensor"], schemes: Schemes) -> dict[str, "Tensor"]:
    """Convert a file's tensors to the form modules use: codes packed into words, 8-bit scales decoded."""
    import torch

    from llmctl.quant.grid import scales_of
    from llmctl.quant.packing import pack

    state = dict(tensors)
    for name, scheme in schemes.items():
        codes_OI = state.pop(f"{name}.{WEIGHT}", None)
        if codes_OI is not None:
            # Flipping the top bit converts two's complement to the offset codes of the packed form.
            state[f"{name}.{PACKED}"] = pack(codes_OI.view(torch.uint8) ^ scheme.middle, scheme.bits)
            state[f"{name}.{SHAPE}"] = torch.tensor(codes_OI.shape)
        if scheme.has_small_scales:
            scales_OG = scales_of(state[f"{name}.{SCALE}"], state.pop(f"{name}.{EXPONENT}"))
            state[f"{name}.{SCALE}"] = scales_OG.bfloat16()
    return state


def stored_parts(state: Mapping[str, "Tensor"], schemes: Schemes, config: ModelConfig) -> dict[str, "Tensor"]:
    """Return the tensors of quantized modules in their form on disk: the inverse of `in_words`."""
    import torch

    from llmctl.quant.grid import scale_codes
    from llmctl.quant.packing import unpack

    shapes = parameter_shapes(config)
    stored: dict[str, Tensor] = {HEAD_SCALE: state[f"{EMBEDDING}.{SCALE}"]} if shares_bytes(schemes, config) else {}
    for name, scheme in schemes.items():
        if form_of(name, scheme) == IN_BYTES:
            n_in = shapes[f"{name}.weight"][1]
            # Flipping the top bit converts offset codes to two's complement.
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
