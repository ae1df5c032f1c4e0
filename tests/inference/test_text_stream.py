"""A stream gives the text that decoding all ids at once gives, whatever the decoder."""

import json

import pytest

from llmctl.inference.text_stream import TextStream
from llmctl.tokenizer.huggingface import HuggingFaceTokenizer
from tests.support.bpe import TEXTS, byte_level

tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")

TEXT = "the cat sat on the mat, 0123456789 times. 猫坐在垫子上"


def trained(name: str) -> bytes:
    """Return a tokenizer.json with a decoder of its own."""
    models, decoders, trainers, pre = (
        getattr(tokenizers, part) for part in ("models", "decoders", "trainers", "pre_tokenizers")
    )
    options = {"special_tokens": ["[UNK]"], "show_progress": False, "vocab_size": 200}
    if name == "words":
        library, trainer = (
            tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]")),
            trainers.WordLevelTrainer(**options),
        )
    elif name == "suffixes":
        library = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        library.decoder, trainer = decoders.BPEDecoder(), trainers.BpeTrainer(end_of_word_suffix="</w>", **options)
    elif name == "word pieces":
        library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        library.decoder, trainer = decoders.WordPiece(), trainers.WordPieceTrainer(**options)
    else:
        return byte_level("gpt-2")["tokenizer.json"]
    library.pre_tokenizer = pre.Whitespace()
    library.train_from_iterator(TEXTS, trainer)
    return library.to_str().encode()


@pytest.mark.parametrize("name", ["words", "suffixes", "word pieces", "bytes"])
@pytest.mark.parametrize("n_prompt", [0, 1, 5])
def test_streamed_equals_decoded(name, n_prompt):
    tokenizer = HuggingFaceTokenizer(trained(name), {})
    ids = tokenizer.encode(TEXT)
    assert tokenizer.joins_bytes == (name == "bytes")
    stream = TextStream(tokenizer, (), begins=not n_prompt, context=ids[:n_prompt])
    text = "".join(stream.feed(token) for token in ids[n_prompt:]) + stream.close()
    assert tokenizer.decode(ids[:n_prompt]) + text == tokenizer.decode(ids)
    assert stream.text == text


def test_a_stop_string_between_words_is_found():
    tokenizer = HuggingFaceTokenizer(trained("words"), {})
    ids = tokenizer.encode("the cat sat on the mat")
    stream = TextStream(tokenizer, ("cat sat",), begins=True)
    assert "".join(stream.feed(token) for token in ids) == "the "
    assert stream.is_stopped


def test_bytes_of_a_piece_are_those_of_its_text():
    tokenizer = HuggingFaceTokenizer(trained("suffixes"), {})
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.decode_bytes(ids) == b"the cat sat "
    assert "</w>" in json.loads(trained("suffixes"))["model"]["end_of_word_suffix"]
