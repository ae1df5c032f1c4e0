"""Texts become rows with the special tokens of their family; cutting is fair, batches change nothing."""

import pytest
import torch

from llmctl.errors import UsageError
from llmctl.inference.encoding import Row, cut_longest, encode_rows, longest_row
from llmctl.inference.rows import BATCH_TOKENS, by_length, row_outputs


def test_special_tokens_of_every_family(make_loaded):
    for kind, family in (("learned", "encoder"), ("t5", "encoder_decoder"), ("rope", "decoder")):
        loaded = make_loaded(kind, family=family)
        tokenizer = loaded.tokenizer
        a, b, both = (tokenizer.encode(text) for text in ("a list", "诗", "a list\n诗"))
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        single, pair = encode_rows(loaded, [("a list",), ("a list", "诗")], 40)
        if family == "encoder":
            assert single.ids == [bos, *a, eos]
            assert pair.ids == [bos, *a, eos, *b, eos]
            assert pair.types == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        elif family == "encoder_decoder":
            assert single.ids == [*a, eos]
            assert pair.ids == [*a, eos, *b, eos]
        else:
            assert single.ids == [bos, *a]
            assert pair.ids == [bos, *both]
        assert all(row.ids for row in encode_rows(loaded, [("",), ("", "")], 40))


def test_rows_are_cut_to_the_limit_and_say_by_how_much(make_loaded):
    loaded = make_loaded("learned", family="encoder")
    long = "a list of strings " * 5
    n_long = len(loaded.tokenizer.encode(long))
    row, pair = encode_rows(loaded, [(long,), ("a", long)], 10)
    assert (len(row.ids), row.n_cut, row.ids[-1]) == (10, n_long - 8, loaded.tokenizer.eos_id)
    assert (len(pair.ids), pair.ids.count(loaded.tokenizer.eos_id)) == (10, 2)
    assert pair.types.count(0) == 3, "the short text stays whole"
    with pytest.raises(UsageError, match="--seq-len 49"):
        longest_row(loaded, 49)
    assert (longest_row(loaded), longest_row(loaded, 12)) == (48, 12)


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [([5], 3, [3]), ([5, 3], 8, [5, 3]), ([9, 3], 6, [3, 3]), ([9, 3], 5, [3, 2]), ([4, 4], 0, [0, 0]), ([0], 0, [0])],
)
def test_the_longest_is_cut_first(lengths: list[int], room: int, kept: list[int]):
    assert cut_longest(lengths, room) == kept


def test_batches_have_every_row_once_and_a_bounded_size():
    lengths = [3, 9, 1, 9, 4, BATCH_TOKENS, 2]
    batches = list(by_length(lengths, 3))
    assert sorted(number for batch in batches for number in batch) == list(range(7))
    assert batches[0] == [5], "the longest is alone"
    assert all(len(batch) <= 3 for batch in batches)


@pytest.mark.parametrize("pooling", ["", "mean", "first", "last"])
def test_outputs_do_not_depend_on_the_batch(make_loaded, pooling: str):
    head = {} if pooling else {"n_labels": 3, "pooled_activation": "tanh"}
    loaded = make_loaded("learned", family="encoder", n_token_types=2, **head)
    texts = [("a",), ("a list of strings", "诗"), ("",), ("list " * 30,)]
    rows = encode_rows(loaded, texts, 48)
    together = row_outputs(loaded, rows, 4, pooling)
    alone = torch.cat([row_outputs(loaded, [row], 1, pooling) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert together.shape == (4, 32 if pooling else 3)
    swapped = [Row(row.ids, [1 - kind for kind in row.types]) for row in rows]
    assert (row_outputs(loaded, swapped, 4, pooling) - together).abs().min() > 0, "token types are read"


def test_a_single_token_type_is_that_of_both_texts_of_a_pair(make_loaded):
    """As in RoBERTa and XLM-R, whose rerankers read pairs."""
    loaded = make_loaded("learned", family="encoder", n_token_types=1, n_labels=3)
    (row,) = encode_rows(loaded, [("a list", "诗")], 48)
    assert max(row.types) == 1
    ids = torch.tensor([row.ids])
    expected = loaded.model.classify(ids, token_types_BT=torch.zeros_like(ids)).detach()
    torch.testing.assert_close(row_outputs(loaded, [row], 1), expected)
