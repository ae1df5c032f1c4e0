"""Preferences in batches are what each answer gives alone, and adapters switched off are the model before them."""

import numpy as np
import pytest
import torch

from llmctl.data.batches import Ids
from llmctl.data.preference_batches import PreferenceBatches
from llmctl.data.stream import ExampleRows
from llmctl.losses.base import IGNORE
from llmctl.losses.preferences import Preference
from llmctl.model.lora import add_adapters, without_adapters
from llmctl.training.batch import idle, to_device
from llmctl.training.preference_objective import PreferencePrediction
from tests.data.test_preference_batches import Documents

N = 5


@pytest.fixture
def model(make_loaded):
    model = make_loaded("rope").model.double().train()
    add_adapters(model, rank=4, alpha=8.0, targets=("q_proj", "down_proj"), dropout=0.0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batches_of(n_answers: int, *, kto: bool = False, reference=None):
    rng = np.random.default_rng(0)
    tokens, trained, firsts = [], [], []
    for _ in range(N):
        prompt = rng.integers(5, 300, int(rng.integers(1, 5))).tolist()
        sides = [rng.integers(5, 300, int(rng.integers(1, 6))).tolist() for _ in range(n_answers)]
        tokens.append([index for side in sides for index in (*prompt, *side)])
        trained.append([flag for side in sides for flag in (*(len(prompt) * [0]), *(len(side) * [1]))])
        firsts.append(len(prompt) + len(sides[0]))
    documents, order = Documents(tokens), np.arange(N)
    return PreferenceBatches(
        documents,
        Documents(trained),
        np.array(firsts),
        np.array([True, False, True, True, False]) if n_answers == 1 else np.ones(N, bool),
        ExampleRows(documents.lengths, order, seed=0, batch_size=N, shuffle=False),
        Ids(0, 2, 1, np.zeros(330, bool)),
        counts_answers=kto,
        mismatched=np.roll(order, -1) if kto else None,
        reference=reference,
    )


def batch_of(batches, *numbers: int):
    return to_device(batches.batch(numbers or range(N)), torch.device("cpu"))


def answer(model, ids, labels) -> float:
    """Return the log probability of an answer alone."""
    with torch.no_grad():
        logits = model.head(model.hidden(torch.tensor(ids)[None]))[0].log_softmax(dim=1)
    return sum(float(logits[place, label]) for place, label in enumerate(labels) if label != IGNORE)


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "orpo"])
def test_pairs_in_a_batch_are_those_alone(model, name):
    batches, preference = batches_of(2), Preference(name, 0.3)
    objective = PreferencePrediction(model, preference, 0.2, 3)
    loss = objective(batch_of(batches))
    alone = [objective(batch_of(batches, number)) for number in range(N)]
    assert loss.sum.item() == pytest.approx(sum(one.sum.item() for one in alone), rel=1e-12)
    assert loss.count.item() == N
    sums_BS, counts_BS = objective.log_probs(batch_of(batches))
    for number in range(N):
        for slot, (ids, labels) in enumerate(batches.sides(number)):
            assert sums_BS[number, slot].item() == pytest.approx(answer(model, ids, labels.tolist()), rel=1e-12)
            assert int(counts_BS[number, slot]) == sum(label != IGNORE for label in labels.tolist())
    figures = objective.figures(
        loss.sum.item(), N, {key: float(value) for key, value in loss.parts.items()}, np.zeros(0)
    )
    assert figures["margin"] == pytest.approx(figures["reward_chosen"] - figures["reward_rejected"])
    assert 0 <= figures["accuracy"] <= 1


def test_the_reference_is_the_model_without_adapters_or_what_was_measured(model):
    with torch.no_grad(), without_adapters(model):
        objective = PreferencePrediction(model, Preference("dpo", 0.3), 0.0, 100)
        batch = batch_of(batches_of(2))
        measured = objective.log_probs(batch)[0].numpy()
        assert objective(batch).sum.item() == pytest.approx(N * np.log(2), rel=1e-12)
    other = objective(batch_of(batches_of(2, reference=measured)))
    assert objective(batch).sum.item() == pytest.approx(other.sum.item(), rel=1e-12)
    assert objective(batch).sum.item() != pytest.approx(N * np.log(2), rel=1e-3)
    assert model.training


def test_kto_takes_single_answers_and_pairs_alike(model):
    objective = PreferencePrediction(model, Preference("kto", 0.3), 0.0, 100)
    batch = batch_of(batches_of(1, kto=True))
    loss = objective(batch)
    assert loss.count.item() == N
    assert objective.divergence(batch) >= 0
    assert (float(loss.parts["n_chosen"]), float(loss.parts["n_rejected"])) == (3, 2)
    pairs = objective(batch_of(batches_of(2, kto=True)))
    assert pairs.count.item() == 2 * N
    assert float(pairs.parts["pairs"]) == N


def test_an_idle_batch_adds_nothing(model):
    batches = batches_of(2)
    batch = to_device(idle(batches.batch(range(N))), torch.device("cpu"))
    loss = PreferencePrediction(model, Preference("dpo"), 0.0, 100)(batch)
    assert loss.sum.item() == loss.count.item() == float(loss.parts["pairs"]) == 0
    loss.sum.backward()
    assert all(parameter.grad is None or parameter.grad.abs().sum() == 0 for parameter in model.parameters())
