"""Losses between a student and a teacher with another vocabulary.

`project` compares distributions over events (distilling/vocabulary_map.py) and `uld` compares sorted probabilities; both work
on chunks of labels like `linear_divergence.py`. `alm` compares the likelihoods of chunks of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmctl.losses.divergences import Divergence, centered
from llmctl.losses.linear_divergence import DivergenceSums, LinearLoss, LogitBuffers, diverged, log_softmax_
from llmctl.losses.logits import in_one_dtype
from llmctl.losses.teachers import DenseTeacher

TINY = 1e-30
"""The probability that stands for none, so that its logarithm is finite."""


@dataclass(frozen=True)
class Events:
    """Which event each token is: student (V,) and teacher (W,), -1 for tokens that are none; n: their number.

    shared: the student's tokens that share their event with others (M,). first: a token of the student of each event (E,).
    told: the teacher's tokens that are some event (K,).
    """

    student_V: Tensor
    teacher_W: Tensor
    n: int
    shared_M: Tensor
    first_E: Tensor
    told_K: Tensor

    @classmethod
    def of(cls, student_V: Tensor, teacher_W: Tensor, n: int) -> "Events":
        """Return events with what is the same for every chunk of labels."""
        shared_M = (torch.bincount(student_V, minlength=n)[student_V] > 1).nonzero().squeeze(1)
        first_E = torch.zeros(n, dtype=torch.long, device=student_V.device)
        first_E[student_V] = torch.arange(len(student_V), device=student_V.device)
        return cls(student_V, teacher_W, n, shared_M, first_E, (teacher_W >= 0).nonzero().squeeze(1))

    def log_student(self, log_q_CV: Tensor) -> Tensor:
        """Return the log-probabilities of the events (C, E) of a student's tokens (C, V)."""
        log_q_CE = log_q_CV[:, self.first_E]
        if len(self.shared_M):
            events_M = self.student_V[self.shared_M]
            sums_CE = torch.zeros_like(log_q_CE).index_add_(1, events_M, log_q_CV[:, self.shared_M].exp())
            log_q_CE[:, events_M] = sums_CE[:, events_M].clamp_min(TINY).log()
        return log_q_CE

    def teacher(self, log_p_CW: Tensor) -> Tensor:
        """Return the probabilities of the events (C, E) of a teacher's tokens (C, W); they may sum to less than one."""
        # Transposed: rows are added much faster than columns.
        p_KC = log_p_CW.T[self.told_K].exp_()
        p_EC = torch.zeros(self.n, len(log_p_CW), dtype=p_KC.dtype, device=p_KC.device)
        return p_EC.index_add_(0, self.teacher_W[self.told_K], p_KC).T.contiguous()


@dataclass(frozen=True)
class Inside:
    """A label inside a token of the teacher: the teacher's tokens that continue what is written, and their events."""

    tokens_K: Tensor
    events_K: Tensor


@dataclass(frozen=True)
class AcrossTeacher:
    """Teachers' outputs at N labels of a student with another vocabulary.

    teachers: hidden states at the places that correspond. has_place (N,): whether there is one; other labels are learned from
    the data alone. inside: labels whose place is before a token of the teacher that they are a part of. beyond_tokens,
    beyond_events (N,): the teacher's token that the text continues with and its event, where the label goes on beyond it: its
    probability says nothing of this event, and is learned from the data; -1 elsewhere.
    """

    teachers: Sequence[DenseTeacher]
    events: Events
    has_place_N: Tensor
    inside: dict[int, Inside]
    beyond_tokens_N: Tensor
    beyond_events_N: Tensor


@dataclass(frozen=True)
class _Task:
    """The inputs of a call that do not get gradients."""

    targets: AcrossTeacher
    labels_N: Tensor
    divergence: Divergence
    weight: float
    chunk_tokens: int
    softcap: float
    needs: bool
    is_sorted: bool


