"""Fold scale factors of a layer's inputs into the layer before, which leaves the model's function unchanged.

Source: AWQ, Lin et al. 2023, arXiv:2306.00978, section 3.2; SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, eq. 3 and 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmctl.config import ModelConfig
from llmctl.model.stack import Block, FeedForward
from llmctl.model.supports import AROUND_MATRICES, BLOCK, BLOCK_CHOICES, unsupported

CHOICES = BLOCK_CHOICES | {
    "positions": (*BLOCK_CHOICES["positions"], "disentangled"),
    "norm_position": ("pre", "post", "output", "both"),
    "activation": (*BLOCK_CHOICES["activation"], "relu2"),
}


@dataclass(frozen=True)
class Joint:
    """Linear layers that share their input, and the module that produces it, whose outputs can be scaled.

    source: a norm or a linear layer; readers: names of the linear layers in the block; repeats: how often module group of
    `width` outputs of the source occurs in the readers' input (grouped-query attention).
    """

    source: nn.Module
    readers: tuple[str, ...]
    width: int = 0
    repeats: int = 1


def joints(block: Block, config: ModelConfig) -> list[Joint]:
    """Return the joints of a block; none for a model with an unsupported setting.

    Excluded are norms whose output is also used elsewhere (post-norm) and activations that do not commute with scaling.
    """
    if unsupported(config, BLOCK | AROUND_MATRICES | {"source_vocab_size"}, CHOICES):
        return []
    joints = []
    attention, mlp = block.self_attn, block.mlp
    assert isinstance(mlp, FeedForward)
    if block.before:
        # Queries and keys of distances are read from another norm, which all layers share.
        if config.positions != "disentangled":
            joints.append(Joint(block.input_layernorm, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")))
        if block.cross:
            joints.append(Joint(block.cross_attention_layernorm, ("cross_attn.q_proj",)))
        readers = ("mlp.gate_proj", "mlp.up_proj") if mlp.gated else ("mlp.up_proj",)
        joints.append(Joint(block.post_attention_layernorm, readers))
    for name, module in (("self_attn", attention), *((("cross_attn", block.cross_attn),) if block.cross else ())):
        joints.append(Joint(module.v_proj, (f"{name}.o_proj",), module.head_dim, module.n_heads // module.n_kv_heads))
    if is_linear_behind(mlp):
        joints.append(Joint(mlp.up_proj, ("mlp.down_proj",)))
    return joints


def is_linear_behind(mlp: FeedForward) -> bool:
    """Tell whether scaling up_proj's outputs scales down_proj's inputs: gated, or ReLU (positively homogeneous)."""
    return mlp.gated or mlp.activation == "relu"


def shared_factors(factors_I: Tensor, joint: Joint) -> Tensor:
    """Make factors (I,) equal among the query heads of a group: their geometric mean."""
    if joint.repeats == 1:
        return factors_I
    grouped = factors_I.view(-1, joint.repeats, joint.width)
    return grouped.log().mean(dim=1, keepdim=True).exp().expand_as(grouped).reshape(-1)


@torch.no_grad()
def fold(joint: Joint, readers: Sequence[nn.Linear], factors_I: Tensor) -> None:
    """Multiply the readers' columns by factors (I,), positive and from `shared_factors`; divide the source by them."""
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
