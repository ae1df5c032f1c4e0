"""Divergence between student and teacher predictions without materializing all logits of either.

Processes labels in chunks and computes the gradient in the forward pass, like `cross_entropy.py`. Logits are
accumulated in float32 regardless of the models' precision: a student close to its teacher learns from small
differences.
Source: Hinton et al. 2015, arXiv:1503.02531; chunked with the gradient in the forward pass after Liger,
arXiv:2410.10989.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmctl.losses.divergences import Divergence
from llmctl.losses.logits import add_gradients, cached_rows, cap_, in_one_dtype, logits
from llmctl.losses.measures import Measures
from llmctl.losses.teachers import DenseTeacher, SparseTeacher

TeacherOutputs = Sequence[DenseTeacher] | SparseTeacher


@dataclass(frozen=True)
class DivergenceSums:
    """Sums over labels, float64; `total` has a gradient.

    total: weight * divergence + (1 - weight) * cross-entropy. cross_entropy and correct (top-1): of the labels, at
    temperature 1. measures: comparison of student and teachers, if requested.
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    correct: Tensor
    measures: Measures | None = None


@dataclass(frozen=True)
class _Task:
    """The inputs of a call that do not get gradients."""

    targets: TeacherOutputs
    labels_N: Tensor
    divergence: Divergence
    weight: float
    chunk_tokens: int
    softcap: float
    measures: Measures | None
    needs: bool


class LogitBuffers:
    """Reused buffers of logits: allocating memory of this size costs as much as a pass over it."""

    def __init__(self, n_rows: int, n_vocabulary: int, like: Tensor, dtype: torch.dtype) -> None:
        self.student_CV = like.new_empty(n_rows, n_vocabulary, dtype=dtype)
        self.teacher_CV: Tensor | None = None

    def log_q(self, hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """Return the student's logits."""
        return logits(hidden_CD, weight_VD, bias_V, self.student_CV[: len(hidden_CD)])

    def log_p(
        self, teachers: Sequence[DenseTeacher], rows: slice, temperature: float, n_tokens: int | None = None
    ) -> Tensor:
        """Return the log-probabilities of the teachers' mean distribution over their first tokens: as many as the student has."""
        V = n_tokens or self.student_CV.shape[1]
        if self.teacher_CV is None:
            self.teacher_CV = self.student_CV.new_empty(len(self.student_CV), V)
        mean_CV: Tensor | None = None
        for teacher in teachers:
            hidden_CD = teacher.hidden_ND[rows]
            bias_V = None if teacher.bias_V is None else teacher.bias_V[:V]
            own_CV = self.teacher_CV[: len(hidden_CD)]
            dtype = teacher.weight_VD.dtype
            # `logits` accumulates in the teacher's own wide dtype; a float64 student with a float32 teacher needs casts.
            if own_CV.dtype not in (dtype, torch.promote_types(dtype, torch.float32)):
                own_CV.copy_(hidden_CD.to(own_CV.dtype) @ teacher.weight_VD[:V].to(own_CV.dtype).T)
                own_CV += 0 if bias_V is None else bias_V
            else:
                logits(hidden_CD.to(dtype), teacher.weight_VD[:V], bias_V, own_CV)
            cap_(own_CV, teacher.softcap)
            log_softmax_(own_CV, temperature)
            # Several teachers are averaged as probabilities, not as logits.
            if len(teachers) == 1:
                return own_CV
            part_CV = own_CV.exp() / len(teachers)
            mean_CV = part_CV if mean_CV is None else mean_CV.add_(part_CV)
        assert mean_CV is not None, "a divergence needs a teacher"
        return mean_CV.log_()


def log_softmax_(logits_CV: Tensor, temperature: float) -> Tensor:
    """Turn logits into log-probabilities, in place."""
    for own_CV in cached_rows(logits_CV):
        if temperature != 1.0:
            own_CV.div_(temperature)
        own_CV.sub_(own_CV.amax(dim=1, keepdim=True))
        own_CV.sub_(own_CV.exp().sum(dim=1, keepdim=True).log_())
    return logits_CV


def diverged(divergence: Divergence, log_q_CV: Tensor, log_p_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divergence of each row (C,) and its gradient (C, V), which overwrites log q; log p is overwritten too."""
    losses: list[Tensor] = []
    for own_CV, other_CV in zip(cached_rows(log_q_CV), cached_rows(log_p_CV), strict=True):
        losses_C, gradient_CV = divergence(own_CV, other_CV)
        own_CV.copy_(gradient_CV)
        losses.append(losses_C)
    return torch.cat(losses), log_q_CV


def sparse_divergence(log_q_CV: Tensor, targets: SparseTeacher, rows: slice) -> tuple[Tensor, Tensor]:
    """Return each row's forward KL from a sparse teacher, and its gradient; the input is overwritten.

    Without a tail: sum of p log p/q over the tokens, gradient (sum of p) q - p. With a tail: over K + 1 categories;
    all tokens outside the K share the gradient of the tail category.
    """
    ids_CK, p_CK = targets.ids_NK[rows].long(), targets.probabilities_NK[rows].to(log_q_CV.dtype)
    picked_CK = log_q_CV.gather(1, ids_CK)
    loss_C = (torch.xlogy(p_CK, p_CK) - p_CK * picked_CK).sum(dim=1)
    q_CV = log_q_CV.exp_()
    if targets.tail_N is None:
        q_CV *= p_CK.sum(dim=1, keepdim=True)
        return loss_C, q_CV.scatter_add_(1, ids_CK, -p_CK)
    tail_C = targets.tail_N[rows].to(q_CV.dtype)
    # Summed over the outside tokens rather than as 1 - sum(inside), which would cancel if little is outside.
    outside_C = q_CV.scatter(1, ids_CK, 0.0).sum(dim=1).clamp_(min=torch.finfo(q_CV.dtype).tiny)
    loss_C += torch.xlogy(tail_C, tail_C) - tail_C * outside_C.log()
    picked_CK = picked_CK.exp()
    q_CV *= (1 - tail_C / outside_C)[:, None]
    q_CV.scatter_(1, ids_CK, picked_CK)
    return loss_C, q_CV.scatter_add_(1, ids_CK, -p_CK)


class LinearLoss(torch.autograd.Function):
    """The loss of `hidden @ weight.T + bias` against teachers, with the gradient computed in the forward pass.

    chunk_loss: (logits (C, V), which it may overwrite; buffers; task; rows) -> sums (4,) and the gradient of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, task: Any, chunk_loss: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the sums of the chunks, and keep the gradients for the backward pass."""
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        N, V = hidden_ND.shape[0], weight_VD.shape[0]
        grads: list[Tensor | None] = [None, None, None]
        if task.needs:
            grads[0] = torch.empty_like(hidden_ND)
            # A frozen head, as under an adapter, needs none: that saves a third of the products.
            grads[1] = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
            grads[2] = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
        sums = torch.zeros(4, dtype=torch.float64, device=hidden_ND.device)
        buffers = LogitBuffers(min(task.chunk_tokens, N), V, hidden_ND, wide)
        for start in range(0, N, task.chunk_tokens):
            rows = slice(start, start + task.chunk_tokens)
            student_CV = buffers.log_q(hidden_ND[rows], weight_VD, bias_V)
            slope_CV = cap_(student_CV, task.softcap)
            chunk_sums, error_CV = chunk_loss(student_CV, buffers, task, rows)
            sums += chunk_sums
            if slope_CV is not None:
                error_CV *= slope_CV
            if grads[0] is not None:
                if grads[2] is not None:
                    grads[2] += error_CV.sum(dim=0)
                add_gradients(error_CV, hidden_ND[rows], weight_VD, grads[0][rows], grads[1])
        ctx.save_for_backward(*grads)
        total, divergence, nats, correct = sums
        ctx.mark_non_differentiable(divergence, nats, correct)
        return total, divergence, nats, correct

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the kept gradients, scaled."""
        scale = grad_total.to(torch.float64)
        grads = [None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in ctx.saved_tensors]
        return (*grads, None, None)


def _chunk_loss(student_CV: Tensor, buffers: LogitBuffers, task: _Task, rows: slice) -> tuple[Tensor, Tensor]:
    """Return (total, divergence, nats, correct) of a chunk, and the gradient of its logits, which are overwritten."""
    temperature, weight = task.divergence.temperature, task.weight
    labels_C1 = task.labels_N[rows, None]
    picked_C1, best_C1 = student_CV.gather(1, labels_C1), student_CV.amax(dim=1, keepdim=True)
    correct = (picked_C1 >= best_C1).sum(dtype=torch.float64)
    # Cross-entropy and measures use temperature 1. A separate copy is made only if the divergence would overwrite it.
    log_q1_CV: Tensor | None = None
    if temperature != 1.0 and (weight < 1.0 or task.measures is not None):
        log_q1_CV = log_softmax_(student_CV.clone(), 1.0)
        nats_C = -log_q1_CV.gather(1, labels_C1)
    elif temperature != 1.0:
        nats_C = (student_CV - best_C1).exp_().sum(dim=1, keepdim=True).log_() + best_C1 - picked_C1
    log_q_CV = log_softmax_(student_CV, temperature)
    if temperature == 1.0:
        nats_C = -log_q_CV.gather(1, labels_C1)
        if weight < 1.0:
            log_q1_CV = log_q_CV.clone()
    nats = nats_C.sum(dtype=torch.float64)
    log_p_CV: Tensor | None = None
    if task.measures is not None:
        assert not isinstance(task.targets, SparseTeacher), "measures need the teacher's full distribution"
        own_CV = log_q_CV if log_q1_CV is None else log_q1_CV
        log_p_CV = buffers.log_p(task.targets, rows, 1.0)
        task.measures.add(own_CV, log_p_CV, labels_C1[:, 0])
    if weight == 0.0:
        divergence, error_CV = nats.new_zeros(()), torch.zeros_like(log_q_CV)
    else:
        if isinstance(task.targets, SparseTeacher):
            losses_C, error_CV = sparse_divergence(log_q_CV, task.targets, rows)
        else:
            if log_p_CV is None or temperature != 1.0:
                log_p_CV = buffers.log_p(task.targets, rows, temperature)
            losses_C, error_CV = diverged(task.divergence, log_q_CV, log_p_CV)
        divergence = temperature**2 * losses_C.sum(dtype=torch.float64)
        # T^2 of the loss times 1/T of the logits' derivative.
        if temperature * weight != 1.0:
            error_CV *= temperature * weight
    if weight < 1.0:
        assert log_q1_CV is not None
        error_CV.add_(log_q1_CV.exp_(), alpha=1 - weight)
        error_CV.scatter_add_(1, labels_C1, error_CV.new_full(labels_C1.shape, weight - 1.0))
    total = weight * divergence + (1 - weight) * nats
    return torch.stack([total, divergence, nats, correct]), error_CV


def linear_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: TeacherOutputs,
    labels_N: Tensor,
    divergence: Divergence,
    *,
    weight: float = 1.0,
    bias_V: Tensor | None = None,
    chunk_tokens: int = 256,
    vocab_size: int | None = None,
    softcap: float = 0.0,
    measure: bool = False,
) -> DivergenceSums:
    """Return weight * T^2 * divergence + (1 - weight) * cross-entropy, summed over labels, with its components.

    At most `chunk_tokens` rows of a model's logits exist at a time. Under autocast the products run in its precision,
    accumulated in float32; softmax and sums are float32 and float64. The gradient is valid for one backward call per
    forward. vocab_size: the tokens common to both models; rows beyond it are padding and are ignored. A sparse teacher
    supports only forward KL at temperature 1. softcap: of the student's logits, see `cap_`.

    Shapes: hidden (N, D), weight (V, D), labels (N,) without IGNORE -> scalars (float64).
    """
    device = hidden_ND.device.type
    if isinstance(targets, SparseTeacher):
        assert (divergence.name, divergence.temperature) == ("fkl", 1.0), "a sparse teacher needs forward KL at T=1"
    hidden_ND, weight_VD = in_one_dtype(hidden_ND, weight_VD)
    # A slice in the graph: its backward pass pads the gradient to the full vocabulary.
    if vocab_size is not None and vocab_size < len(weight_VD):
        weight_VD, bias_V = weight_VD[:vocab_size], None if bias_V is None else bias_V[:vocab_size]
    # Decided here: inside `forward` grad mode is off, and `needs_input_grad` is true for parameters even under no_grad.
    needs = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden_ND, weight_VD, bias_V)
    )
    measures = Measures.zero(hidden_ND.device) if measure else None
    task = _Task(targets, labels_N, divergence, weight, chunk_tokens, softcap, measures, needs)
    with torch.autocast(device, enabled=False):
        total, divergence_sum, nats, correct = LinearLoss.apply(  # type: ignore[no-untyped-call]
            hidden_ND, weight_VD, bias_V, task, _chunk_loss
        )
    return DivergenceSums(total, divergence_sum, nats, correct, measures)
