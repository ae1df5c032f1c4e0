"""Log probabilities of labels without materializing all logits, for losses that are functions of them."""

from typing import Any

import torch
from torch import Tensor

from llmctl.losses.cross_entropy import softmax_
from llmctl.losses.logits import add_gradients, cap_, in_one_dtype, logits


class _LinearLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias) of each label, chunk by chunk; the logits are computed again for the gradient.

    The gradient of a row is scaled by what the loss makes of it, which is only known in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        chunk_tokens: int,
        softcap: float,
    ) -> Tensor:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        found_N = hidden_ND.new_empty(len(labels_N), dtype=wide)
        buffer_CV = hidden_ND.new_empty(min(chunk_tokens, len(labels_N)), weight_VD.shape[0], dtype=wide)
        for start in range(0, len(labels_N), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            labels_C1 = labels_N[rows, None]
            logits_CV = logits(hidden_ND[rows], weight_VD, bias_V, buffer_CV[: len(labels_C1)])
            cap_(logits_CV, softcap)
            picked_C1 = logits_CV.gather(1, labels_C1)
            best_C1, sums_C1 = softmax_(logits_CV)
            found_N[rows] = (picked_C1 - best_C1 - sums_C1.log()).squeeze(1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N)
        ctx.chunk_tokens, ctx.softcap = chunk_tokens, softcap
        return found_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, labels_N = ctx.saved_tensors
        wide = grad_N.dtype
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        buffer_CV = hidden_ND.new_empty(min(ctx.chunk_tokens, len(labels_N)), weight_VD.shape[0], dtype=wide)
        for start in range(0, len(labels_N), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            labels_C1, grad_C1 = labels_N[rows, None], grad_N[rows, None]
            error_CV = logits(hidden_ND[rows], weight_VD, bias_V, buffer_CV[: len(labels_C1)])
            slope_CV = cap_(error_CV, ctx.softcap)
            softmax_(error_CV)
            # d log p(label) / d logits is the one-hot label minus the softmax.
            error_CV.mul_(-grad_C1)
            error_CV.scatter_add_(1, labels_C1, grad_C1)
            if slope_CV is not None:
                error_CV *= slope_CV
            if grad_bias_V is not None:
                grad_bias_V += error_CV.sum(dim=0)
            add_gradients(error_CV, hidden_ND[rows], weight_VD, grad_hidden_ND[rows], grad_weight_VD)
        weight_grad = None if grad_weight_VD is None else grad_weight_VD.to(weight_VD.dtype)
        bias_grad = None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_ND, weight_grad, bias_grad, None, None, None


def linear_log_probs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_tokens: int = 2048,
    softcap: float = 0.0,
) -> Tensor:
    """Return the log probability of every label in nats (N,), in at least float32.

    At most `chunk_tokens` rows of logits exist at a time. Under autocast the products run in its precision, as in
    `linear_cross_entropy`.
    Shapes: hidden (N, D), weight (V, D), labels (N,) without IGNORE.
    """
    device = hidden_ND.device.type
    hidden_ND, weight_VD = in_one_dtype(hidden_ND, weight_VD)
    with torch.autocast(device, enabled=False):
        result: Tensor = _LinearLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden_ND, weight_VD, bias_V, labels_N, chunk_tokens, softcap
        )
    return result
