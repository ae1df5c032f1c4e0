"""Trimmed vocabularies: the same pieces for texts of pieces that stay, for every kind of tokenizer."""

import json
from functools import cache

import pytest

from llmctl.config import TokenizerConfig
from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.load import find_tokenizer
from llmctl.tokenizer.sentencepiece_classes import CLASSES
from llmctl.tokenizer.train import train_tokenizer
from llmctl.tokenizer.trim import merged_from, trim
from tests.support.bpe import TEXTS as BYTE_TEXTS
from tests.support.bpe import byte_level
from tests.support.spm import folder_files, sentences, trained
from tests.support.spm import published as llama

LINES = list(sentences())
OWN = ["bpe", "unigram"]
KINDS = [
    *OWN,
    "llama",
    "unigram-model",
    "byte-level",
    "ignore-merges",
    "word-pieces",
    "suffixes",
    "unigram-json",
    *CLASSES,
]


@cache
def files_of(kind: str) -> dict[str, bytes]:
    """Return the files of a small tokenizer."""
    if kind in CLASSES:
        return folder_files(kind)
    if kind in OWN:
        return train_tokenizer(LINES, TokenizerConfig(vocab_size=420, model_type=kind, n_sentinels=2)).files()
    if kind == "llama":
        config = {"added_tokens_decoder": {"420": {"content": "<|im_end|>", "special": True}}}
        return {"tokenizer.model": llama(LINES, 420), "tokenizer_config.json": json.dumps(config).encode()}
    if kind == "unigram-model":
        return {"tokenizer.model": trained()}
    if kind in ("byte-level", "ignore-merges"):
        return byte_level("gpt-2" if kind == "byte-level" else "llama-bpe")
    return {"tokenizer.json": by_library(kind).encode()}


def by_library(kind: str) -> str:
    """Return a tokenizer.json that the library trained."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    models, trainers, parts = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    special = ["[UNK]", "[CLS]", "[SEP]"]
    if kind == "word-pieces":
        made = models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=330, special_tokens=special)
    elif kind == "suffixes":
        options = {"unk_token": "[UNK]", "end_of_word_suffix": "</w>"}
        made = (
            models.BPE(**options),
            trainers.BpeTrainer(vocab_size=330, special_tokens=special, end_of_word_suffix="</w>"),
        )
    else:
        trainer = trainers.UnigramTrainer(vocab_size=240, special_tokens=special, unk_token="[UNK]")
        made = models.Unigram(), trainer
    tokenizer = tokenizers.Tokenizer(made[0])
    tokenizer.pre_tokenizer = parts.Whitespace()
    tokenizer.train_from_iterator(LINES, made[1])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = tokenizers.processors.BertProcessing(*ends)
    return str(tokenizer.to_str())


def used(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Return the ids of texts, as sources and as targets, in a fixed order that is not theirs."""
    encoders = (tokenizer, tokenizer.for_target)
    found = {index for one in encoders for ids in one.encode_batch(texts) for index in ids}
    return sorted(found, key=lambda index: (index * 7919) % 1009)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_kept_pieces_have_the_same_pieces(kind):
    files = files_of(kind)
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    texts = BYTE_TEXTS[:1] if kind in ("byte-level", "ignore-merges") else LINES[:12]
    others = ["the cat fragt, \u2581 café 345", "naïve Frosch 😀", "公园很好", "sat on it\n\nthe mats"]
    result = trim(tokenizer, files, used(tokenizer, texts))
    new, kept = result.tokenizer, result.kept
    assert len(kept) == new.vocab_size < tokenizer.vocab_size
    assert kept == sorted(kept)
    n_equal = 0
    for before, after in ((tokenizer, new), (tokenizer.for_target, new.for_target)):
        assert [after.piece(index) for index in range(len(kept))] == [before.piece(index) for index in kept]
        for text in [*texts, *LINES[12:60], *others]:
            old, found = before.encode(text), [kept[index] for index in after.encode(text)]
            assert found == old or not {*old} <= {*kept}, text
            n_equal += found == old
    assert n_equal >= 2 * len(texts)
    for role in ("pad_id", "unk_id", "bos_id", "eos_id", "mask_id"):
        old_id, new_id = getattr(tokenizer, role), getattr(new, role)
        assert (None if new_id is None else kept[new_id]) == old_id, role
    assert new.special_tokens().keys() == tokenizer.special_tokens().keys()
    frames = [tuple(kept[index] for index in part) for part in new.frame("encoder")]
    assert frames == list(tokenizer.frame("encoder"))
    assert find_tokenizer(new.files()).sha256 == new.sha256
    again = trim(new, result.files, range(new.vocab_size))
    assert again.kept == list(range(new.vocab_size))
    assert again.tokenizer.encode_batch(LINES[:20]) == new.encode_batch(LINES[:20])


@pytest.mark.parametrize("kind", ["bpe", "unigram", "llama", "byte-level", "ignore-merges"])
def test_what_is_not_kept_is_written_in_smaller_pieces(kind):
    files = files_of(kind)
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    new = trim(tokenizer, files, []).tokenizer
    for text in (*LINES[:4], "猫 \u2581 😀", "<|end|> x"):
        assert new.decode(new.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_characters_stay_where_no_bytes_take_their_place():
    files = files_of("word-pieces")
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    new = trim(tokenizer, files, []).tokenizer
    assert new.unk_id not in new.encode("the cat sat on ein Frosch")
    assert all(len(new.piece(index).removeprefix("##")) == 1 or index < 3 for index in range(new.vocab_size))


def test_the_first_pieces_stay_within_a_size():
    files = files_of("bpe")
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    ranked = tokenizer.encode("the cat sat on a mat and naïve café")
    least = trim(tokenizer, files, []).tokenizer.vocab_size
    result = trim(tokenizer, files, ranked, least + 9)
    assert result.tokenizer.vocab_size <= least + 9
    assert ranked[0] in result.kept
    assert not {*ranked} <= {*result.kept}
    with pytest.raises(UsageError, match=rf"`--vocab-size {least - 1}` is smaller than the {least} "):
        trim(tokenizer, files, ranked, least - 1)


def test_files_beside_have_the_new_ids():
    files = files_of("byte-level")
    settings = {"eos_token_id": [0, 302], "suppress_tokens": [5, 290], "forced_bos_token_id": 290, "top_k": 302}
    config = {"added_tokens_decoder": {"302": {"content": "<think>", "special": False}}}
    files = files | {
        "generation_config.json": json.dumps(settings).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "vocab.json": b"{}",
    }
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    result = trim(tokenizer, files, [])
    last = len(result.kept) - 1
    assert result.kept[last] == 302
    found = json.loads(result.files["generation_config.json"])
    assert found == settings | {"eos_token_id": [0, last], "suppress_tokens": [5], "forced_bos_token_id": None}
    assert json.loads(result.files["tokenizer_config.json"])["added_tokens_decoder"].keys() == {str(last)}
    assert "vocab.json" not in result.files


def test_a_vocabulary_for_each_language_is_refused():
    files = folder_files("Marian", separate_vocabs=True)
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    with pytest.raises(UnsupportedModelError, match="a vocabulary for each language"):
        trim(tokenizer, files, [])


def test_a_piece_is_merged_by_rank_and_from_the_left():
    ranks = {("a", "b"): 1, ("b", "a"): 0, ("a", "ba"): 2, ("aba", "b"): 3}
    assert merged_from(list("abab"), lambda *pair: ranks.get(pair)) == {"a", "b", "ba", "aba", "abab"}
    assert merged_from(list("abc"), lambda *pair: ranks.get(pair)) == set()
