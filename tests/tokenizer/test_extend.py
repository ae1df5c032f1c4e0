"""Vocabularies with more pieces: what they join is what the tokenizer made before."""

import json

import pytest

from llmctl.config import TokenizerConfig
from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.tokenizer.extend import extend
from llmctl.tokenizer.load import find_tokenizer
from llmctl.tokenizer.train import train_tokenizer
from tests.support.bpe import TEXTS, byte_level
from tests.support.spm import published, sentences, trained

NEW = ["春眠不觉晓，处处闻啼鸟。\n", "夜来风雨声，花落知多少。\n", "春风花草香，处处闻啼鸟。\n"] * 3


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
@pytest.mark.parametrize("is_text", [False, True])
def test_new_pieces_join_the_old_ones_and_other_texts_keep_theirs(pre, is_text):
    files = byte_level(pre)
    content = json.loads(files["tokenizer.json"])
    if is_text:  # the older form of merges
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        files = {"tokenizer.json": json.dumps(content).encode()}
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    result = extend(tokenizer, files, NEW, 40)
    new = result.tokenizer
    assert new.vocab_size == tokenizer.vocab_size + 40
    assert sorted(result.parts) == list(range(tokenizer.vocab_size, new.vocab_size))
    for text in (*NEW[:3], *TEXTS[:1], "声声 <think> 春眠"):
        before, after = tokenizer.encode(text), new.encode(text)
        assert [old for index in after for old in result.parts.get(index, [index])] == before
        assert new.decode(after) == tokenizer.decode(before)
    for index, old in result.parts.items():
        assert new.piece_bytes(index) == b"".join(tokenizer.piece_bytes(one) for one in old)
    assert len(new.encode(NEW[0])) < len(tokenizer.encode(NEW[0])) / 2
    assert new.encode(TEXTS[0][:30]) == tokenizer.encode(TEXTS[0][:30])
    assert new.special_tokens() == tokenizer.special_tokens()


def test_other_vocabularies_and_texts_without_pairs_are_refused():
    files = byte_level()
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    with pytest.raises(UsageError, match="stand together twice"):
        extend(tokenizer, files, ["x"], 5)
    suffixed = json.loads(files["tokenizer.json"])
    suffixed["model"]["end_of_word_suffix"] = "</w>"
    other = {"tokenizer.json": json.dumps(suffixed).encode()}
    clip = find_tokenizer(other)
    assert clip is not None
    with pytest.raises(UnsupportedModelError, match="cannot be extended"):
        extend(clip, other, NEW, 5)


def metaspace(kind: str) -> dict[str, bytes]:
    """Return a tokenizer.json as of Llama 2 (BPE with bytes) or T5 (Unigram), made of a sentencepiece model's pieces."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    texts = list(sentences())
    models, trainers = tokenizers.models, tokenizers.trainers
    specials = ["<unk>", "</s>"]
    if kind == "bpe":
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials + bytes_, show_progress=False)
        tokenizer.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
        )
        steps = [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
        tokenizer.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
    latin = [text for text in texts if text.isascii()]
    tokenizer.train_from_iterator(latin, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if not one["content"].startswith("<0x")]
    return {"tokenizer.json": json.dumps(content).encode()}


def wordpiece() -> dict[str, bytes]:
    """Return a tokenizer.json as of BERT."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True, handle_chinese_chars=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator([text for text in sentences() if text.isascii()], trainer)
    return {"tokenizer.json": tokenizer.to_str().encode()}


LATIN = [text for text in sentences() if text.isascii()]
FILES = {
    "own-bpe": lambda: train_tokenizer(LATIN, TokenizerConfig(vocab_size=420)).files(),
    "own-unigram": lambda: train_tokenizer(LATIN, TokenizerConfig(vocab_size=420, model_type="unigram")).files(),
    "published-bpe": lambda: {"tokenizer.model": published(LATIN, 420)},
    "published-unigram": lambda: {"tokenizer.model": trained(LATIN, byte_fallback=True, vocab_size=420)},
    "without-bytes": lambda: {"tokenizer.model": trained(LATIN)},
    "metaspace-bpe": lambda: metaspace("bpe"),
    "metaspace-unigram": lambda: metaspace("unigram"),
    "wordpiece": wordpiece,
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_learns_characters_and_pairs(kind):
    files = FILES[kind]()
    tokenizer = find_tokenizer(files)
    assert tokenizer is not None
    new_texts = [text.strip() for text in NEW] + ["quantized transformers quantize quickly"] * 4
    result = extend(tokenizer, files, new_texts, 60)
    new, first = result.tokenizer, tokenizer.vocab_size
    assert new.vocab_size > first + 20
    assert sorted(result.parts) == list(range(first, new.vocab_size))
    assert [new.piece(index) for index in range(first)] == [tokenizer.piece(index) for index in range(first)]
    assert new.special_tokens() == tokenizer.special_tokens()
    # The texts that were learned are shorter, and each new piece is that of what it replaces.
    for text in (new_texts[0], new_texts[-1]):
        before, after = tokenizer.encode(text), new.encode(text)
        if tokenizer.unk_id in before:  # without bytes it was unknown text
            assert after.count(new.unk_id) < max(1, 0.5 * len(after))
        else:
            assert len(after) < 0.7 * len(before)
        if tokenizer.decode(before) == text:
            assert new.decode(after) == text
    for index, old in result.parts.items():
        assert old
        assert all(one < first for one in old)
        if tokenizer.unk_id not in old:
            assert new.piece_bytes(index).strip() == b"".join(tokenizer.piece_bytes(one) for one in old).strip()
    # The library reads the file as we do.
    if "tokenizer.model" in result.files:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=result.files["tokenizer.model"])
        assert [processor.encode(text) for text in LATIN[:20]] == new.encode_batch(LATIN[:20])
        assert processor.get_piece_size() == new.vocab_size
    # Pieces of another script leave texts without it as they are.
    other = extend(tokenizer, files, new_texts[:9], 30).tokenizer
    assert other.vocab_size > first
    assert other.encode_batch(LATIN) == tokenizer.encode_batch(LATIN)
