"""A model whose codes are learned: its layers train through their rounding, from codes that were chosen."""

from collections.abc import Mapping

from torch import Tensor

from llmctl.formats.quantization import is_inside
from llmctl.model.parameters import parameter_shapes
from llmctl.model.transformer import LanguageModel, load_tensors, put_module
from llmctl.quant.learned import LearnedLinear, ScaledLinear, learned_codes
from llmctl.quant.schemes import Scheme
from llmctl.quant.weight import PARTS, packed, unpacked
from llmctl.quantizing.calibrate import calibrate
from llmctl.quantizing.packed_state import small_in_16_bits, stored_state

LEARNED_PARTS = ("weight", "codes_OI", "ratio", "scales_OG", "zeros_OG")
"""Tensors of a layer that learns: the weight, or the codes that stay."""


def learner(
    model: LanguageModel, state: Mapping[str, Tensor], schemes: Mapping[str, Scheme], *, weights: bool = True
) -> LanguageModel:
    """Turn a model into one that learns codes, and return it: it begins with those of a packed state.

    weights: whether codes may become others; else only scales learn.
    """
    shapes = parameter_shapes(model.config)
    tables = {name: scheme for name, scheme in schemes.items() if not is_inside(name)}
    whole = model.state_dict()
    model.quantize(tables)
    for name, scheme in schemes.items():
        if not is_inside(name):
            continue
        n_out, n_in = shapes[f"{name}.weight"]
        kind = LearnedLinear if weights else ScaledLinear
        layer = kind(n_in, n_out, scheme, bias=f"{name}.bias" in whole)
        codes = unpacked(parts_of(state, name), scheme, n_out, n_in)
        layer.put(codes, whole[f"{name}.weight"].float())
        put_module(model, name, layer)
    own = model.state_dict()
    inner = {f"{name}.{part}" for name in schemes if is_inside(name) for part in LEARNED_PARTS}
    given = {name: state.get(name, whole.get(name)) for name in own if name not in inner}
    found = {name: tensor for name, tensor in given.items() if tensor is not None}
    load_tensors(model, {name: tensor for name, tensor in own.items() if name in inner} | found)
    for name, parameter in model.named_parameters():
        # Norms and biases, of which each moves all that comes after, would be moved by noise more than they could mend.
        if not weights and not name.endswith(".ratio"):
            parameter.requires_grad_(False)
    return model


def parts_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the packed tensors of a module."""
    return {part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state}


def learned_state(trained: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """Return the state to write of a model that has learned its codes."""
    state = dict(trained)
    for name, scheme in schemes.items():
        if is_inside(name):
            parts = {part: state.pop(f"{name}.{part}") for part in LEARNED_PARTS if f"{name}.{part}" in state}
            codes = learned_codes(parts, scheme)
            state |= {f"{name}.{part}": tensor for part, tensor in packed(codes, scheme).items()}
    return small_in_16_bits(state)


def rounding(model: LanguageModel, schemes: Mapping[str, Scheme]) -> LanguageModel:
    """Turn a model into one that trains through its rounding, from the clipped range of every group; needs no data."""
    copy = LanguageModel(model.config)
    load_tensors(copy, model.state_dict())
    found = calibrate(copy, schemes, "clip", [], lambda _: None)
    return learner(model, stored_state(copy, found, schemes), schemes)
