"""Losses between models with different vocabularies, against the same written out with all logits."""

import pytest
import torch

from llmctl.losses.across import (
    AcrossTeacher,
    Events,
    Inside,
    across_divergence,
    chunk_likelihood,
    log1mexp,
)
from llmctl.losses.divergences import Divergence
from llmctl.losses.linear_divergence import linear_divergence
from llmctl.losses.teachers import DenseTeacher
from llmctl.tables.losses import DIVERGENCES

N, D, V, W = 7, 6, 11, 13


def inputs(seed: int = 0, n_student: int = V, n_teacher: int = W):
    """Return a student's hidden states and head, a teacher, and labels, all in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(N, D).requires_grad_(), random(n_student, D).requires_grad_()
    teacher = DenseTeacher(random(N, D), random(n_teacher, D))
    return hidden, weight, teacher, torch.randint(0, n_student, (N,), generator=generator)


def targets(teacher, student, other, n, *, has_place=None, inside=None, beyond=None):
    events = Events.of(torch.tensor(student), torch.tensor(other), n)
    places = torch.ones(N, dtype=torch.bool) if has_place is None else torch.tensor(has_place)
    tokens, kinds = torch.full((N,), -1), torch.full((N,), -1)
    for row, (token, event) in (beyond or {}).items():
        tokens[row], kinds[row] = token, event
    return AcrossTeacher([teacher], events, places, inside or {}, tokens, kinds)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("weight", [1.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_same_vocabulary_in_another_order_gives_the_same_loss(name, weight, temperature):
    hidden, weight_VD, teacher, labels = inputs(n_teacher=V)
    divergence = Divergence(name, temperature=temperature, taid_share=0.7)
    same = linear_divergence(hidden, weight_VD, [teacher], labels, divergence, weight=weight, chunk_tokens=3)
    wanted = torch.autograd.grad(same.total, (hidden, weight_VD))
    order = torch.randperm(V, generator=torch.Generator().manual_seed(3))
    moved = DenseTeacher(teacher.hidden_ND, teacher.weight_VD[order])
    found = across_divergence(
        hidden,
        weight_VD,
        targets(moved, list(range(V)), order.tolist(), V),
        labels,
        divergence,
        weight=weight,
        chunk_tokens=3,
    )
    assert found.total.item() == pytest.approx(same.total.item(), rel=1e-9)
    assert found.cross_entropy.item() == pytest.approx(same.cross_entropy.item(), rel=1e-9)
    assert found.correct == same.correct
    for gradient, expected in zip(torch.autograd.grad(found.total, (hidden, weight_VD)), wanted, strict=True):
        assert torch.allclose(gradient, expected, atol=1e-8)


STUDENT = [0, 1, 2, 3, 4, 5, 6, 7, 2, 2, 5]
OTHER = [0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 3, -1, -1]


def plain(hidden, weight_VD, teacher, labels, *, mix=1.0):
    """Return the same written out: forward KL over events, what is inside an event from the data."""
    log_q = (hidden @ weight_VD.T).log_softmax(1)
    p = (teacher.hidden_ND @ teacher.weight_VD.T).softmax(1)
    p_events = torch.zeros(N, 8, dtype=torch.float64).index_add(1, torch.tensor(OTHER[:-2]), p[:, :-2])
    known = p_events.sum(1)
    p_events = p_events / known[:, None]
    q_events = torch.zeros(N, 8, dtype=torch.float64).index_add(1, torch.tensor(STUDENT), log_q.exp())
    divergence = (p_events * (p_events.log() - q_events.log())).sum(1)
    label_event = torch.tensor(STUDENT)[labels]
    rows = torch.arange(N)
    divergence = divergence + q_events.log()[rows, label_event] - log_q[rows, labels]
    nats = -log_q[rows, labels]
    return (mix * known * divergence + (1 - mix * known) * nats).sum()


@pytest.mark.parametrize("mix", [1.0, 0.3])
def test_events_shared_by_tokens_give_the_loss_and_gradient_written_out(mix):
    hidden, weight_VD, teacher, labels = inputs(4)
    wanted = plain(hidden, weight_VD, teacher, labels, mix=mix)
    found = across_divergence(
        hidden, weight_VD, targets(teacher, STUDENT, OTHER, 8), labels, Divergence(), weight=mix, chunk_tokens=3
    )
    assert found.total.item() == pytest.approx(wanted.item(), rel=1e-9)
    pairs = zip(
        torch.autograd.grad(found.total, (hidden, weight_VD)),
        torch.autograd.grad(wanted, (hidden, weight_VD)),
        strict=True,
    )
    for gradient, expected in pairs:
        assert torch.allclose(gradient, expected, atol=1e-9)


def test_inside_a_token_of_the_teacher_its_continuations_are_the_target():
    hidden, weight_VD, teacher, labels = inputs(5)
    inside = {2: Inside(torch.tensor([3, 9, 10]), torch.tensor([6, 1, -1]))}
    found = across_divergence(
        hidden,
        weight_VD,
        targets(
            teacher,
            list(range(V)),
            [*range(V), -1, -1],
            V,
            has_place=[place == 2 for place in range(N)],
            inside=inside,
        ),
        labels,
        Divergence(),
        chunk_tokens=4,
    )
    log_q = (hidden @ weight_VD.T).log_softmax(1)
    p = (teacher.hidden_ND @ teacher.weight_VD.T).softmax(1)[2, [3, 9, 10]]
    known = (p[:2].sum() / p.sum()).item()
    target = p[:2] / p[:2].sum()
    nats = -log_q[torch.arange(N), labels]
    divergence = (target * (target.log() - log_q[2, [6, 1]])).sum()
    # Everything else, and what the teacher does not tell, is learned from the data.
    wanted = nats.sum() - nats[2] + known * divergence + (1 - known) * nats[2]
    assert found.total.item() == pytest.approx(wanted.item(), rel=1e-9)
    for gradient, expected in zip(
        torch.autograd.grad(found.total, (hidden, weight_VD)),
        torch.autograd.grad(wanted, (hidden, weight_VD)),
        strict=True,
    ):
        assert torch.allclose(gradient, expected, atol=1e-9)


def test_a_label_beyond_the_next_token_of_the_teacher_is_learned_from_the_data():
    hidden, weight_VD, teacher, labels = inputs(7)
    found = across_divergence(
        hidden,
        weight_VD,
        targets(teacher, list(range(V)), [*range(V), 3, 3], V, beyond={4: (12, 3)}),
        labels,
        Divergence(),
        chunk_tokens=4,
    )
    log_q = (hidden @ weight_VD.T).log_softmax(1)
    p = (teacher.hidden_ND @ teacher.weight_VD.T).softmax(1)
    target = p[:, :V].clone()
    target[:, 3] += p[:, 11] + p[:, 12]
    target[4, 3] -= p[4, 12]
    known = target.sum(1, keepdim=True)
    divergence = (target / known * ((target / known).log() - log_q)).sum(1)
    nats = -log_q[torch.arange(N), labels]
    wanted = (known[:, 0] * divergence + (1 - known[:, 0]) * nats).sum()
    assert found.total.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_sorted_probabilities_and_their_gradient_written_out():
    hidden, weight_VD, teacher, labels = inputs(6)
    found = across_divergence(
        hidden,
        weight_VD,
        targets(teacher, STUDENT, OTHER, 8, has_place=[True] * (N - 1) + [False]),
        labels,
        Divergence(),
        weight=0.5,
        chunk_tokens=3,
        is_sorted=True,
    )
    q = (hidden @ weight_VD.T).softmax(1)
    p = (teacher.hidden_ND @ teacher.weight_VD.T).softmax(1)
    padded = torch.cat([q.sort(1, descending=True).values, torch.zeros(N, W - V, dtype=torch.float64)], dim=1)
    distance = (padded - p.sort(1, descending=True).values).abs().sum(1)
    nats = -q.log()[torch.arange(N), labels]
    wanted = 0.5 * distance[:-1].sum() + 0.5 * nats[:-1].sum() + nats[-1]
    assert found.total.item() == pytest.approx(wanted.item(), rel=1e-9)
    for gradient, expected in zip(
        torch.autograd.grad(found.total, (hidden, weight_VD)),
        torch.autograd.grad(wanted, (hidden, weight_VD)),
        strict=True,
    ):
        assert torch.allclose(gradient, expected, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_chunk_likelihood_is_a_divergence_of_two_outcomes(temperature):
    own = torch.tensor([-0.3, -1.0, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([-0.5, -0.7, -0.2], dtype=torch.float64)
    chunks = torch.tensor([0, 0, 1, -1])
    found = chunk_likelihood(own, other, chunks, torch.tensor([0, 1, 1]), 2, temperature)
    p = torch.tensor([-0.5, -0.9], dtype=torch.float64).div(temperature).exp()
    q = torch.stack([own[0] + own[1], own[2]]).div(temperature).exp()
    wanted = temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    assert torch.allclose(found, wanted, rtol=1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), own)
    assert gradient[3] == 0
    assert torch.allclose(gradient, torch.autograd.grad(wanted.sum(), own)[0], rtol=1e-9)
    same = chunk_likelihood(other.clone().requires_grad_(), other, torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1]), 2)
    assert torch.allclose(same, torch.zeros(2, dtype=torch.float64), atol=1e-12)


def test_log1mexp_does_not_cancel():
    x = torch.tensor([-1e-6, -0.5, -1.0, -50.0], dtype=torch.float64)
    assert torch.allclose(log1mexp(x), torch.log(-torch.expm1(x)), rtol=1e-12)