def _event_targets(task: _Task, log_p_CW: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Return the teacher's probabilities of events (C, E), which sum to one, and what share of its own it tells (C,)."""
    targets = task.targets
    p_CE = targets.events.teacher(log_p_CW)
    scale_C = torch.ones_like(p_CE[:, 0])
    for place in range(rows.start, rows.start + len(p_CE)):
        found = targets.inside.get(place)
        if found is None:
            continue
        p_K = log_p_CW[place - rows.start, found.tokens_K].exp()
        told_K = found.events_K >= 0
        row_E = torch.zeros_like(p_CE[0]).index_add_(0, found.events_K[told_K], p_K[told_K])
        # Conditional on what is already written.
        scale_C[place - rows.start] = 1 / p_K.sum().clamp_min(TINY)
        p_CE[place - rows.start] = row_E * scale_C[place - rows.start]
    beyond_C = targets.beyond_tokens_N[rows]
    found_B = (beyond_C >= 0).nonzero().squeeze(1)
    if len(found_B):
        events_B = targets.beyond_events_N[rows][found_B]
        left_B = p_CE[found_B, events_B] - log_p_CW[found_B, beyond_C[found_B]].exp() * scale_C[found_B]
        p_CE[found_B, events_B] = left_B.clamp_min(0.0)
    known_C = p_CE.sum(dim=1).clamp(max=1.0)
    p_CE /= known_C.clamp_min(TINY)[:, None]
    return p_CE, known_C * targets.has_place_N[rows]


def _projected(log_q_CV: Tensor, task: _Task, log_p_CW: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence over events (C,), its gradient (C, V), and the share of the teacher's prediction it uses (C,)."""
    events, labels_C1 = task.targets.events, task.labels_N[rows, None]
    p_CE, known_C = _event_targets(task, log_p_CW, rows)
    log_q_CE = events.log_student(log_q_CV)
    # Of the tokens of one event the teacher says nothing: which of them comes next is learned from the data.
    inner_C1 = log_q_CE.gather(1, events.student_V[labels_C1]) - log_q_CV.gather(1, labels_C1)
    log_share_CM = log_q_CV[:, events.shared_M] - log_q_CE[:, events.student_V[events.shared_M]]
    losses_C, grad_CE = diverged(task.divergence, log_q_CE, p_CE.clamp_min_(TINY).log_())
    # d event logit / d token logit is the token's share of its event.
    grad_CV = grad_CE[:, events.student_V]
    if len(events.shared_M):
        share_CM = log_share_CM.exp_()
        grad_CV[:, events.shared_M] *= share_CM
        is_mine_CM = events.student_V[events.shared_M] == events.student_V[labels_C1]
        grad_CV[:, events.shared_M] += share_CM * is_mine_CM
        is_shared_C1 = is_mine_CM.any(dim=1, keepdim=True)
        grad_CV.scatter_add_(1, labels_C1, -is_shared_C1.to(grad_CV.dtype))
        losses_C = losses_C + inner_C1.squeeze(1) * is_shared_C1.squeeze(1)
    return losses_C * known_C, grad_CV * known_C[:, None], known_C


def _sorted(log_q_CV: Tensor, task: _Task, log_p_CW: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return the L1 distance of sorted probabilities (C,), its gradient (C, V), and where there is a teacher (C,)."""
    q_CV = log_q_CV.exp()
    sorted_CV, order_CV = q_CV.sort(dim=1, descending=True)
    p_CW = log_p_CW.exp().sort(dim=1, descending=True).values
    V, W = q_CV.shape[1], p_CW.shape[1]
    n = min(V, W)
    gap_CV = sorted_CV.clone()
    gap_CV[:, :n] -= p_CW[:, :n]
    losses_C = gap_CV.abs().sum(dim=1) + p_CW[:, n:].sum(dim=1)
    slope_CV = torch.empty_like(q_CV).scatter_(1, order_CV, gap_CV.sign_())
    at_place = torch.tensor([place not in task.targets.inside for place in range(rows.start, rows.start + len(q_CV))])
    known_C = (task.targets.has_place_N[rows] & at_place.to(q_CV.device)).to(q_CV.dtype)
    return losses_C * known_C, centered(q_CV, slope_CV).mul_(known_C[:, None]), known_C


def _chunk(student_CV: Tensor, buffers: LogitBuffers, task: Any, rows: slice) -> tuple[Tensor, Tensor]:
    """Return (total, divergence, nats, correct) of a chunk, and the gradient of its logits."""
    temperature, weight = task.divergence.temperature, task.weight
    labels_C1 = task.labels_N[rows, None]
    picked_C1, best_C1 = student_CV.gather(1, labels_C1), student_CV.amax(dim=1, keepdim=True)
    correct = (picked_C1 >= best_C1).sum(dtype=torch.float64)
    log_q1_CV = log_softmax_(student_CV.clone(), 1.0)
    nats_C = -log_q1_CV.gather(1, labels_C1).squeeze(1)
    log_q_CV = log_q1_CV if temperature == 1.0 else log_softmax_(student_CV, temperature)
    log_p_CW = buffers.log_p(task.targets.teachers, rows, temperature, len(task.targets.events.teacher_W))
    kind = _sorted if task.is_sorted else _projected
    losses_C, error_CV, known_C = kind(log_q_CV, task, log_p_CW, rows)
    error_CV *= temperature * weight
    divergence = temperature**2 * losses_C.sum(dtype=torch.float64)
    # Where the teacher says nothing, or less than all, the rest is learned from the data.
    rest_C = 1 - weight * known_C
    error_CV += log_q1_CV.exp_() * rest_C[:, None]
    error_CV.scatter_add_(1, labels_C1, -rest_C[:, None])
    total = weight * divergence + (rest_C * nats_C).sum(dtype=torch.float64)
    return torch.stack([total, divergence, nats_C.sum(dtype=torch.float64), correct]), error_CV


def across_divergence(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets: AcrossTeacher,
    labels_N: Tensor,
    divergence: Divergence,
    *,
    weight: float = 1.0,
    bias_V: Tensor | None = None,
    chunk_tokens: int = 256,
    softcap: float = 0.0,
    is_sorted: bool = False,
) -> DivergenceSums:
    """Return the divergence from a teacher with another vocabulary mixed with cross-entropy, summed over labels.

    is_sorted: compare sorted probabilities instead of events (universal logit distillation, Boizard et al. 2024,
    arXiv:2402.12030, eq. 3). The student's vocabulary is that of the events: rows of the head beyond it are padding.

    Shapes: hidden (N, D), weight (V, D), labels (N,) without IGNORE -> scalars (float64).
    """
    n_tokens = len(targets.events.student_V)
    if n_tokens < len(weight_VD):
        weight_VD, bias_V = weight_VD[:n_tokens], None if bias_V is None else bias_V[:n_tokens]
    device = hidden_ND.device.type
    hidden_ND, weight_VD = in_one_dtype(hidden_ND, weight_VD)
    needs = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden_ND, weight_VD, bias_V)
    )
    task = _Task(targets, labels_N, divergence, weight, chunk_tokens, softcap, needs, is_sorted)
    with torch.autocast(device, enabled=False):
        found = LinearLoss.apply(hidden_ND, weight_VD, bias_V, task, _chunk)  # type: ignore[no-untyped-call]
    return DivergenceSums(*found)


def chunk_likelihood(
    log_q_N: Tensor, log_p_M: Tensor, chunk_of_N: Tensor, chunk_of_M: Tensor, n_chunks: int, temperature: float = 1.0
) -> Tensor:
    """Return the KL divergence of two Bernoulli distributions per chunk (X,): that a text comes next, or another one.

    The probability of a chunk is that of its tokens, p^(1/temperature), times temperature as a loss. Chunks are numbered from
    0; tokens of none have -1.
    Source: ALM, Minixhofer et al. 2025, arXiv:2503.20083, eqs. 5 to 7.

    Shapes: log-probabilities of the student's (N,) and the teacher's tokens (M,), and the chunk of each -> (X,).
    """

    def of_chunks(logs: Tensor, chunks: Tensor) -> Tensor:
        told = chunks >= 0
        zero = torch.zeros(n_chunks, dtype=logs.dtype, device=logs.device)
        return zero.index_add(0, chunks[told], logs[told])

    largest = -1e-6  # a certain chunk has a finite complement
    log_q_X = (of_chunks(log_q_N, chunk_of_N) / temperature).clamp(max=largest)
    log_p_X = (of_chunks(log_p_M, chunk_of_M) / temperature).clamp(max=largest)
    p_X = log_p_X.exp()
    rest_X = (log1mexp(log_p_X) - log1mexp(log_q_X)) * (1 - p_X)
    return temperature * (p_X * (log_p_X - log_q_X) + rest_X)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for negative x without cancellation (Maechler 2012)."""
    near = x > -0.6931
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )
