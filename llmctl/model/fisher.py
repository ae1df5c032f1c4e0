"""Fisher information: how much errors in activations change the model's predictions.

It is estimated from gradients of the log-probability of labels sampled from the model itself. To second order, the KL
divergence caused by a change is half the mean square of its product with that gradient.
Source: the Fisher information as the curvature of the divergence, Martens 2014, arXiv:1412.1193, section 6.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl.losses.cross_entropy import softmax_
from llmctl.losses.logits import cached_rows, cap_
from llmctl.model.importance import Batches
from llmctl.model.transformer import LanguageModel

PART_TOKENS = 512
"""Tokens that go back at a time: more are hardly faster, and what a backward pass keeps grows with them."""

CHUNK_TOKENS = 256
"""The number of positions whose logits exist at a time."""

POWER = 0.5
"""Exponent on the mean squares, which a few positions dominate, different ones in every batch.

Measured on SmolLM2 at 4 bits: KL 0.0642 without weights, 0.0549 with exponent 1, 0.0529 with this one."""

Hook = Callable[[nn.Module, Any, tuple[Tensor, ...]], None]

Weights = Mapping[str, list[Tensor]]
"""Linear layer -> per batch, the weight of an output error at every position (N,), with mean 1."""


def token_weights(
    model: LanguageModel,
    names: Iterable[str],
    batches: Batches,
    *,
    seed: int = 0,
    done: Callable[[int], None] = lambda _: None,
) -> Weights:
    """Return the importance of every position for the output errors of linear layers; the model is not changed.

    A layer that no prediction depends on has no weights. `done` is called with the number of finished batches.
    Source: GuidedQuant, Kim et al. 2025, arXiv:2505.07004, eq. 7, with all outputs of a layer in one group.
    """
    parts: dict[str, list[Tensor]] = {}
    hooks = {name: squares(parts.setdefault(name, [])) for name in names}
    listen(model, hooks, batches, done, seed)
    counts = [len(list(parts_of(model, batch))) for batch in batches]
    return {name: joined(normalized(own), counts) for name, own in parts.items() if len(own) == sum(counts)}


def listen(
    model: LanguageModel, hooks: Mapping[str, Hook], batches: Batches, done: Callable[[int], None], seed: int
) -> int:
    """Run a backward pass for every batch, with hooks on the output gradients of linear layers; return the label count.

    Gradients of parameters are not computed.
    """
    generator, n_labels = torch.Generator().manual_seed(seed), 0
    # Without trainable parameters, the graph must start at the embeddings' outputs.
    handles = [model.get_submodule(name).register_full_backward_hook(hook) for name, hook in hooks.items()]
    handles += [
        table.register_forward_hook(require_grad) for table in model.modules() if isinstance(table, nn.Embedding)
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval().requires_grad_(False)
    try:
        for number, batch in enumerate(batches, start=1):
            for part in parts_of(model, batch):
                n_labels += backward_from_samples(model, part, generator)
            done(number)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
    return n_labels


def parts_of(model: LanguageModel, batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Split a batch into parts of as many rows as have `PART_TOKENS` tokens, at least one.

    Not if attention also projects the distances of a batch, which would then be projected once per part.
    """
    n_rows = max(1, PART_TOKENS // batch["input_ids_BT"].shape[1])
    if model.config.positions == "disentangled":
        n_rows = len(batch["input_ids_BT"])
    for rows in zip(*(tensor.split(n_rows) for tensor in batch.values()), strict=True):
        yield dict(zip(batch, rows, strict=True))


def require_grad(_: nn.Module, __: Any, out: Tensor) -> Tensor:
    """Make an embedding's output require a gradient (a forward hook)."""
    return out.requires_grad_()


def squares(parts: list[Tensor]) -> Hook:
    """Return a hook that appends the mean square of a layer's output gradient at every position."""

    def hook(_: nn.Module, __: Any, grads: tuple[Tensor, ...]) -> None:
        parts.append(grads[0].flatten(0, -2).float().square().mean(dim=1))

    return hook


def joined(parts: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Join the parts of every batch, of which there are `counts`."""
    rest = iter(parts)
    return [torch.cat(list(islice(rest, count))) for count in counts]


def normalized(parts: list[Tensor]) -> list[Tensor]:
    """Apply the exponent and scale the weights to a mean of 1."""
    mean = torch.cat(parts).mean().clamp(min=1e-30)
    powers = [(part / mean).pow(POWER) for part in parts]  # divided first: gradients may be close to underflow
    return [part / torch.cat(powers).mean() for part in powers]


@torch.enable_grad()
def backward_from_samples(model: LanguageModel, batch: Mapping[str, Tensor], generator: torch.Generator) -> int:
    """Backpropagate the log-probability of labels sampled from the model; return their number.

    An encoder without a head, or with one that finds answers, is treated as predicting its states, as means of unit normal
    distributions.
    """
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name not in ("labels", "targets")}
    has_head = model.config.n_labels > 0
    if has_head and model.config.head == "text":
        outputs_BL = model.classify(**inputs)
        outputs_BL.backward(classifier_gradient(outputs_BL.detach(), model.config.problem, generator))
        return len(outputs_BL)
    if has_head and model.config.head == "tokens":
        outputs_NL = model.label_tokens(**inputs).flatten(0, 1)
        outputs_NL.backward(without_padding(classifier_gradient(outputs_NL.detach(), "single", generator), batch))
        return len(outputs_NL)
    hidden_ND = model.hidden(**inputs).flatten(0, 1)
    labels = batch.get("labels")
    if labels is None or has_head:
        noise_ND = torch.randn(hidden_ND.shape, generator=generator).to(hidden_ND)
        hidden_ND.backward(without_padding(noise_ND, batch))
        return len(hidden_ND)
    states_LD = model.head_input(hidden_ND[(labels.flatten() >= 0).nonzero().squeeze(1)])
    weight_VD, bias = model.lm_head.weight.detach(), model.lm_head.bias
    is_narrow = torch.is_autocast_enabled(states_LD.device.type)
    dtype = torch.get_autocast_dtype(states_LD.device.type) if is_narrow else states_LD.dtype
    weight_VD = weight_VD.to(dtype)  # once, not for every chunk
    gradients = []
    for part_LD in states_LD.detach().split(CHUNK_TOKENS):
        with torch.no_grad():
            # The gradient of the cross-entropy with sampled labels: softmax minus one-hot.
            logits_LV = F.linear(part_LD.to(dtype), weight_VD, bias).float()
            slope_LV = cap_(logits_LV, model.config.logits_softcap)
            softmax_(logits_LV)
            error_LV = logits_LV
            samples_L1 = torch.cat([drawn(own_LV, generator) for own_LV in cached_rows(error_LV)])
            error_LV.scatter_add_(1, samples_L1, error_LV.new_full(samples_L1.shape, -1.0))
            error_LV = error_LV if slope_LV is None else error_LV * slope_LV
            gradients.append((error_LV.to(dtype) @ weight_VD).to(states_LD.dtype))
    if gradients:
        states_LD.backward(torch.cat(gradients))
    return len(states_LD)


def drawn(p_NV: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a class (N, 1) from each row of probabilities: one random number each, where torch.multinomial takes one a class."""
    sums_NV = p_NV.cumsum(dim=-1)
    # At least the smallest number above 0: a class of probability 0 at the beginning is never drawn.
    points_N1 = torch.rand(len(p_NV), 1, generator=generator, dtype=p_NV.dtype).clamp_(min=torch.finfo(p_NV.dtype).tiny)
    return torch.searchsorted(sums_NV, points_N1 * sums_NV[:, -1:])


def without_padding(gradient_ND: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return gradients of positions, zero at padding, which predicts nothing."""
    documents_BT = batch.get("documents_BT")
    return gradient_ND if documents_BT is None else gradient_ND * (documents_BT.flatten()[:, None] != 0)


def classifier_gradient(outputs_BL: Tensor, problem: str, generator: torch.Generator) -> Tensor:
    """Return the gradient (B, L) of the negative log-probability of labels sampled from a classifier's outputs."""
    if problem == "single":
        p_BL = outputs_BL.float().softmax(dim=-1)
        samples = torch.zeros_like(p_BL).scatter_(1, drawn(p_BL, generator), 1.0)
    elif problem == "multi":
        p_BL = outputs_BL.float().sigmoid()
        samples = torch.bernoulli(p_BL, generator=generator)
    else:
        p_BL, samples = torch.zeros_like(outputs_BL), torch.randn(outputs_BL.shape, generator=generator)
    return (p_BL - samples).to(outputs_BL.dtype)
