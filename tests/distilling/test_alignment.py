"""Tokens of two tokenizers, aligned by the bytes they stand for."""

import json

import numpy as np
import pytest

from llmctl.config import TokenizerConfig
from llmctl.distilling.alignment import Aligner, special_pairs, valid_texts
from llmctl.errors import UsageError
from llmctl.tokenizer.load import tokenizer_from_files
from llmctl.tokenizer.train import train_tokenizer
from tests.support.bpe import TEXTS, byte_level
from tests.support.spm import HAN, TEXT, published, sentences, trained


def tokenizers():
    """Return tokenizers of all kinds whose pieces keep the bytes of a text."""
    return {
        "own": train_tokenizer([TEXT, HAN] * 40, TokenizerConfig(vocab_size=400)),
        "bytes": tokenizer_from_files(byte_level()),
        "prefix": tokenizer_from_files({"tokenizer.model": published(sentences(), 400)}),
        "unigram": tokenizer_from_files({"tokenizer.model": trained(byte_fallback=True, vocab_size=480)}),
    }


KINDS = tuple(tokenizers())
WRITTEN = ["the cat sat on a mat", f"{HAN}。 Hello World !", "naïve café 12345 \U0001f600 x", "a\nb  c"]


@pytest.fixture(scope="module")
def made():
    return tokenizers()


@pytest.mark.parametrize("teacher", KINDS)
@pytest.mark.parametrize("student", KINDS)
def test_places_have_the_same_text_before_them(made, student, teacher):
    own, other = made[student], made[teacher]
    aligner = Aligner(own, other)
    for text in WRITTEN:
        eos = [own.eos_id] if own.eos_id is not None else []
        ids = np.array([own.encode(text) + eos])
        aligned = aligner.align(ids)
        assert (aligned.place_BT >= 0).sum() >= 2
        if own is other:
            assert (aligned.place_BT >= 0).all()
        for position, place in enumerate(aligned.place_BT[0].tolist()):
            if place < 0:
                continue
            assert aligned.begin_BT[0, position] == position
            mine = own.decode_bytes(ids[0, : position + 1].tolist())
            theirs = other.decode_bytes(aligned.ids_BS[0, : place + 1].tolist())
            if teacher == "unigram":  # it joins spaces and takes other forms of some characters
                mine, theirs = b"".join(mine.split()), b"".join(theirs.split())
            assert mine.removeprefix(b" ") == theirs.removeprefix(b" ")
        # The last byte of the text is the end of a token of both.
        assert aligned.place_BT[0, len(ids[0]) - 1 - len(eos)] >= 0


@pytest.mark.parametrize("teacher", KINDS)
def test_documents_stay_apart_and_a_cut_character_is_left_out(made, teacher):
    own = made["bytes"]
    first, second = own.encode("the cat"), own.encode("the mat 😀")
    ids = np.array([first + second[:-2] + [0, 0]])
    documents = np.array([[1] * len(first) + [2] * (len(second) - 2) + [0, 0]])
    aligned = Aligner(own, made[teacher]).align(ids, documents)
    for document, text in ((1, "the cat"), (2, "the mat ")):
        found = made[teacher].decode(aligned.ids_BS[0][aligned.documents_BS[0] == document].tolist())
        assert found.strip() == text.strip()
    assert (aligned.place_BT[0, -4:] == -1).all()


def test_what_the_teacher_does_not_read_has_no_place(made):
    own, other = made["own"], made["bytes"]
    ids = np.array([own.encode(TEXT)])
    whole = Aligner(own, other).align(ids)
    short = Aligner(own, other, max_tokens=9).align(ids)
    assert short.ids_BS.tolist() == whole.ids_BS[:, :9].tolist()
    assert (short.place_BT == np.where(whole.place_BT < 9, whole.place_BT, -1)).all()
    assert short.place_BT.max() <= 8
    assert (short.begin_BT <= whole.begin_BT).all()


def test_special_tokens_correspond_by_name_and_then_by_role(made):
    files = byte_level()
    content = json.loads(files["tokenizer.json"])
    shape = content["added_tokens"][0]
    for index, name in ((303, "</s>"), (304, "<|user|>")):
        content["added_tokens"].append(shape | {"id": index, "content": name})
        content["model"]["vocab"][name] = index
    other = tokenizer_from_files({"tokenizer.json": json.dumps(content).encode()})
    own = made["own"]
    assert special_pairs(own, other)[own.eos_id] == 303
    ids = own.encode("the cat", eos=True) + own.encode("a mat")
    aligned = Aligner(own, other).align(np.array([ids]))
    assert aligned.ids_BS[0].tolist() == [*other.encode("the cat"), 303, *other.encode("a mat")]


def test_valid_texts_leaves_out_parts_of_characters():
    raw = "a猫".encode()
    assert valid_texts(raw[2:] + b"b" + raw[:-1]) == [(2, "ba")]
    assert valid_texts(raw) == [(0, "a猫")]
    assert valid_texts(b"") == []


def test_a_tokenizer_that_changes_its_text_is_refused(made):
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    vocabulary = {name: index for index, name in enumerate(["[UNK]", "the", "cat", "##s"])}
    content = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        },
    }
    words = tokenizer_from_files({"tokenizer.json": json.dumps(content).encode()})
    with pytest.raises(UsageError, match="student"):
        Aligner(words, made["own"])
    assert TEXTS
