"""Models of a given shape and precision whose weights mean nothing, for measuring."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llmctl.artifacts.load import materialize_buffers, without_weights
from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.kernels.product_table import randomize
from llmctl.model.presets import preset_config
from llmctl.model.transformer import LanguageModel
from llmctl.quant.linear import QuantLinear
from llmctl.quant.schemes import SCHEMES, Scheme

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SHAPES: dict[str, dict[str, Any]] = {
    "30M": {"d_model": 512, "n_layers": 8, "n_heads": 8, "d_ff": 1408, "vocab_size": 16_000, "max_positions": 2048},
}
"""Shapes of Llama for study beside the presets."""
SHORT_NAMES = {"135M": "smollm2-135m", "1.1B": "tinyllama-1.1b"}


def shape_config(name: str) -> ModelConfig:
    """Return the shape that a name means: one of `SHAPES`, or a preset.

    Raises: UsageError, NotFoundError for another name, or an encoder.
    """
    config = ModelConfig(**SHAPES[name]) if name in SHAPES else preset_config(SHORT_NAMES.get(name, name))
    if config.family == "encoder":
        raise UsageError(f"`--shape {name}` is an encoder's, which writes nothing", "llmctl presets lists shapes")
    return config


def random_model(config: ModelConfig, precision: str, *, group: int = 0) -> LanguageModel:
    """Return a model of a shape with weights that mean nothing: in `DTYPES`' precisions or a scheme of `SCHEMES`.

    A scheme, with groups of another size where one is given, is for the blocks; the head is held in 8 bits then, and
    activations in float32.
    Raises: UsageError for a precision that is not known.
    """
    if precision not in DTYPES and precision not in SCHEMES:
        raise UsageError(
            f"`--scheme {precision}` is not known", f"one or more of {', '.join([*DTYPES, *SCHEMES])}, with commas"
        )
    model = without_weights(config)
    generator = torch.Generator().manual_seed(0)
    if precision in SCHEMES:
        head = QuantLinear(config.d_model, config.vocab_size, SCHEMES["int8"], bias=config.logits_bias)
        model.lm_head = head  # type: ignore[assignment]
        scheme = SCHEMES[precision]
        quantize_blocks(model, replace(scheme, group=group or scheme.group))
    dtype = DTYPES.get(precision, torch.float32)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            randomize(module, generator)
        elif parameters := list(module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.to(dtype)
            for parameter in module.parameters(recurse=False) if parameters else ():
                nn.init.ones_(parameter) if parameter.dim() == 1 else nn.init.uniform_(
                    parameter, -0.02, 0.02, generator
                )
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
    materialize_buffers(model)
    if precision not in SCHEMES:
        model.tie()
    return model.eval()


def quantize_blocks(model: LanguageModel, scheme: Scheme) -> None:
    """Put layers of random codes in the place of the matrices of the blocks."""
    for stack in model.stacks():
        for module in list(stack.layers.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and scheme.fits(child.in_features):
                    layer = QuantLinear(child.in_features, child.out_features, scheme, bias=child.bias is not None)
                    setattr(module, name, layer)
