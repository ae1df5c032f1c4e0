"""Tokens added behind a sentencepiece vocabulary."""

import json
import pickle

import pytest
import sentencepiece

from llmctl.errors import ArtifactError, UsageError
from llmctl.tokenizer.load import find_tokenizer
from llmctl.tokenizer.sentencepiece import ALWAYS_PREFIX
from tests.support.spm import published

ENTRIES = {
    "400": {"content": "<|im_start|>", "special": True},
    "401": {"content": "<|im_end|>", "special": True},
    "402": {"content": "<tool>", "special": False},
}


@pytest.fixture(scope="module")
def proto() -> bytes:
    """A published model: it adds a space before the first word, unlike ours."""
    return published((f"the cat sat on a mat {n} and spoke to strings 猫 {n * n}" for n in range(200)), 400)


def files(proto: bytes, entries: dict = ENTRIES, **config: object) -> dict[str, bytes]:
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>", "legacy": False, **config}
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
    moved = {str(int(index) - 400 + size): entry for index, entry in entries.items()}
    config_json = json.dumps(settings | {"added_tokens_decoder": moved}).encode()
    return {"tokenizer.model": proto, "tokenizer_config.json": config_json}


def test_added_tokens_stand_behind_the_vocabulary(proto):
    base, ours = find_tokenizer({"tokenizer.model": proto}), find_tokenizer(files(proto))
    size = base.vocab_size
    assert (ours.vocab_size, ours.eos_id, ours.bos_id) == (size + 3, size + 1, base.bos_id)
    assert ours.special_id("<|im_start|>") == size
    assert ours.frame("encoder") == ((base.bos_id,), (size + 1,), (size + 1,))
    assert ours.encode("the cat") == base.encode("the cat")
    assert max(ours.encode("<|im_end|>")) < size  # special tokens in a text are text
    found = ours.encode("the cat <tool> sat")
    assert found.count(size + 2) == 1
    assert ours.decode(found) == "the cat <tool> sat"
    assert ours.decode([size, *found]) == "the cat <tool> sat"
    assert ours.sha256 != base.sha256
    assert pickle.loads(pickle.dumps(ours)).encode("the <tool>") == ours.encode("the <tool>")


def test_tokens_of_the_vocabulary_that_are_listed_again_change_nothing(proto):
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    listed = {str(400 - processor.get_piece_size() + 1): {"content": processor.id_to_piece(1), "special": True}}
    assert find_tokenizer(files(proto, listed)).vocab_size == processor.get_piece_size()


@pytest.mark.parametrize("flags", [{}, {"legacy": True}, {"legacy": True, ALWAYS_PREFIX: True}], ids=len)
def test_texts_are_split_at_tokens_of_the_vocabulary_that_are_text(flags: dict):
    """Without a space before them; that after them depends on the file: none, before words, or always."""
    proto = published((f"the cat sat on a mat {n}" for n in range(99)), 320, user_defined_symbols=["<tool>"])
    base = find_tokenizer({"tokenizer.model": proto})
    (tool,) = (index for index in range(base.vocab_size) if base.piece(index) == "<tool>")
    listed = {str(400 - base.vocab_size + tool): {"content": "<tool>", "special": False}}
    ours = find_tokenizer(files(proto, listed, **flags))
    assert ours.vocab_size == base.vocab_size
    word = base.encode("the")
    assert ours.encode("<tool>") == [tool]
    assert ours.encode("the<tool>the") == [
        *word,
        tool,
        *(word if flags else base.encode_next("the", after_special=False)),
    ]
    assert ours.encode("<tool> the") == [tool, *(base.encode(" the") if len(flags) == 2 else word)]
    assert ours.encode("  the") == base.encode("  the")
    assert pickle.loads(pickle.dumps(ours)).encode("<tool>the") == ours.encode("<tool>the")
    assert ours.encode_with_spans(["the cat"]) == base.encode_with_spans(["the cat"])
    with pytest.raises(UsageError, match="does not tell where"):
        ours.encode_with_spans(["the<tool>"])


def test_a_token_in_place_of_another_is_refused(proto):
    entry = {"tokenizer.model": proto, "added_tokens.json": b'{"<tool>": 7}'}
    with pytest.raises(ArtifactError, match="`<tool>` has the id 7"):
        find_tokenizer(entry)


def test_tokenizer_json_goes_before_a_published_model(proto, text_tokenizer):
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    both = {"tokenizer.model": proto, "tokenizer.json": library.to_str().encode()}
    assert find_tokenizer(both).vocab_size == 2
    # Ours has all tokens in both; the model is exact.
    assert find_tokenizer(text_tokenizer.files()).sha256 == text_tokenizer.sha256
