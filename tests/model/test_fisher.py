"""Gradients of what a model would say itself, against plain automatic differentiation."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from llmctl.losses.base import IGNORE
from llmctl.model import fisher
from llmctl.model.fisher import backward_from_samples, drawn, token_weights
from llmctl.model.transformer import LanguageModel
from tests.families.test_table import CONFIGS, config_of

MAP = "model.layers.0.mlp.down_proj"


def decoder() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(config_of(CONFIGS["LlamaForCausalLM"][0])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(n_rows: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 40, (n_rows, 7), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    return {"input_ids_BT": ids, "labels": labels}


def test_the_gradient_is_that_of_the_log_probability_of_what_is_drawn(monkeypatch) -> None:
    monkeypatch.setattr(fisher, "CHUNK_TOKENS", 5)
    model, given = decoder(), batch()
    assert backward_from_samples(model, given, torch.Generator().manual_seed(2)) == 18
    found = model.get_parameter(f"{MAP}.weight").grad
    assert found is not None
    model.zero_grad()
    logits = model(given["input_ids_BT"])[:, :-1].flatten(0, 1)
    generator = torch.Generator().manual_seed(2)
    parts = logits.detach().softmax(dim=-1).split(5)
    labels = torch.cat([drawn(part, generator) for part in parts])[:, 0]
    F.cross_entropy(logits, labels, reduction="sum").backward()
    wanted = model.get_parameter(f"{MAP}.weight").grad
    assert wanted is not None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_classes_are_drawn_as_often_as_their_probability_says() -> None:
    p_V = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    samples = drawn(p_V.expand(40_000, -1), torch.Generator().manual_seed(0))
    frequencies = samples.flatten().bincount(minlength=6) / len(samples)
    assert (frequencies[p_V == 0] == 0).all()
    torch.testing.assert_close(frequencies, p_V, atol=0.01, rtol=0)


def test_weights_are_those_of_an_error_at_each_position() -> None:
    """The mean over draws of a squared gradient is the curvature of the divergence that a change of the output makes."""
    model, given = decoder(), batch(n_rows=1)
    many = {name: tensor.expand(200, -1) for name, tensor in given.items()}
    found = token_weights(model, [MAP], [many] * 20)[MAP]
    weights = torch.cat(found).double().square().view(-1, 7).mean(dim=0)  # POWER is a half
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        plain = model(given["input_ids_BT"])[:, :-1].double()
    width, size = model.config.d_model, 0.02
    wanted = torch.zeros(7, dtype=torch.float64)
    for position in range(7):
        for channel in range(width):
            error = torch.zeros(1, 7, width)
            error[0, position, channel] = size
            handle = model.get_submodule(MAP).register_forward_hook(lambda _, __, out, error=error: out + error)
            with torch.no_grad():
                changed = model(given["input_ids_BT"])[:, :-1].double()
            handle.remove()
            wanted[position] += F.kl_div(
                changed.log_softmax(-1), plain.log_softmax(-1), log_target=True, reduction="sum"
            )
    torch.testing.assert_close(weights / weights.sum(), wanted / wanted.sum(), rtol=0.12, atol=0.004)


@pytest.mark.parametrize("family", ["BertForMaskedLM", "T5ForConditionalGeneration", "BertForSequenceClassification"])
def test_every_kind_of_model_says_something(family: str) -> None:
    torch.manual_seed(0)
    architecture = next(name for name in CONFIGS if name.startswith(family))
    model = LanguageModel(config_of(CONFIGS[architecture][0]))
    given = batch()
    if model.config.n_labels:
        with torch.no_grad():
            model.classifier.weight.normal_()
    if model.config.family == "encoder_decoder":
        given["decoder_input_ids_BT"] = given["input_ids_BT"]
    names = [name for name, module in model.named_modules() if name.endswith("down_proj")]
    found = token_weights(model, names, [given, batch(seed=3) | {**given}])
    assert set(found) == set(names)
    for parts in found.values():
        assert [part.shape for part in parts] == [(21,), (21,)]
        assert torch.cat(parts).mean() == pytest.approx(1.0, rel=1e-4)
        assert torch.isfinite(torch.cat(parts)).all()


@pytest.mark.parametrize("head", [{}, {"head": "tokens", "n_labels": 5}, {"head": "span", "n_labels": 2}])
def test_padding_of_a_model_without_words_does_not_count(head: dict) -> None:
    torch.manual_seed(0)
    model = LanguageModel(config_of(CONFIGS["BertModel"][0] | head))
    given = {"input_ids_BT": batch()["input_ids_BT"], "documents_BT": torch.ones(3, 7, dtype=torch.long)}
    given["documents_BT"][1, 4:] = 0
    last = f"model.layers.{model.config.n_layers - 1}.mlp.down_proj"
    (weights,) = token_weights(model, [last], [given])[last]
    assert ((weights.view(3, 7) == 0) == (given["documents_BT"] == 0)).all()


def test_weights_of_a_token_classifier_are_those_of_the_same_head_over_words() -> None:
    torch.manual_seed(0)
    words = LanguageModel(config_of(CONFIGS["BertModel"][0] | {"tie_embeddings": False}))
    tokens = LanguageModel(replace(words.config, head="tokens", n_labels=words.config.vocab_size))
    own = words.state_dict()
    own |= {"classifier.weight": own.pop("lm_head.weight"), "classifier.bias": torch.zeros(words.config.vocab_size)}
    tokens.load_state_dict(own)
    given = {"input_ids_BT": batch()["input_ids_BT"]}
    names = [name for name, _ in words.named_modules() if name.endswith("down_proj")]
    expected = token_weights(words, names, [given | {"labels": given["input_ids_BT"]}])
    found = token_weights(tokens, names, [given])
    for name in names:
        torch.testing.assert_close(found[name], expected[name])


def test_a_map_that_nothing_depends_on_has_no_weights() -> None:
    model = decoder()
    model.add_module("unused", torch.nn.Linear(4, 4))
    assert set(token_weights(model, ["unused", MAP], [batch()])) == {MAP}


def test_a_batch_goes_back_in_parts(monkeypatch) -> None:
    """Without changing what is drawn: 7 tokens a row, 2 rows a part."""
    model, given = decoder(), batch()
    monkeypatch.setattr(fisher, "CHUNK_TOKENS", 6)  # those of a row with a label
    (whole,) = token_weights(model, [MAP], [given])[MAP]
    monkeypatch.setattr(fisher, "PART_TOKENS", 15)
    assert [len(part["labels"]) for part in fisher.parts_of(model, given)] == [2, 1]
    (parts,) = token_weights(model, [MAP], [given])[MAP]
    torch.testing.assert_close(parts, whole)
