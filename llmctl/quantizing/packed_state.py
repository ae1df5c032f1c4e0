"""State dicts of quantized models as files hold them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmctl.model.transformer import LanguageModel
from llmctl.quant.schemes import Scheme
from llmctl.quant.weight import packed
from llmctl.quantizing.calibrate import Calibrated


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
