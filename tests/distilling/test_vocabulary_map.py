"""Events of two vocabularies."""

import json

import numpy as np
import pytest

from llmctl.config import TokenizerConfig
from llmctl.distilling.alignment import special_pairs
from llmctl.distilling.vocabulary_map import map_vocabularies
from llmctl.tokenizer.load import tokenizer_from_files
from llmctl.tokenizer.train import train_tokenizer
from tests.support.bpe import TEXTS, byte_level
from tests.support.spm import HAN, TEXT, published, sentences


def shuffled(files, seed=0):
    """Return a tokenizer.json with the same pieces under other ids, and the new id of each."""
    content = json.loads(files["tokenizer.json"])
    vocabulary = content["model"]["vocab"]
    ids = sorted(vocabulary.values())
    moved = dict(zip(ids, np.random.default_rng(seed).permutation(ids).tolist(), strict=True))
    content["model"]["vocab"] = {piece: moved[index] for piece, index in vocabulary.items()}
    for added in content["added_tokens"]:
        added["id"] = moved[added["id"]]
    content["added_tokens"].sort(key=lambda added: added["id"])
    return {"tokenizer.json": json.dumps(content).encode()}, moved


def test_the_same_pieces_in_another_order_are_only_reordered():
    files = byte_level()
    other, moved = shuffled(files)
    student, teacher = tokenizer_from_files(files), tokenizer_from_files(other)
    found = map_vocabularies(student, teacher, special_pairs(student, teacher))
    assert student.encode(TEXTS[0]) != teacher.encode(TEXTS[0])
    for index, there in moved.items():
        assert found.student_event[index] == found.teacher_event[there]
    assert len(set(found.student_event[list(moved)].tolist())) == len(moved)


@pytest.fixture(scope="module")
def two():
    own = train_tokenizer([TEXT, HAN] * 40, TokenizerConfig(vocab_size=420))
    return own, tokenizer_from_files({"tokenizer.model": published(sentences(), 500)})


@pytest.mark.parametrize("turned", [False, True])
def test_every_token_of_the_teacher_is_written_in_tokens_of_the_student(two, turned):
    student, teacher = two[::-1] if turned else two
    found = map_vocabularies(student, teacher, special_pairs(student, teacher))
    n_told = 0
    for index, pieces in enumerate(found.pieces):
        data = teacher.piece_bytes(index)
        if not data:
            continue
        written = student.decode_bytes(list(pieces))
        assert data.startswith(written)
        n_told += written == data
        if pieces:
            assert found.teacher_event[index] == found.student_event[pieces[0]]
    assert n_told > 0.9 * teacher.vocab_size
    # Every token of the student is some event, and only special tokens may have one without a token of the teacher.
    assert (found.student_event >= 0).all()
    reached = set(found.teacher_event.tolist())
    alone = [index for index, event in enumerate(found.student_event.tolist()) if event not in reached]
    assert all(not student.piece_bytes(index) for index in alone)


def test_continuations_are_the_tokens_that_begin_with_what_is_written(two):
    student, teacher = two
    found = map_vocabularies(student, teacher, special_pairs(student, teacher))
    written = next(pieces[:1] for pieces in found.pieces if len(pieces) > 1)
    tokens, events = found.continuations(written)
    wanted = [index for index, pieces in enumerate(found.pieces) if pieces[:1] == written]
    assert sorted(tokens.tolist()) == wanted
    for index, event in zip(tokens.tolist(), events.tolist(), strict=True):
        pieces = found.pieces[index]
        assert event == (found.student_event[pieces[1]] if len(pieces) > 1 else -1)
    index, pieces = next((index, own) for index, own in enumerate(found.pieces) if len(own) > 1)
    last = found.student_bytes[pieces[-1]]
    longer = [one for one, data in enumerate(found.student_bytes) if data.startswith(last) and len(data) > len(last)]
    for label in longer:
        told = found.beyond(index, pieces[:-1], label)
        same = found.student_event[label] == found.student_event[pieces[-1]]
        assert told == ((-1, -1) if same else (index, found.student_event[pieces[-1]]))
    assert found.beyond(index, pieces[:-1], pieces[-1]) == (-1, -1)
    assert found.beyond(index, (), pieces[0]) == (-1, -1)
    nothing, _ = found.continuations((student.vocab_size + 5,))
    assert len(nothing) == 0
