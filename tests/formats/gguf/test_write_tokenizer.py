"""Tokenizers into GGUF and back: the same pieces and ids, and what llama.cpp would split otherwise is refused."""

import json

import pytest

from llmctl.config import TokenizerConfig
from llmctl.errors import ArtifactError
from llmctl.formats.gguf.tokenizer import tokenizer_files
from llmctl.formats.gguf.write_tokenizer import pre_tokenizer_name, tokenizer_values
from llmctl.tokenizer.load import tokenizer_from_files
from llmctl.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from llmctl.tokenizer.protobuf import fields
from llmctl.tokenizer.train import train_tokenizer
from tests.support.bpe import TEXTS, byte_level

PROBES = ["", " ", "the  cat\n\n sat", "猫和狗 é 🙂 \x00", "<s> <pad> <0x41> 2024"]


@pytest.fixture(scope="module")
def pieces():
    return train_tokenizer(TEXTS, TokenizerConfig(vocab_size=330, n_sentinels=2))


def there_and_back(files, vocab_size, ids=None, *, adds_bos=False, template=None):
    values = tokenizer_values(files, vocab_size, ids or {}, adds_bos=adds_bos, template=template)
    return values, tokenizer_files(values, vocab_size, 64)


def test_pieces_come_back_with_scores_and_types(pieces):
    ids = {"bos": pieces.bos_id, "eos": pieces.eos_id, "unknown": pieces.unk_id, "padding": pieces.pad_id}
    values, files = there_and_back(pieces.files(), pieces.vocab_size + 3, ids, adds_bos=True, template="{{ x }}")
    back = tokenizer_from_files(files)
    assert back.scored_pieces()[: pieces.vocab_size] == pieces.scored_pieces()
    assert [back.piece(pieces.vocab_size + n) for n in range(3)] == [f"[PAD{pieces.vocab_size + n}]" for n in range(3)]
    assert back.encode_batch(PROBES) == pieces.encode_batch(PROBES)
    assert [back.decode(back.encode(text)) for text in PROBES] == PROBES
    assert back.is_lossless
    assert back.special_tokens() == pieces.special_tokens()
    assert (back.bos_id, back.eos_id, back.unk_id, back.pad_id) == (2, 3, 1, 0)
    assert back.sentinel_ids() == pieces.sentinel_ids()
    assert values["tokenizer.ggml.add_space_prefix"] is False
    assert files["chat_template.jinja"] == b"{{ x }}"


def test_a_published_sentencepiece_model_keeps_its_prefix(shared_data):
    proto = (shared_data / "models" / "stories260K" / "hf" / "tokenizer.model").read_bytes()
    values, files = there_and_back({"tokenizer.model": proto}, 512, {"unknown": 0, "bos": 1, "eos": 2})
    assert values["tokenizer.ggml.add_space_prefix"] is True
    ours, back = tokenizer_from_files({"tokenizer.model": proto}), tokenizer_from_files(files)
    assert back.encode_batch(PROBES) == ours.encode_batch(PROBES)


def test_tokens_that_the_config_puts_behind_have_their_names(pieces):
    config = {"added_tokens_decoder": {str(pieces.vocab_size): {"content": "<|im_end|>"}, "0": {"content": "no"}}}
    files = {**pieces.files(), "tokenizer_config.json": json.dumps(config).encode()}
    _, read = there_and_back(files, pieces.vocab_size + 1)
    back = tokenizer_from_files(read)
    assert back.special_id("<|im_end|>") == pieces.vocab_size
    assert back.piece(0) == "<pad>"


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_bpe_comes_back(pre):
    files = byte_level(pre)
    values, read = there_and_back(files, 305, {"eos": 0})
    assert values["tokenizer.ggml.pre"] == pre
    assert values["tokenizer.ggml.tokens"][301:] == ["[PAD301]", "<think>", "[PAD303]", "[PAD304]"]
    ours, back = tokenizer_from_files(files), tokenizer_from_files(read)
    texts = [*PROBES, "<think> a<|end|>b", "12345 don't DON'T\r\n\r\n  x"]
    assert back.encode_batch(texts) == ours.encode_batch(texts)
    assert [back.decode(back.encode(text)) for text in texts] == texts
    assert back.special_tokens().keys() == ours.special_tokens().keys() == {"<|end|>"}


def test_the_regular_expressions_are_the_published_ones():
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2", reason="pip install '.[interop]'")
    split = PRE_TOKENIZERS["qwen2"].steps["pretokenizers"][0]
    assert split["pattern"]["Regex"] == qwen2.PRETOKENIZE_REGEX


def test_a_pre_tokenizer_is_told_by_what_it_does():
    inner = PRE_TOKENIZERS["smollm"].steps["pretokenizers"]
    nested = {"type": "Sequence", "pretokenizers": [inner[0], {"type": "Sequence", "pretokenizers": [inner[1]]}]}
    spelled = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}  # older: no use_regex
    for steps, name in ((nested, "smollm"), (spelled, "gpt-2")):
        content = json.loads(byte_level(pre_tokenizer=steps)["tokenizer.json"])
        assert pre_tokenizer_name(content) == name


def test_what_llama_cpp_would_split_otherwise_is_refused(shared_data):
    published = shared_data / "tokenizers"
    unigram = (published / "sentencepiece-unigram-en" / "test_model.model").read_bytes()
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    model = json.loads(byte_level()["tokenizer.json"])["model"]
    swallowing = [{"id": 0, "content": "<|end|>", "special": True, "lstrip": True}]
    cases = {
        "unigram": {"tokenizer.model": unigram},
        "WordPiece": {"tokenizer.json": json.dumps({"model": {"type": "WordPiece"}}).encode()},
        "way of its own": byte_level(pre_tokenizer=spaced),
        "not byte-level": byte_level(decoder={"type": "Fuse"}),
        "swallow": byte_level(added_tokens=swallowing),
        "continuing_subword_prefix": byte_level(model=model | {"continuing_subword_prefix": "##"}),
        "byte_fallback": byte_level(model=model | {"byte_fallback": True}),
        "no merges": byte_level(model=model | {"merges": []}),
    }
    for message, files in cases.items():
        with pytest.raises(ArtifactError, match=message) as raised:
            tokenizer_values(files, 400_000, {}, adds_bos=False, template=None)
        assert "sentencepiece BPE" in raised.value.hint
    normalizer = b"\x1a\x03\x12\x01x"  # normalizer_spec { precompiled_charsmap: "x" }
    proto = train_tokenizer(TEXTS, TokenizerConfig(vocab_size=330)).files()["tokenizer.model"]
    with pytest.raises(ArtifactError, match="changes the text"):
        tokenizer_values({"tokenizer.model": proto + normalizer}, 400, {}, adds_bos=False, template=None)


def test_more_tokens_than_rows_are_refused(pieces):
    with pytest.raises(ArtifactError, match="300 rows"):
        tokenizer_values(pieces.files(), 300, {}, adds_bos=False, template=None)


def test_a_damaged_model_is_refused():
    assert list(fields(b"\x08\x96\x01\x15\x00\x00\x80\x3f\x1a\x01a")) == [(1, 150), (2, b"\x00\x00\x80\x3f"), (3, b"a")]
    for data in (b"\x08", b"\x1a\x05a", b"\x0b", b"\x15\x00"):
        with pytest.raises(ArtifactError, match="sentencepiece"):
            list(fields(data))
