"""The importance of positions as a function of a layer's inputs: less noise than what it was fitted to."""

import torch

from llmctl.model import predicted_weights
from llmctl.model.fisher import PART_TOKENS, token_weights
from llmctl.model.predicted_weights import MOST_FEATURES, RIDGE, features, predictors
from tests.model.test_fisher import MAP, batch, decoder

FIRST = 7 * (PART_TOKENS // 7)
"""Positions of the first pass."""
GATE, UP = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"


def labeled(n_rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Return rows whose every position has a label."""
    given = batch(n_rows, seed)
    return given | {"labels": given["input_ids_BT"]}


def inputs_of(model, name, given) -> torch.Tensor:
    found = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(given["input_ids_BT"])
    handle.remove()
    return found[0]


def test_predictions_are_a_regression_of_the_logarithm_of_the_weights() -> None:
    model, given, others = decoder(), labeled(64, seed=1), labeled(8, seed=5)
    found = predictors(model, {"mlp": [GATE, UP]}, [given])
    assert found is not None
    assert found[GATE] is found[UP]
    drawn = token_weights(model, [GATE, UP], [given])
    shares = [drawn[name][0].double() for name in (GATE, UP)]
    logs_N = torch.stack([share_N / share_N[:FIRST].mean() for share_N in shares]).mean(dim=0).log()
    x_NF = features(inputs_of(model, GATE, given)).double()
    square_FF = x_NF.T @ x_NF
    square_FF += RIDGE * square_FF.diagonal().mean() * torch.eye(len(square_FF))
    wanted = features(inputs_of(model, GATE, others)).double() @ torch.linalg.solve(
        square_FF, x_NF.T @ (logs_N - logs_N.mean())
    )
    low, high = (logs_N - logs_N.mean()).aminmax()
    torch.testing.assert_close(
        found[GATE](inputs_of(model, GATE, others)).double().log(), wanted.clamp(low, high), rtol=0.02, atol=0.05
    )
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_sums_are_in_float32_also_where_the_model_runs_in_bfloat16() -> None:
    model, given = decoder(), labeled(64, seed=1)
    whole = predictors(model, {"mlp": [GATE, UP]}, [given])
    inputs = inputs_of(model, GATE, given)
    assert whole is not None
    weights = whole[GATE](inputs)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert torch.equal(whole[GATE](inputs), weights)
        narrow = predictors(model, {"mlp": [GATE, UP]}, [given])
    assert narrow is not None
    torch.testing.assert_close(narrow[GATE](inputs).log(), weights.log(), rtol=0.02, atol=0.1)


def test_rows_with_many_positions_that_nothing_depends_on_are_not_predicted(monkeypatch) -> None:
    units, rows = {"mlp": [GATE, UP]}, [batch()]  # no label at the last of 7
    assert predictors(decoder(), units, rows) is None
    monkeypatch.setattr(predicted_weights, "MOST_UNUSED", 0.2)
    found = predictors(decoder(), units, rows)
    assert found is not None  # the others are used
    whole = predictors(decoder(), units, [{name: tensor[:, :6] for name, tensor in rows[0].items()}])
    assert whole is not None
    torch.testing.assert_close(found[GATE].direction_I, whole[GATE].direction_I, rtol=1e-3, atol=1e-4)


def test_a_layer_that_nothing_depends_on_has_none() -> None:
    model = decoder()
    model.unused = torch.nn.Linear(2, 2)
    found = predictors(model, {"a": ["unused"], "b": [MAP]}, [labeled(3, seed=1)])
    assert found is not None
    assert set(found) == {MAP}


def test_wide_inputs_are_projected() -> None:
    inputs = torch.randn(2, 5, 2 * MOST_FEATURES, generator=torch.Generator().manual_seed(0))
    assert features(inputs).shape == (10, MOST_FEATURES + 2)
    assert torch.equal(features(inputs), features(inputs.clone()))
    torch.testing.assert_close(features(inputs[:, :2]), features(inputs).view(2, 5, -1)[:, :2].flatten(0, 1))
    assert features(inputs[..., :7]).shape == (10, 9)
