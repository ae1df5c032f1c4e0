"""Rows are a pure function of (seed, number), cover the text, and never mix documents up."""

from dataclasses import dataclass

import numpy as np
import pytest

from llmctl.data.stream import ExampleRows, PackedExamples, PackedRows, PairRows, best_fit


@dataclass
class Memory:
    """Documents in memory, as a ShardSet offers them."""

    texts: list[np.ndarray]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(text) for text in self.texts])

    def document(self, index: int) -> np.ndarray:
        return self.texts[index]


def memory(n_documents: int = 40, seed: int = 0) -> Memory:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 30, n_documents)
    # token = 1000 * document + position: any mix-up shows
    return Memory([1000 * index + np.arange(length) for index, length in enumerate(lengths)])


def rows_of(source: Memory, **options: object) -> PackedRows:
    settings = {"seq_len": 16, "overlap": 1, "seed": 3} | options
    return PackedRows(source, np.arange(len(source.texts)), **settings)  # type: ignore[arg-type]


def test_unshuffled_rows_cover_every_token_once_in_order():
    source = memory()
    rows = rows_of(source, shuffle=False, overlap=0)
    tokens = np.concatenate([row.tokens[row.documents > 0] for row in map(rows.row, range(rows.n_rows))])
    assert tokens.tolist() == np.concatenate(source.texts).tolist()


def test_every_next_token_inside_a_document_is_predicted_once_when_unshuffled():
    source = memory()
    rows = rows_of(source, shuffle=False)
    pairs = []
    for number in range(rows.n_rows):
        row = rows.row(number)
        inside = (row.documents[1:] == row.documents[:-1]) & (row.documents[1:] > 0)
        pairs += list(zip(row.tokens[:-1][inside].tolist(), row.tokens[1:][inside].tolist(), strict=True))
    expected = [(a, a + 1) for text in source.texts for a in text[:-1].tolist()]
    assert sorted(pairs) == sorted(expected)


def test_tokens_of_a_document_number_come_from_one_document_and_run_on():
    rows = rows_of(memory())
    for number in range(3 * rows.n_rows):
        row = rows.row(number)
        assert (row.documents > 0).all()
        for document in np.unique(row.documents):
            piece = row.tokens[row.documents == document]
            assert len(np.unique(piece // 1000)) == 1
            assert (np.diff(piece) == 1).all()


def test_an_epoch_repeats_no_token_and_leaves_out_less_than_two_rows():
    source = memory()
    rows = rows_of(source, overlap=0)
    for epoch in range(3):
        tokens = np.concatenate([rows.row(epoch * rows.n_rows + index).tokens for index in range(rows.n_rows)])
        assert len(np.unique(tokens)) == len(tokens)
        assert len(tokens) > rows.n_tokens - 2 * 16


def test_rows_depend_on_seed_and_number_only():
    first, second = rows_of(memory()), rows_of(memory())
    for number in (70, 3, 0, 41):
        assert (first.row(number).tokens == second.row(number).tokens).all()
    other = rows_of(memory(), seed=4)
    assert any((first.row(number).tokens != other.row(number).tokens).any() for number in range(5))


def test_epochs_differ():
    rows = rows_of(memory())
    assert any((rows.row(n).tokens != rows.row(rows.n_rows + n).tokens).any() for n in range(rows.n_rows))


def test_one_long_document_is_cut_at_a_new_offset_in_every_epoch():
    rows = rows_of(Memory([np.arange(1000)]))
    offsets = {int(rows.row(epoch * rows.n_rows).tokens[0]) % 16 for epoch in range(20)}
    assert len(offsets) > 3


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 18, 33])
@pytest.mark.parametrize("shuffle", [True, False])
def test_texts_about_as_short_as_a_row_work(length: int, shuffle: bool):
    rows = rows_of(Memory([np.arange(length)]), shuffle=shuffle)
    row = rows.row(5 * rows.n_rows)
    assert row.tokens.shape == row.documents.shape == (17,)
    assert (row.documents > 0).sum() == min(length, 17)


def test_without_isolation_a_row_is_one_document():
    row = rows_of(memory(), isolate=False).row(0)
    assert set(row.documents.tolist()) == {1}


def test_pairs_cover_an_epoch_stay_together_and_lie_beside_their_like():
    source, target = memory(200, 1), memory(200, 1)
    rows = PairRows(source, target, np.arange(200), seed=0, batch_size=8)
    seen = []
    spread = []
    for start in range(0, 200, 8):
        lengths = []
        for number in range(start, start + 8):
            s, t = rows.row(number)
            assert s[0] == t[0]
            seen.append(int(s[0]) // 1000)
            lengths.append(len(s))
        spread.append(max(lengths) - min(lengths))
    assert sorted(seen) == list(range(200))
    assert np.mean(spread) < 3
    assert [rows.row(n)[0][0] for n in range(200)] != [rows.row(200 + n)[0][0] for n in range(200)]


@pytest.mark.parametrize("seed", range(5))
def test_examples_share_rows_whole_and_each_is_there_once(seed: int):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, 200)
    selection = rng.permutation(200)[:150]
    rows = best_fit(lengths, selection, 64)
    assert sorted(index for row in rows for index in row) == sorted(selection.tolist())
    assert all(lengths[row].sum() <= 64 for row in rows)
    # Best fit decreasing needs at most 11/9 of the fewest rows that could do, and one more.
    assert len(rows) <= 11 / 9 * -(-lengths[selection].sum() // 64) + 2


def test_an_example_that_is_too_long_has_a_row_of_its_own():
    assert best_fit(np.array([100, 5, 5]), np.arange(3), 10) == [[0], [1, 2]]


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
    lengths = np.random.default_rng(0).integers(1, 40, 100)
    packed = PackedExamples(lengths, np.arange(100), seq_len=64, seed=1)
    alone = ExampleRows(lengths, np.arange(100), seed=1, batch_size=8)
    for rows in (
        [packed.indexes(number) for number in range(2 * packed.n_rows)],
        [[alone.index(number)] for number in range(2 * alone.n_rows)],
    ):
        half = len(rows) // 2
        for epoch in (rows[:half], rows[half:]):
            assert sorted(index for row in epoch for index in row) == list(range(100))
        assert rows[:half] != rows[half:]


def test_fixed_rows_have_one_address_and_one_content_in_every_epoch():
    source = memory()
    rows = rows_of(source, fixed=True)
    epochs = [range(epoch * rows.n_rows, (epoch + 1) * rows.n_rows) for epoch in range(3)]
    orders = [[rows.address(number) for number in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(rows.n_rows)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    found: dict[int, list[int]] = {}
    for number in np.random.default_rng(0).permutation(3 * rows.n_rows).tolist():
        tokens = found.setdefault(rows.address(number), rows.row(number).tokens.tolist())
        assert tokens == rows.row(number).tokens.tolist()
    # Cut without an offset and in the order of the documents: the address says where the text lies.
    joined = np.concatenate(source.texts)
    for address, tokens in found.items():
        assert tokens == joined[address * 16 : address * 16 + 17].tolist()


def test_another_seed_and_a_restart_leave_fixed_rows_where_they_are():
    source = memory()
    one, other, again = (rows_of(source, fixed=True, seed=seed) for seed in (1, 2, 1))
    by_address = {other.address(n): other.row(n).tokens.tolist() for n in range(other.n_rows)}
    assert [one.address(n) for n in range(one.n_rows)] != [other.address(n) for n in range(one.n_rows)]
    for number in range(one.n_rows, 2 * one.n_rows):
        assert one.row(number).tokens.tolist() == by_address[one.address(number)]
        assert again.address(number) == one.address(number)
