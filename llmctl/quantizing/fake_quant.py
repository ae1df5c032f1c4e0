"""Fake quantization: layers that train through their rounding (QAT, learned scales), starting from chosen codes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llmctl.formats.quantization import is_inside
from llmctl.model.parameters import parameter_shapes
from llmctl.model.quantized import put_module, quantize
from llmctl.model.transformer import LanguageModel, load_tensors
from llmctl.quant.gguf_learned import STORED, BlockLinear
from llmctl.quant.gguf_learned import learned_codes as block_codes
from llmctl.quant.gguf_schemes import BlockScheme
from llmctl.quant.grid import Codes
from llmctl.quant.learned import LearnedLinear, ScaledLinear, learned_codes
from llmctl.quant.schemes import Scheme
from llmctl.quant.weight import PARTS, packed, unpacked
from llmctl.quantizing.calibrate import calibrate
from llmctl.quantizing.packed_state import small_in_16_bits, stored_state

LEARNED_PARTS = ("weight", "codes_OI", "ratio", "scales_OG", "zeros_OG")
"""Tensors of a trained layer: the weight, or fixed codes, and the scales."""

BLOCK_PARTS = ("codes_OI", "ratio", "shift", *STORED)
"""Tensors of a trained layer of ggml's blocks."""


def learner(
    model: LanguageModel, state: Mapping[str, Tensor], schemes: Mapping[str, Scheme], *, weights: bool = True
) -> LanguageModel:
    """Replace a model's linear layers by fake-quantized ones that start from the codes of a packed state.

    weights: train weights and so change codes; else only scales are trained.
    """
    shapes = parameter_shapes(model.config)
    tables = {name: scheme for name, scheme in schemes.items() if not is_inside(name)}
    whole = model.state_dict()
    quantize(model, tables)
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
    return model if weights else with_scales_only(model)


def block_learner(
    model: LanguageModel, state: Mapping[str, Tensor], codes: Mapping[str, tuple[BlockScheme, Codes]]
) -> LanguageModel:
    """Return a model with the weights of a GGUF file, of which only the scales of the blocks in its layers are trained.

    state, codes: what is read from the file.
    """
    load_tensors(model, state)
    for name, (scheme, own) in codes.items():
        if is_inside(name):
            plain: Any = model.get_submodule(name)
            layer = BlockLinear(plain.in_features, plain.out_features, scheme, bias=plain.bias is not None)
            layer.put(own)
            if plain.bias is not None:
                layer.bias = plain.bias
            put_module(model, name, layer)
    return with_scales_only(model)


def with_scales_only(model: LanguageModel) -> LanguageModel:
    """Freeze all but scales: with the few tokens of calibration, noise in norms and biases cost more than training them gained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith((".ratio", ".shift")))
    return model


def learned_blocks(trained: Mapping[str, Tensor], codes: Mapping[str, tuple[BlockScheme, Codes]]) -> dict[str, Codes]:
    """Return the codes of a trained model's modules; `codes` are those that it started from."""
    found = {}
    for name, (scheme, own) in codes.items():
        parts = {part: trained[f"{name}.{part}"] for part in BLOCK_PARTS if f"{name}.{part}" in trained}
        found[name] = block_codes(parts, scheme) if is_inside(name) else own
    return found


def parts_of(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the packed tensors of a module by part."""
    return {part: state[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in state}


def learned_state(trained: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """Return the state dict to write for a trained fake-quantized model."""
    state = dict(trained)
    for name, scheme in schemes.items():
        if is_inside(name):
            parts = {part: state.pop(f"{name}.{part}") for part in LEARNED_PARTS if f"{name}.{part}" in state}
            codes = learned_codes(parts, scheme)
            state |= {f"{name}.{part}": tensor for part, tensor in packed(codes, scheme).items()}
    return small_in_16_bits(state)


def rounding(model: LanguageModel, schemes: Mapping[str, Scheme]) -> LanguageModel:
    """Replace a model's linear layers by fake-quantized ones over the clipped range of every group; needs no data."""
    copy = LanguageModel(model.config)
    load_tensors(copy, model.state_dict())
    found = calibrate(copy, schemes, "clip", [], lambda _: None)
    return learner(model, stored_state(copy, found, schemes), schemes)
