"""Old vocabulary files become the tokenizer that their class builds, compared with the library's own parts."""

import json
from pathlib import Path

import pytest

from llmctl.errors import ArtifactError
from llmctl.tokenizer.load import find_tokenizer
from tests.support.bpe import byte_level

tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "cafe",
    "café",
    "über",
    "uber",
    "中文",
    "中",
    "文",
    "Cafe",
    "##s",
]
TEXTS = ["Café über", "中文", "CAFES"]


def word_pieces(config: dict, words: list[str] = WORDS) -> dict[str, bytes]:
    return {"vocab.txt": ("\n".join(words) + "\n").encode(), "tokenizer_config.json": json.dumps(config).encode()}


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {}),
        ({"do_lower_case": False}, {"lowercase": False}),
        ({"do_lower_case": True, "strip_accents": False}, {"strip_accents": False}),
        ({"do_lower_case": False, "strip_accents": True}, {"lowercase": False, "strip_accents": True}),
        ({"tokenize_chinese_chars": False}, {"handle_chinese_chars": False}),
    ],
)
def test_berts_settings_are_honored(config, settings):
    ours = find_tokenizer(word_pieces(config | {"tokenizer_class": "BertTokenizer"}))
    model = tokenizers.models.WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    library = tokenizers.Tokenizer(model)
    library.normalizer = tokenizers.normalizers.BertNormalizer(**settings)
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    for text in TEXTS:
        assert ours.encode(text) == library.encode(text).ids


def test_other_classes_are_refused_by_name():
    with pytest.raises(ArtifactError, match="BertJapaneseTokenizer"):
        find_tokenizer(word_pieces({"tokenizer_class": "BertJapaneseTokenizer"}))
    files = merges_files({"tokenizer_class": "WhisperTokenizer"})
    with pytest.raises(ArtifactError, match="WhisperTokenizer"):
        find_tokenizer(files)


def test_suspicious_lines_are_named(caplog):
    find_tokenizer(word_pieces({}, [*WORDS, "", "cafe"]))
    assert "line 15 of `vocab.txt` is blank" in caplog.text
    assert "line 16 of `vocab.txt` repeats line 6: `cafe`" in caplog.text
    with pytest.raises(ArtifactError, match="byte order mark"):
        find_tokenizer(word_pieces({}, ["\ufeff[PAD]", *WORDS[1:]]))


def merges_files(config: dict, *, first: tuple[str, ...] = ("<|endoftext|>",), added: dict | None = None) -> dict:
    model = json.loads(byte_level("gpt-2")["tokenizer.json"])["model"]
    pieces = [piece for piece in model["vocab"] if not piece.startswith("<")]
    vocabulary = {piece: index for index, piece in enumerate([*first, *pieces])}
    merges = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])]
    files = {"vocab.json": vocabulary, "tokenizer_config.json": config, "added_tokens.json": added or {}}
    return {name: json.dumps(content).encode() for name, content in files.items()} | {
        "merges.txt": "\n".join(merges).encode()
    }


def test_each_class_cuts_words_in_its_way():
    gpt2 = find_tokenizer(merges_files({"tokenizer_class": "GPT2Tokenizer"}))
    prefixed = find_tokenizer(merges_files({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}))
    qwen = find_tokenizer(merges_files({"tokenizer_class": "Qwen2TokenizerFast"}))
    assert prefixed.encode("the cat") == gpt2.encode(" the cat")
    assert len(qwen.encode("0123456789")) == 10 > len(gpt2.encode("0123456789"))  # one digit a word
    assert qwen.encode("e\u0301") == qwen.encode("\u00e9")  # NFC
    first = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    bart = find_tokenizer(merges_files({"tokenizer_class": "BartTokenizer"}, first=first))
    assert (bart.bos_id, bart.pad_id, bart.eos_id, bart.mask_id) == (0, 1, 2, 4)
    assert bart.frame("encoder_decoder") == ((0,), (2, 2), (2,))
    assert bart.special_tokens()["<mask>"].strips_left
    assert find_tokenizer(merges_files({}, first=first)).frame("encoder").before == (0,)


def test_added_tokens_are_added():
    size = len(json.loads(merges_files({})["vocab.json"]))
    added = {"<|im_end|>": size, "<tool>": size + 1}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    ours = find_tokenizer(merges_files(config, added=added))
    assert (ours.vocab_size, ours.eos_id, ours.special_id("<|im_end|>")) == (size + 2, size, size)
    assert ours.encode("the <tool>")[-1] == size + 1  # not special: part of a text
    assert size not in ours.encode("the <|im_end|>")
    with pytest.raises(ArtifactError, match=f"`<tool>` has the id {size + 7}"):
        find_tokenizer(merges_files(config, added={"<tool>": size + 7}))


def test_files_of_a_folder_are_read_together(tmp_path: Path):
    from llmctl.tokenizer.load import load_tokenizer

    size = len(json.loads(merges_files({})["vocab.json"]))
    for name, data in merges_files({}, added={"<tool>": size}).items():
        (tmp_path / name).write_bytes(data)
    assert load_tokenizer(tmp_path).vocab_size == load_tokenizer(tmp_path / "vocab.json").vocab_size == size + 1
