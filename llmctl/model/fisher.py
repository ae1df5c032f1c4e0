"""What the model's own predictions lose by errors inside it: gradients of the log-probability of what it would say itself.

To second order, half the mean square of a change along that gradient is the divergence that the change makes.
Source: the Fisher information as the curvature of the divergence, Martens 2014, arXiv:1412.1193, section 6.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.model.importance import Batches
from llmctl.model.transformer import LanguageModel

CHUNK_TOKENS = 256
"""Positions whose logits exist at the same time."""

POWER = 0.5
"""Of the mean squares: a few positions have most of them, and those that one batch draws are not those of the next.

Measured on SmolLM2 in four bits: KL 0.0642 without weights, 0.0549 with a power of 1, 0.0529 with this."""

Hook = Callable[[nn.Module, Any, tuple[Tensor, ...]], None]

Weights = Mapping[str, list[Tensor]]
"""By map and batch, how much an error in its output counts at every position (N,), 1 on average."""


def token_weights(
    model: LanguageModel,
    names: Iterable[str],
    batches: Batches,
    *,
    seed: int = 0,
    done: Callable[[int], None] = lambda _: None,
) -> Weights:
    """Return how much errors in the outputs of linear maps count, position by position; the model stays as it is.

    A map that no prediction depends on has no weights. `done` is called with the number of batches that are over.
    Source: GuidedQuant, Kim et al. 2025, arXiv:2505.07004, eq. 7, with all outputs of a map in one group.
    """
    found: dict[str, list[Tensor]] = {}
    hooks = {name: squares(found.setdefault(name, [])) for name in names}
    listen(model, hooks, batches, done, seed)
    return {name: tempered(parts) for name, parts in found.items() if len(parts) == len(batches)}


def listen(
    model: LanguageModel, hooks: Mapping[str, Hook], batches: Batches, done: Callable[[int], None], seed: int
) -> int:
    """Go back through a model from every batch, hooks hearing the gradients of what comes out of maps; return the labels.

    Gradients of the parameters are not made.
    """
    generator, n_labels = torch.Generator().manual_seed(seed), 0
    handles = [model.get_submodule(name).register_full_backward_hook(hook) for name, hook in hooks.items()]
    handles += [table.register_forward_hook(begin) for table in model.modules() if isinstance(table, nn.Embedding)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval().requires_grad_(False)
    try:
        for number, batch in enumerate(batches, start=1):
            n_labels += go_back(model, batch, generator)
            done(number)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
    return n_labels


def begin(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    """Let gradients go back as far as to a table."""
    return out.requires_grad_()


def squares(parts: list[Tensor]) -> Hook:
    """Return the hook that keeps the mean squares of the gradient of a map's output, position by position."""

    def hook(_: nn.Module, __: Any, grads: tuple[Tensor, ...]) -> None:
        parts.append(grads[0].flatten(0, -2).float().square().mean(dim=1))

    return hook


def tempered(parts: list[Tensor]) -> list[Tensor]:
    """Return weights with a mean of 1."""
    mean = torch.cat(parts).mean().clamp(min=1e-30)
    powers = [(part / mean).pow(POWER) for part in parts]  # divided first, as gradients may be very small
    return [part / torch.cat(powers).mean() for part in powers]


@torch.enable_grad()
def go_back(model: LanguageModel, batch: Mapping[str, Tensor], generator: torch.Generator) -> int:
    """Go back from what the model itself would say at every label, and return how many there were.

    A sentence encoder without a head says its states, as if each were the mean of a normal distribution.
    """
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets")}
    if model.config.n_labels:
        outputs_BL = model.classify(**inputs)
        outputs_BL.backward(outwards(outputs_BL.detach(), model.config.problem, generator))
        return len(outputs_BL)
    hidden_ND = model.hidden(**inputs).flatten(0, 1)
    labels = batch.get("labels")
    if labels is None:
        draws_ND = torch.randn(hidden_ND.shape, generator=generator).to(hidden_ND)
        if "documents_BT" in batch:  # padding says nothing
            draws_ND *= batch["documents_BT"].flatten()[:, None] != 0
        hidden_ND.backward(draws_ND)
        return len(hidden_ND)
    states_LD = model.head_input(hidden_ND[(labels.flatten() >= 0).nonzero().squeeze(1)])
    weight_VD, bias = model.lm_head.weight.detach(), model.lm_head.bias
    gradients = []
    for part_LD in states_LD.detach().split(CHUNK_TOKENS):
        with torch.no_grad():
            off_LV = F.linear(part_LD, weight_VD.to(part_LD.dtype), bias).float().softmax(dim=-1)
            draws_L1 = torch.multinomial(off_LV, 1, generator=generator)
            off_LV.scatter_add_(1, draws_L1, off_LV.new_full(draws_L1.shape, -1.0))
            gradients.append((off_LV.to(weight_VD.dtype) @ weight_VD).to(states_LD.dtype))
    if gradients:
        states_LD.backward(torch.cat(gradients))
    return len(states_LD)


def outwards(outputs_BL: Tensor, problem: str, generator: torch.Generator) -> Tensor:
    """Return the gradient (B, L) of the log-probability of what a classifier would say, but for its sign."""
    if problem == "single":
        p_BL = outputs_BL.float().softmax(dim=-1)
        draws = torch.zeros_like(p_BL).scatter_(1, torch.multinomial(p_BL, 1, generator=generator), 1.0)
    elif problem == "multi":
        p_BL = outputs_BL.float().sigmoid()
        draws = torch.bernoulli(p_BL, generator=generator)
    else:
        p_BL, draws = torch.zeros_like(outputs_BL), torch.randn(outputs_BL.shape, generator=generator)
    return (p_BL - draws).to(outputs_BL.dtype)
