"""Likelihoods equal a plain forward pass, one row at a time, whatever they are batched with."""

import pytest
import torch
from torch.nn import functional as F

from llmctl.inference.likelihood import Likelihood, ScoredRow, likelihoods, split_ids


def textbook(loaded, row: ScoredRow) -> tuple[float, int]:
    with torch.no_grad():
        if loaded.model.config.family == "decoder":
            logits_TV = loaded.model(torch.tensor([row.ids]))[0, row.first - 1 : -1].double()
        else:
            start = torch.tensor([[0, *row.ids[:-1]]])
            logits_TV = loaded.model(torch.tensor([row.source]), decoder_input_ids_BT=start)[0, row.first :].double()
    wanted = torch.tensor(row.ids[row.first :])
    return float(F.cross_entropy(logits_TV, wanted, reduction="sum")), int((logits_TV.argmax(1) == wanted).sum())


@pytest.mark.parametrize("kind", ["rope", "learned", "windows", "query-layer", "t5", "marian"])
def test_rows_of_unequal_length_equal_each_alone(make_loaded, kind: str):
    loaded = make_loaded(kind)
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(5, loaded.tokenizer.vocab_size, (length,), generator=draw).tolist()

    is_decoder = loaded.model.config.family == "decoder"
    lengths = [(9, 1), (3, 2), (30, 12), (5, 4), (2, 1)]
    rows = [ScoredRow(ids(n), first if is_decoder else 0, [] if is_decoder else ids(first + 3)) for n, first in lengths]
    for batch_size in (1, 2, 5):
        for row, found in zip(rows, likelihoods(loaded, rows, batch_size), strict=True):
            nats, n_correct = textbook(loaded, row)
            assert found.nats == pytest.approx(nats, rel=1e-4)
            assert (found.n_correct, found.count) == (n_correct, len(row.ids) - row.first)


def test_rows_that_count_nothing(make_loaded):
    loaded = make_loaded("rope")
    rows = [ScoredRow([2], 1), ScoredRow([2, 7], 1), ScoredRow([], 0)]
    found = likelihoods(loaded, rows, 2)
    assert found[0] == found[2] == Likelihood(0.0, 0, 0)
    assert found[1].count == 1
    assert likelihoods(loaded, [], 2) == []


def test_a_row_as_long_as_the_context_and_its_last_label(make_loaded):
    loaded = make_loaded("learned")
    found = likelihoods(loaded, [ScoredRow(list(range(5, 54)), 1)], 1)
    assert found[0].count == loaded.model.config.max_positions == 48


def test_context_and_continuation_are_cut_where_a_token_ends(text_tokenizer):
    before, after = split_ids(text_tokenizer, "a list of", " strings")
    assert before == text_tokenizer.encode("a list of")
    assert before + after == text_tokenizer.encode("a list of strings")
    # Cut inside a token: both stay what they are, the context as it is without what follows.
    before, after = split_ids(text_tokenizer, "a list of str", "ings")
    assert before == text_tokenizer.encode("a list of str")
    assert text_tokenizer.decode(before + after) == "a list of strings"
