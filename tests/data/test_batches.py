"""Batches say what is asked: shifted labels, padding that counts for nothing, masks that do not depend on the batch."""

from dataclasses import replace

import numpy as np
import pytest

from llmctl.data.batches import CausalBatches, Ids, MaskedBatches, PairBatches, SpanBatches
from llmctl.data.masking import IGNORE, Masking
from llmctl.data.stream import PackedRows, PairRows
from tests.data.test_stream import Memory

SPECIAL = np.zeros(100, dtype=bool)
SPECIAL[:12] = True
IDS = Ids(pad=0, eos=2, decoder_start=0, special=SPECIAL, sentinels=np.arange(5, 12))


def texts(n: int = 30) -> Memory:
    rng = np.random.default_rng(0)
    return Memory([np.concatenate([[1], rng.integers(12, 100, rng.integers(1, 25)), [2]]) for _ in range(n)])


def packed(overlap: int, **options: object) -> PackedRows:
    source = texts()
    return PackedRows(source, np.arange(len(source.texts)), seq_len=20, overlap=overlap, seed=0, **options)  # type: ignore[arg-type]


def test_causal_labels_are_the_next_tokens_of_the_same_document():
    batch = CausalBatches(packed(1), IDS).batch(range(6))
    ids, labels, documents = batch["input_ids_BT"], batch["labels"], batch["documents_BT"]
    assert ids.shape == labels.shape == documents.shape == (6, 20)
    inside = labels[:, :-1] != IGNORE
    assert (labels[:, :-1][inside] == ids[:, 1:][inside]).all()
    assert (documents[:, 1:][inside] == documents[:, :-1][inside]).all()
    assert not (labels == 1).any(), "a document's first token is never predicted from the one before"


def test_one_document_per_row_needs_no_mask():
    source = Memory([np.arange(12, 95)])
    rows = PackedRows(source, np.array([0]), seq_len=20, overlap=1, seed=0)
    assert "documents_BT" not in CausalBatches(rows, IDS).batch([0, 1])


@pytest.mark.parametrize("kind", ["mlm", "span"])
def test_what_is_drawn_for_a_row_depends_on_the_row_only(kind: str):
    masking = Masking(3, 0.3, SPECIAL)
    maker = (
        MaskedBatches(packed(0), IDS, masking, seed=1)
        if kind == "mlm"
        else SpanBatches(packed(0), IDS, frac=0.3, mean_span_tokens=2, seed=1)
    )
    together, alone = maker.batch([4, 5]), maker.batch([5])
    for name, array in alone.items():
        width = array.shape[1]
        assert (together[name][1, :width] == array[0]).all()


def test_masks_are_new_in_every_epoch():
    rows = packed(0, shuffle=False)
    maker = MaskedBatches(rows, IDS, Masking(3, 0.3, SPECIAL), seed=1)
    first, again = maker.batch([0]), maker.batch([rows.n_rows])
    assert ((first["labels"] != IGNORE) != (again["labels"] != IGNORE)).any()


def test_span_rows_can_be_put_back_document_by_document():
    rows = packed(0)
    batch = SpanBatches(rows, IDS, frac=0.3, mean_span_tokens=2, seed=1).batch(range(8))
    for index in range(8):
        row = rows.row(index)
        originals = [row.tokens[row.documents == d] for d in np.unique(row.documents)]
        originals = [text[~SPECIAL[text]] for text in originals if (~SPECIAL[text]).any()]
        for number, original in enumerate(originals, start=1):
            source = batch["input_ids_BT"][index][batch["documents_BT"][index] == number]
            target = batch["labels"][index][batch["decoder_documents_BT"][index] == number]
            moved = batch["decoder_input_ids_BT"][index][batch["decoder_documents_BT"][index] == number]
            assert source[-1] == target[-1] == IDS.eos
            assert moved[0] == IDS.decoder_start
            assert (moved[1:] == target[:-1]).all()
            spans: dict[int, list[int]] = {}
            for token in target[:-1].tolist():
                if token in IDS.sentinels:
                    spans[token] = current = []
                else:
                    current.append(token)
            restored = [t for token in source[:-1].tolist() for t in spans.get(token, [token])]
            assert restored == original.tolist()
        assert (batch["labels"][index] == IGNORE).sum() == (batch["decoder_documents_BT"][index] == 0).sum()


def test_pairs_end_and_are_cut_at_the_limit():
    source = Memory([np.arange(12, 12 + n) for n in (3, 40)])
    rows = PairRows(source, source, np.arange(2), seed=0, batch_size=2, shuffle=False)
    batch = PairBatches(rows, IDS, max_tokens=10).batch([0, 1])
    assert batch["input_ids_BT"].tolist() == [[12, 13, 14, 2, 0, 0, 0, 0, 0, 0], [*range(12, 21), 2]]
    assert batch["labels"][0].tolist() == [12, 13, 14, 2, *[IGNORE] * 6]
    assert batch["decoder_input_ids_BT"][0].tolist() == [0, 12, 13, 14, *[0] * 6]
    assert batch["documents_BT"][0].tolist() == [1] * 4 + [0] * 6


def test_sources_end_as_the_tokenizer_says():
    source = Memory([np.arange(12, 12 + n) for n in (3, 40)])
    rows = PairRows(source, source, np.arange(2), seed=0, batch_size=2, shuffle=False)
    batch = PairBatches(rows, replace(IDS, source_end=(2, 9)), max_tokens=10).batch([0, 1])
    assert batch["input_ids_BT"].tolist() == [[12, 13, 14, 2, 9, 0, 0, 0, 0, 0], [*range(12, 20), 2, 9]]
    assert batch["labels"].tolist() == [[12, 13, 14, 2, *[IGNORE] * 6], [*range(12, 21), 2]]
