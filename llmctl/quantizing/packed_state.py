"""State dicts of quantized models, as they are stored."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmctl.model.transformer import LanguageModel
from llmctl.quant.schemes import Scheme
from llmctl.quant.weight import packed
from llmctl.quantizing.calibrate import Calibrated


def small_in_16_bits(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with float32 matrices in 16 bits; vectors and packed tensors are unchanged."""
    return {
        name: tensor.half() if tensor.dim() > 1 and tensor.dtype == torch.float32 else tensor
        for name, tensor in state.items()
    }


def stored_state(model: LanguageModel, found: Calibrated, plan: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """Return the state dict to write: packed tensors, 16-bit matrices, other tensors unchanged."""
    dropped = {f"{name}.weight" for name in plan}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in dropped}
    state = small_in_16_bits(kept)
    if model.config.tie_embeddings:
        state.pop("lm_head.weight", None)
    for name, codes in found.codes.items():
        state |= {f"{name}.{part}": tensor for part, tensor in packed(codes, plan[name]).items()}
    return state
