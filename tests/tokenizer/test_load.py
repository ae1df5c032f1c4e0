"""Published tokenizers give the ids their references say, and what is no tokenizer is refused."""

import json
import pickle
import subprocess
import sys

import pytest

from llmctl.errors import ArtifactError, NotFoundError, UsageError
from llmctl.tokenizer.load import load_tokenizer, tokenizer_from_files

PLACES = {
    "gpt2": "gpt2",
    "bert-en": "bert-en/vocab.txt",
    "bert-zh": "bert-zh/vocab.txt",
    "sentencepiece-unigram-en": "sentencepiece-unigram-en/test_model.model",
    "sentencepiece-ja": "sentencepiece-ja/test_ja_model.model",
}


@pytest.mark.parametrize("name", PLACES)
def test_ids_equal_the_reference(shared_data, name: str):
    folder = shared_data / "tokenizers"
    rows = json.loads((folder / "reference.json").read_text(encoding="utf-8"))[name]["rows"]
    tokenizer = load_tokenizer(folder / PLACES[name])
    has_ends = name.startswith("bert")
    for row in rows:
        expected = row["ids"][1:-1] if has_ends else row["ids"]
        assert tokenizer.encode(row["text"]) == expected, row["text"]
        if has_ends:
            assert tokenizer.encode(row["text"], bos=True, eos=True) == row["ids"]
    assert len(rows) == 18
    again = tokenizer_from_files(tokenizer.files())
    texts = [row["text"] for row in rows]
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    # Worker processes get their own copy; the standard library's pickle serves only to send it there.
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(texts) == tokenizer.encode_batch(texts)


@pytest.mark.parametrize("name", ["gpt2", "bert-en"])
def test_what_looks_special_in_a_text_is_text(shared_data, name: str):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / PLACES[name])
    specials = {tokenizer.special_id(text) for text in ("[MASK]", "[CLS]", "<|endoftext|>")} - {None}
    assert specials
    assert not set(tokenizer.encode("[MASK] [CLS] <|endoftext|>")) & specials


def test_byte_level_pieces_are_exact_bytes(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "gpt2")
    for text in ("naïve 中文 🀄", "  two\n\nlines\t", "\0"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_nothing_there_and_nothing_known(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "notes.md").write_text("hello")
    for path in (tmp_path / "notes.md", tmp_path):
        with pytest.raises(UsageError):
            load_tokenizer(path)


@pytest.mark.parametrize("content", [b"{}", b"not json", b'{"model": 3}', b"\xff\xfe"])
def test_a_damaged_tokenizer_json_is_refused(tmp_path, content: bytes):
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0[1,2,3] ", b"\xff" * 40])
def test_a_hostile_header_is_refused(tmp_path, content: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises((ArtifactError, UsageError)):
        load_tokenizer(path)


def test_without_the_extra_the_error_names_it(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from llmctl.cli import run; sys.exit(run(['tokenize', '-m', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], input=b"a\n", capture_output=True, check=False)
    assert done.returncode == 7
    assert b"pip install tokenizers" in done.stderr


HARM = {
    "vocab.txt is not UTF-8": {"vocab.txt": b"[UNK]\n\xff\n"},
    "vocab.txt is any text": {"vocab.txt": b"hello\nworld\n"},
    "vocab.txt is empty": {"vocab.txt": b""},
    "its config is cut": {"vocab.txt": b"[UNK]\na\n", "tokenizer_config.json": b"{"},
    "its config is a list": {"vocab.txt": b"[UNK]\na\n", "tokenizer_config.json": b"[]"},
    "vocab.json is cut": {"vocab.json": b'{"a"', "merges.txt": b"a b\n"},
    "vocab.json is a list": {"vocab.json": b"[1]", "merges.txt": b"a b\n"},
    "vocab.json is too deep": {"vocab.json": b"[" * 100_000, "merges.txt": b"a b\n"},
    "merges.txt is of another": {"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"},
    "merges.txt is not UTF-8": {"vocab.json": b'{"a": 0}', "merges.txt": b"\xff b\n"},
    "an id is absurd": {
        "tokenizer.json": b'{"version": "1.0", "added_tokens": [], "model": '
        b'{"type": "WordLevel", "unk_token": "a", "vocab": {"a": 4000000000}}}'
    },
}


@pytest.mark.parametrize("harm", HARM)
def test_damage_of_every_kind_is_one_clear_error(tmp_path, harm: str):
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    for name, content in HARM[harm].items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint


def header(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"llmctl.files": "[]"}}',
        b'{"__metadata__": {"llmctl.files": "{\\"tokenizer.model\\": 3}"}}',
        b'{"__metadata__": {"llmctl.files": "{\\"tokenizer.model\\": \\"!!\\"}"}}',
        b'{"__metadata__": {"llmctl.files": "{\\"tokenizer.model\\": \\"\\"}"}}',
    ],
)
def test_a_header_that_does_not_hold_what_it_says_is_refused(tmp_path, content: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(header(content))
    with pytest.raises(ArtifactError, match="model"):
        load_tokenizer(path)


def test_a_file_is_known_by_its_ending_and_brings_what_lies_beside_it(tmp_path, shared_data):
    folder = shared_data / "tokenizers" / "gpt2"
    whole = load_tokenizer(folder)
    assert {load_tokenizer(path).sha256 for path in folder.iterdir()} == {whole.sha256}
    (tmp_path / "other.json").write_bytes(whole.files()["tokenizer.json"])
    assert load_tokenizer(tmp_path / "other.json").encode("a list") == whole.encode("a list")
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(UsageError, match=r"vocab\.json"):
        load_tokenizer(tmp_path / "vocab.json")
