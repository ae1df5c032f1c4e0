"""A model whose codes are learned: its layers train through their rounding, from codes that were chosen."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmctl.formats.families.parameters import parameter_shapes
from llmctl.formats.quantization import is_inside
from llmctl.model.transformer import LanguageModel, load_tensors, put_module
from llmctl.quant.learned import LearnedLinear, ScaledLinear, learned_codes
from llmctl.quant.schemes import Scheme
from llmctl.quant.weight import PARTS, packed, unpacked
from llmctl.quantizing.calibrate import Calibrated, calibrate

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
    model.quantise(tables)
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


def small_in_16_bits(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state whose float32 tables have 16 bits; vectors, and what is packed, stay as they are."""
    return {
        name: tensor.half() if tensor.dim() > 1 and tensor.dtype == torch.float32 else tensor
        for name, tensor in state.items()
    }


def stored_state(model: LanguageModel, found: Calibrated, plan: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """Return the state to write: packed tensors, 16-bit tables, and the small rest as it is."""
    dropped = {f"{name}.weight" for name in plan}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in dropped}
    state = small_in_16_bits(kept)
    if model.config.tie_embeddings:
        state.pop("lm_head.weight", None)
    for name, codes in found.codes.items():
        state |= {f"{name}.{part}": tensor for part, tensor in packed(codes, plan[name]).items()}
    return state


def rounding(model: LanguageModel, schemes: Mapping[str, Scheme]) -> LanguageModel:
    """Turn a model into one that trains through its rounding, from the clipped range of every group; needs no data."""
    copy = LanguageModel(model.config)
    load_tensors(copy, model.state_dict())
    found = calibrate(copy, schemes, "clip", [], lambda _: None)
    return learner(model, stored_state(copy, found, schemes), schemes)
