"""Importance of layers, channels, heads and feed-forward units, from their activations on a few batches.

Source: Minitron, Muralidharan et al. 2024, arXiv:2407.14679, section 2.2 (channels, heads, units by their activations);
block influence: ShortGPT, Men et al. 2024, arXiv:2403.03853, eq. 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.model.attention import Attention
from llmctl.model.stack import Block, FeedForward, Stack
from llmctl.model.transformer import LanguageModel

Batches = Sequence[Mapping[str, Tensor]]


@dataclass
class Importance:
    """Sums over the positions of batches, by module name.

    channels (D,): absolute outputs of all norms. energy (D,): squared inputs of each norm. groups (K,): norm of the
    contribution of a key/value head's query heads to the residual stream. units (F,): norm of a unit's contribution.
    influence: 1 - cosine similarity between a block's input and output.
    """

    channels: Tensor
    energy: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    influence: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def rank(model: LanguageModel, batches: Batches) -> Importance:
    """Measure the importance of a model's parts on batches."""
    result = Importance(torch.zeros(model.config.d_model))
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            handles.append(module.o_proj.register_forward_pre_hook(of_heads(result, name, module)))
        elif isinstance(module, FeedForward):
            handles.append(module.down_proj.register_forward_pre_hook(of_units(result, name, module)))
        elif isinstance(module, Block):
            handles.append(module.register_forward_hook(of_block(result, name)))
        elif is_norm(name):
            handles.append(module.register_forward_hook(of_norm(result, name)))
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            read(model, batch)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return result


def read(model: LanguageModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Run a batch through a model; return the last hidden states (B, T, D), or a classifier's outputs (B, L)."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets")}
    is_classifier = model.config.n_labels and model.config.head == "text"
    return model.classify(**inputs) if is_classifier else model.hidden(**inputs)


def is_norm(name: str) -> bool:
    """Tell whether a module is a norm over the hidden channels."""
    return name.endswith("norm") and not name.endswith(("q_norm", "k_norm"))


def add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Add values to the sum of a name."""
    sums[name] = sums[name] + values if name in sums else values


def of_norm(result: Importance, name: str) -> Callable[..., None]:
    """Return a forward hook for a norm."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.shape[-1] != len(result.channels):  # of embeddings of another width
            return
        result.channels += output.float().abs().flatten(0, -2).sum(dim=0).cpu()
        add(result.energy, name, args[0].float().square().flatten(0, -2).sum(dim=0).cpu())

    return hook


def of_heads(result: Importance, name: str, attention: Attention) -> Callable[..., None]:
    """Return a forward pre-hook for an attention's output projection."""
    weight_DNH = attention.o_proj.weight.unflatten(1, (attention.n_heads, attention.head_dim)).float()

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        heads_PNH = args[0].float().flatten(0, -2).unflatten(-1, (attention.n_heads, attention.head_dim))
        # |W h| from the Gram matrix of W, without materializing every head's output.
        gram_NHH = torch.einsum("dnh,dng->nhg", weight_DNH, weight_DNH)
        squares_PN = torch.einsum("pnh,nhg,png->pn", heads_PNH, gram_NHH, heads_PNH)
        lengths_N = squares_PN.clamp(min=0).sqrt().sum(dim=0)
        add(result.groups, name, lengths_N.unflatten(0, (attention.n_kv_heads, -1)).sum(dim=1).cpu())

    return hook


def of_units(result: Importance, name: str, feed_forward: FeedForward) -> Callable[..., None]:
    """Return a forward pre-hook for a feed-forward layer's output projection."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        norms_F = feed_forward.down_proj.weight.float().norm(dim=0)
        add(result.units, name.removesuffix("mlp"), (args[0].float().abs().flatten(0, -2).sum(dim=0) * norms_F).cpu())

    return hook


def of_block(result: Importance, name: str) -> Callable[..., None]:
    """Return a forward hook for a block."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        distance = (1 - F.cosine_similarity(args[0].float(), output.float(), dim=-1)).sum()
        result.influence[name] = result.influence.get(name, 0.0) + float(distance)

    return hook


def stack_of(model: LanguageModel, prefix: str) -> Stack:
    """Return a model's stack by its prefix."""
    return model.get_submodule(prefix.rstrip("."))  # type: ignore[return-value]
