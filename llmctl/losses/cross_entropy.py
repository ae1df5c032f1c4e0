"""Cross-entropy over a vocabulary without materializing all logits."""

from typing import Any

import torch
from torch import Tensor

from llmctl.losses.logits import add_gradients, cached_rows, cap_, in_one_dtype, logits


def softmax_(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into probabilities in place; return each row's largest logit, and its sum of exponentials after that (C, 1)."""
    found: list[tuple[Tensor, Tensor]] = []
    for own_CV in cached_rows(logits_CV):
        best_C1 = own_CV.amax(dim=1, keepdim=True)
        sums_C1 = own_CV.sub_(best_C1).exp_().sum(dim=1, keepdim=True)
        own_CV.div_(sums_C1)
        found.append((best_C1, sums_C1))
    best, sums = zip(*found, strict=True)
    return torch.cat(best), torch.cat(sums)


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T + bias`, chunk by chunk, with the gradient computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        chunk_tokens: int,
        smoothing: float,
        softcap: float,
        needs: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs else None
        # A frozen head, as under an adapter, needs none: that saves a third of the products.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs and ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if needs and bias_V is not None else None
        total = hidden_ND.new_zeros((), dtype=torch.float64)
        n_correct = torch.zeros((), dtype=torch.float64, device=hidden_ND.device)
        # Allocated once and updated in place: allocating memory of this size costs as much as a pass over it.
        buffer_CV = hidden_ND.new_empty(min(chunk_tokens, hidden_ND.shape[0]), weight_VD.shape[0], dtype=wide)
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            labels_C = labels_N[rows, None]
            logits_CV = buffer_CV[: len(labels_C)]
            logits(hidden_ND[rows], weight_VD, bias_V, logits_CV)
            slope_CV = cap_(logits_CV, softcap)
            picked_C1 = logits_CV.gather(1, labels_C)
            target_C1 = picked_C1
            if smoothing:
                target_C1 = (1 - smoothing) * picked_C1 + smoothing * logits_CV.mean(dim=1, keepdim=True)
            best_C1, sums_C1 = softmax_(logits_CV)
            n_correct += (picked_C1 >= best_C1).sum()
            total += (sums_C1.log() + best_C1 - target_C1).sum(dtype=torch.float64)
            if grad_hidden_ND is None:
                continue
            # The gradient with respect to the logits: softmax minus the (smoothed) one-hot target.
            error_CV = logits_CV
            error_CV.scatter_add_(1, labels_C, error_CV.new_full(labels_C.shape, smoothing - 1.0))
            if smoothing:
                error_CV -= smoothing / error_CV.shape[1]
            if slope_CV is not None:
                error_CV *= slope_CV
            if grad_bias_V is not None:
                grad_bias_V += error_CV.sum(dim=0)
            add_gradients(error_CV, hidden_ND[rows], weight_VD, grad_hidden_ND[rows], grad_weight_VD)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
        ctx.mark_non_differentiable(n_correct)
        return total, n_correct

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        scale = grad_total.to(torch.float64)
        grads = [None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in (hidden, weight, bias)]
        return (*grads, None, None, None, None, None)


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_tokens: int = 2048,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the summed negative log-likelihood of the labels, in nats, and the number of correct top-1 predictions.

    At most `chunk_tokens` rows of logits exist at a time. Under autocast the products run in its precision and are
    accumulated in float32; softmax and sums are float32 and float64. The gradient is valid for one backward call per
    forward. With smoothing s the label has probability 1 - s, and s is spread evenly over the vocabulary (Szegedy et
    al. 2015, arXiv:1512.00567, section 7). softcap: see `cap_`; 0 is none.

    Shapes: hidden (N, D), weight (V, D), labels (N,) without IGNORE -> two scalars (float64).
    Source: the textbook loss; chunked with the gradient in the forward pass after Liger, arXiv:2410.10989.
    """
    device = hidden_ND.device.type
    hidden_ND, weight_VD = in_one_dtype(hidden_ND, weight_VD)
    # Decided here: inside `forward` grad mode is off, and `needs_input_grad` is true for parameters even under no_grad.
    needs = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden_ND, weight_VD, bias_V)
    )
    with torch.autocast(device, enabled=False):
        result: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_ND, weight_VD, bias_V, labels_N, chunk_tokens, label_smoothing, softcap, needs
        )
    return result
