"""Models with random weights of a given shape and precision, for benchmarks."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmctl.artifacts.load import materialize_buffers, without_weights
from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.kernels.product_table import randomize
from llmctl.machine import DTYPES
from llmctl.model.presets import preset_config
from llmctl.model.transformer import LanguageModel
from llmctl.quant.linear import QuantLinear
from llmctl.quant.schemes import SCHEMES, Scheme
from llmctl.tables import dtypes

SHAPES: dict[str, dict[str, Any]] = {
    "30M": {"d_model": 512, "n_layers": 8, "n_heads": 8, "d_ff": 1408, "vocab_size": 16_000, "max_positions": 2048},
}
"""Llama shapes in addition to the presets."""
SHORT_NAMES = {"135M": "smollm2-135m", "1.1B": "tinyllama-1.1b"}


def shape_config(name: str) -> ModelConfig:
    """Return the config of a shape by name: one of `SHAPES`, or a preset.

    Raises: UsageError or NotFoundError for an unknown name; UsageError for an encoder.
    """
    config = ModelConfig(**SHAPES[name]) if name in SHAPES else preset_config(SHORT_NAMES.get(name, name))
    if config.family == "encoder":
        raise UsageError(f"`--shape {name}` is an encoder, which cannot generate", "`llmctl presets` lists the shapes")
    return config


def random_model(config: ModelConfig, precision: str, *, group: int = 0) -> LanguageModel:
    """Return a model with random weights in a dtype or a scheme of `SCHEMES`.

    A scheme applies to the blocks, with another group size if `group` is set; the head is then int8 and the rest float32.
    Raises: UsageError for an unknown precision.
    """
    if dtypes.full_name(precision) not in DTYPES and precision not in SCHEMES:
        raise UsageError(
            f"`--scheme {precision}` is not supported",
            f"use {', '.join([*dtypes.SHORT_NAMES, *SCHEMES])}, comma-separated",
        )
    model = without_weights(config)
    generator = torch.Generator().manual_seed(0)
    if precision in SCHEMES:
        head = QuantLinear(config.d_model, config.vocab_size, SCHEMES["int8"], bias=config.logits_bias)
        model.lm_head = head  # type: ignore[assignment]
        scheme = SCHEMES[precision]
        quantize_blocks(model, replace(scheme, group=group or scheme.group))
    dtype = DTYPES.get(dtypes.full_name(precision), torch.float32)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            randomize(module, generator)
        elif list(module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.to(dtype)
            for name, parameter in module.named_parameters(recurse=False):
                # Norms and biases are not all the same, or an ignored one would not be seen.
                low, high = (0.5, 1.5) if parameter.dim() == 1 and name == "weight" else (-0.02, 0.02)
                nn.init.uniform_(parameter, low, high, generator)
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
    materialize_buffers(model)
    if precision not in SCHEMES:
        model.tie()
    return model.eval()


def quantize_blocks(model: LanguageModel, scheme: Scheme) -> None:
    """Replace the linear layers of the blocks by quantized layers."""
    for stack in model.stacks():
        for module in list(stack.layers.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and scheme.fits(child.in_features):
                    layer = QuantLinear(child.in_features, child.out_features, scheme, bias=child.bias is not None)
                    setattr(module, name, layer)
