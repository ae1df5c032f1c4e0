"""Every answer follows its own prompt in a document of its own, and only its tokens are labels."""

import numpy as np
import pytest

from llmctl.data.batches import Ids
from llmctl.data.masking import IGNORE
from llmctl.data.preference_batches import PreferenceBatches
from llmctl.data.stream import ExampleRows


class Documents:
    def __init__(self, rows):
        self.rows = [np.array(row) for row in rows]
        self.lengths = np.array([len(row) for row in rows])

    def document(self, index):
        return self.rows[index]


PAIRS = Documents([[10, 11, 20, 21, 10, 11, 30], [12, 22, 12, 31, 32]])
TRAINED = Documents([[0, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 1]])
SINGLE = Documents([[10, 11, 20], [12, 22, 23]])
SINGLE_TRAINED = Documents([[0, 0, 1], [0, 1, 1]])
IDS = Ids(0, 2, 1, np.zeros(99, bool))


def rows(documents):
    return ExampleRows(documents.lengths, np.arange(2), seed=0, batch_size=2, shuffle=False)


@pytest.mark.parametrize("reference", [None, np.array([[-1.0, -2.0], [-3.0, -4.0]])])
def test_pairs(reference):
    batches = PreferenceBatches(
        PAIRS, TRAINED, np.array([4, 2]), np.ones(2, bool), rows(PAIRS), IDS, reference=reference
    )
    batch = batches.batch([0, 1])
    assert batch["input_ids_BT"].tolist() == [[10, 11, 20, 10, 11], [12, 12, 31, 0, 0]]
    assert batch["documents_BT"].tolist() == [[1, 1, 1, 2, 2], [1, 2, 2, 0, 0]]
    i = IGNORE
    assert batch["answers_BT"].tolist() == [[i, 20, 21, i, 30], [22, 31, 32, i, i]]
    assert batch["kinds_BS"].tolist() == [[1, 0], [1, 0]]
    assert batch["labels"].tolist() == [[0], [0]]
    if reference is not None:
        assert batch["reference_BS"].tolist() == reference.tolist()


def test_single_answers_with_those_of_other_prompts():
    reference = np.array([[-1.0, 0.0, -5.0], [-3.0, 0.0, -6.0]])
    batches = PreferenceBatches(
        SINGLE,
        SINGLE_TRAINED,
        np.array([3, 3]),
        np.array([True, False]),
        rows(SINGLE),
        IDS,
        counts_answers=True,
        mismatched=np.array([1, 0]),
        reference=reference,
    )
    batch = batches.batch([0, 1])
    i = IGNORE
    assert batch["kinds_BS"].tolist() == [[1, -1], [0, -1]]
    assert batch["labels"].tolist() == [[0, i], [0, i]]
    assert batch["other_input_ids_BT"].tolist() == [[10, 11, 22], [12, 0, 0]]
    assert batch["other_answers_BT"].tolist() == [[i, 22, 23], [20, i, i]]
    assert batch["reference_BS"].tolist() == [[-1.0, 0.0], [-3.0, 0.0]]
    assert batch["other_reference_BS"].tolist() == [[-5.0, 0.0], [-6.0, 0.0]]
