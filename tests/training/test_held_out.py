"""How many held-out rows an evaluation on so many tokens takes."""

import numpy as np
import pytest

from llmctl.data.batches import CausalBatches, Ids, PairBatches
from llmctl.data.stream import PackedRows, PairRows
from llmctl.training.held_out import rows_with


class Listed:
    """Documents of these lengths in memory."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)

    def document(self, index):
        return np.full(self.lengths[index], 5)


IDS = Ids(pad=0, eos=1, decoder_start=0, special=np.zeros(9, dtype=bool))


@pytest.mark.parametrize("tokens", [1, 60, 240, 10_000])
def test_rows_of_pairs_are_counted_by_their_tokens(tokens):
    selection = np.arange(200)
    rows = PairRows(Listed([9] * 200), Listed([5] * 200), selection, seed=0, batch_size=4, shuffle=False)
    # Five tokens of a target and its end in a row that could have 256.
    assert rows_with(PairBatches(rows, IDS, 256), tokens, 256) == min(200, max(1, tokens // 6))


def test_full_rows_have_as_many_tokens_as_they_are_long():
    rows = PackedRows(Listed([700] * 8), np.arange(8), seq_len=64, overlap=1, seed=0, shuffle=False)
    assert rows_with(CausalBatches(rows, IDS), 640, 64) == 10
