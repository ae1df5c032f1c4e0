"""Move scales from one layer into the one before it, so that the model computes the same with weights easier to round.

Source: AWQ, Lin et al. 2023, arXiv:2306.00978, section 3.2; SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, eq. 3 and 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmctl.config import ModelConfig
from llmctl.model.stack import Block, FeedForward
from llmctl.model.supports import BLOCK, BLOCK_CHOICES, unsupported


@dataclass(frozen=True)
class Joint:
    """Linear maps that read the same inputs, and what makes these inputs, whose outputs can be scaled.

    source: a norm or a linear map; readers: names of the maps inside the block; repeats: how many times over the readers see
    each group of `width` outputs of the source (grouped-query attention).
    """

    source: nn.Module
    readers: tuple[str, ...]
    width: int = 0
    repeats: int = 1


def joints(block: Block, config: ModelConfig) -> list[Joint]:
    """Return the joints of a block; where a norm's output also goes past the readers, or an activation bends, there is none.

    A model with a switch that is not known here has none.
    """
    if unsupported(config, BLOCK, BLOCK_CHOICES):
        return []
    found = []
    attention, mlp = block.self_attn, block.mlp
    if block.pre:
        found.append(Joint(block.input_layernorm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")))
        if block.cross:
            found.append(Joint(block.cross_attention_layernorm, ("cross_attn.q_proj",)))
        readers = ("mlp.gate_proj", "mlp.up_proj") if mlp.gated else ("mlp.up_proj",)
        found.append(Joint(block.post_attention_layernorm, readers))
    for name, each in (("self_attn", attention), *((("cross_attn", block.cross_attn),) if block.cross else ())):
        found.append(Joint(each.v_proj, (f"{name}.o_proj",), each.head_dim, each.n_heads // each.n_kv_heads))
    if is_linear_behind(mlp):
        found.append(Joint(mlp.up_proj, ("mlp.down_proj",)))
    return found


def is_linear_behind(mlp: FeedForward) -> bool:
    """Tell whether a factor on what goes up comes out in front of what goes down."""
    return mlp.gated or mlp.activation == "relu"


def shared_factors(factors_I: Tensor, joint: Joint) -> Tensor:
    """Return factors (I,) that heads of one group have in common: their geometric mean."""
    if joint.repeats == 1:
        return factors_I
    grouped = factors_I.view(-1, joint.repeats, joint.width)
    return grouped.log().mean(dim=1, keepdim=True).exp().expand_as(grouped).reshape(-1)


@torch.no_grad()
def fold(joint: Joint, readers: Sequence[nn.Linear], factors_I: Tensor) -> None:
    """Multiply the columns of the readers by factors (I,), positive and shared as above, and divide the source by them."""
    for reader in readers:
        reader.weight.mul_(factors_I)
    outputs_O = factors_I
    if joint.repeats > 1:
        outputs_O = factors_I.view(-1, joint.repeats, joint.width)[:, 0].reshape(-1)
    weight: Tensor = joint.source.weight  # type: ignore[assignment]
    weight.div_(outputs_O if weight.dim() == 1 else outputs_O[:, None])
    bias: Tensor | None = getattr(joint.source, "bias", None)
    if bias is not None:
        bias.div_(outputs_O)
