"""One state that represents a text, out of the states of its tokens."""

import torch
from torch import Tensor


def pool(states_BTD: Tensor, documents_BT: Tensor | None, pooling: str) -> Tensor:
    """Return the first, the last or the mean state of each row (B, D); positions of document 0 are padding."""
    if pooling == "first":
        return states_BTD[:, 0]
    if documents_BT is None:
        return states_BTD[:, -1] if pooling == "last" else states_BTD.mean(dim=1)
    is_real_BT = documents_BT != 0
    if pooling == "mean":
        sums_BD = (states_BTD * is_real_BT[..., None]).sum(dim=1)
        return sums_BD / is_real_BT.sum(dim=1, keepdim=True).clamp(min=1)
    positions_T = torch.arange(states_BTD.shape[1], device=states_BTD.device)
    last_B = (is_real_BT * positions_T).amax(dim=1)
    return states_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
