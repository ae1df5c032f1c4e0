"""Conversations in two chat templates, aligned in their answers."""

import numpy as np
import pytest

from llmctl.config import TokenizerConfig
from llmctl.data.batches import AnswerBatches, Ids
from llmctl.data.stream import ExampleRows, PackedExamples
from llmctl.distilling.alignment import Aligner
from llmctl.distilling.answer_alignment import AnswersInTwo, align_answers, common_ends, runs
from llmctl.losses.base import IGNORE
from llmctl.tokenizer.load import tokenizer_from_files
from llmctl.tokenizer.train import train_tokenizer
from tests.support.bpe import byte_level
from tests.support.spm import HAN, TEXT, published, sentences

TALKS = [
    [("the cat sat?", " on a mat, naïve café"), ("and 猫?", f" {HAN}。")],
    [("Hello", " Hello World ! 12345")],
    [("a", " the mat \U0001f600 spoke")],
]


class Listed:
    """Documents in memory."""

    def __init__(self, rows):
        self.rows = [np.array(row) for row in rows]
        self.lengths = np.array([len(row) for row in self.rows])

    def document(self, index):
        return self.rows[index]


def written(tokenizer, user, begin, end):
    """Return conversations in a template of these texts, and which tokens are answers."""
    ids, trained = [], []
    for talk in TALKS:
        parts = []
        for question, answer in talk:
            parts.append((tokenizer.encode(f"{user}{question}{begin}"), False))
            parts.append(([*tokenizer.encode_next(answer, after_special=False), end], True))
        ids.append([index for part, _ in parts for index in part])
        trained.append([flag for part, flag in parts for _ in part])
    return Listed(ids), Listed(trained)


@pytest.fixture(scope="module")
def made():
    return {
        "own": train_tokenizer([TEXT, HAN] * 40, TokenizerConfig(vocab_size=400)),
        "bytes": tokenizer_from_files(byte_level()),
        "prefix": tokenizer_from_files({"tokenizer.model": published(sentences(), 400)}),
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pair", [("own", "bytes"), ("bytes", "own"), ("prefix", "bytes"), ("bytes", "prefix")])
def test_answers_are_aligned_and_nothing_else(made, pair, packed):
    own, other = (made[name] for name in pair)
    ends = [next(index for index in range(40) if not one.piece_bytes(index)) for one in (own, other)]
    tokens, trained = written(own, "Q: ", "\nA:", ends[0])
    theirs = written(other, "<<user>> says ", "; the reply is:", ends[1])
    selection = np.arange(len(TALKS))
    options = {"seed": 0, "shuffle": False}
    rows = (
        PackedExamples(tokens.lengths - 1, selection, seq_len=400, **options)
        if packed
        else ExampleRows(tokens.lengths, selection, batch_size=3, **options)
    )
    ids = Ids(pad=0, eos=1, decoder_start=0, special=np.zeros(own.vocab_size, dtype=bool))
    source = AnswersInTwo(AnswerBatches(tokens, trained, rows, ids, 400), *theirs, 500)
    batch = source.batch(range(source.n_rows))
    aligner = Aligner(own, other)
    aligned = align_answers(aligner, batch)
    n_aligned = 0
    for row in range(len(batch["labels"])):
        labels, reads = batch["labels"][row], batch["teacher_input_ids"][row]
        answers = runs(labels != IGNORE)
        assert (aligned.place_BT[row][labels == IGNORE] == -1).all()
        teacher_answers = runs(batch["teacher_trained"][row] != 0)
        assert len(answers) == len(teacher_answers)
        for (begin, end), (first, _) in zip(answers, teacher_answers, strict=True):
            for position in range(begin, end):
                place = int(aligned.place_BT[row, position])
                if place < 0:
                    continue
                n_aligned += 1
                mine = own.decode_bytes(labels[begin:position].tolist())
                assert mine == other.decode_bytes(reads[first : place + 1].tolist())
            # The end of the answer is predicted by both.
            assert aligned.place_BT[row, end - 1] >= 0
    assert n_aligned > 12


def test_runs():
    assert runs(np.array([True, True, False, True])) == [(0, 2), (3, 4)]
    assert runs(np.array([False])) == []


def test_common_ends_stop_where_texts_differ():
    assert common_ends([b"ab", b"c"], [b"a", b"bc"]) == ([2, 3], [1, 3], False)
    own, other, differs = common_ends([b" a", b"b", b"x"], [b"a", b"b", b"y"])
    assert differs
    assert own[:2] == other[:2] == [1, 2]
    assert own[2] != other[2]
