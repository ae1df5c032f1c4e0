"""Texts and ids of chat templates are those of transformers' `apply_chat_template`."""

import json
import shutil
from pathlib import Path

import pytest

from llmctl.data.conversations import Message
from llmctl.inference.chat_ids import encode_conversation, encode_prompt_chat
from llmctl.inference.chat_template import chat_template
from llmctl.tokenizer.load import load_tokenizer
from tests.support.chats import CONVERSATIONS, MARKED, TEMPLATES

pytestmark = pytest.mark.interop
transformers = pytest.importorskip("transformers", reason="needs the extra `interop`")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `interop`")

STRIPPING = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
TEXT = "Are dogs real? Yes. 你好，诗是语言的艺术。 assistant user system be of help in brief 3 + 4\n\n" * 20


@pytest.fixture(scope="module", params=["bytes", "metaspace-first", "metaspace-always", "prepend"])
def folder(request, tmp_path_factory) -> Path:
    """Return a folder with a tokenizer of a published kind that knows every template's special tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    special = [tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIALS]
    special += [tokenizers.AddedToken(name, special=True, normalized=False, rstrip=True) for name in STRIPPING]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    pre, normalizers = tokenizers.pre_tokenizers, tokenizers.normalizers
    if request.param == "bytes":
        tokenizer.pre_tokenizer = pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    elif request.param == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = request.param.removeprefix("metaspace-")
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme=scheme, split=False)
    alphabet = pre.ByteLevel.alphabet() if request.param == "bytes" else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_every_kind_of_tokenizer_and_template(folder: Path, name: str, number: int):
    compare(folder, TEMPLATES[name], CONVERSATIONS[number])


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["mistral", "zephyr"])
def test_sentencepiece_with_a_dummy_prefix(shared_data, tmp_path, legacy, name: str):
    source = shared_data / "models" / "stories260K" / "hf"
    for file in ("tokenizer.model", "config.json"):
        shutil.copy(source / file, tmp_path)
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for messages in CONVERSATIONS:
        compare(tmp_path, TEMPLATES[name], messages)


def compare(folder: Path, source: str, messages: list[Message]) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    template = chat_template(load_tokenizer(folder), files, begins_with_bos=True, source=source)

    def expected(part: list[Message], *, asks: bool) -> tuple[str, list[int]]:
        plain = [message.to_dict() for message in part]
        options = {"chat_template": source, "add_generation_prompt": asks}
        text = theirs.apply_chat_template(plain, tokenize=False, **options)
        return text, theirs.apply_chat_template(plain, tokenize=True, **options)["input_ids"]

    text, ids = expected(messages, asks=False)
    assert template.render(messages, asks=False).text == text
    encoded = encode_conversation(template, messages)
    assert encoded.ids == ids, (theirs.convert_ids_to_tokens(encoded.ids), theirs.convert_ids_to_tokens(ids))
    assert any(encoded.is_trained)
    text, ids = expected(messages[:-1], asks=True)
    assert template.render(messages[:-1], asks=True).text == text
    assert encode_prompt_chat(template, messages[:-1]) == ids
    assert encoded.ids[: len(ids)] == ids


def test_marked_answers_are_those_of_transformers(folder: Path):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    template = chat_template(load_tokenizer(folder), files, begins_with_bos=True, source=MARKED)
    for messages in CONVERSATIONS:
        found = theirs.apply_chat_template(
            [message.to_dict() for message in messages],
            chat_template=MARKED,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        encoded = encode_conversation(template, messages)
        assert encoded.ids == found["input_ids"]
        assert [int(flag) for flag in encoded.is_trained] == found["assistant_masks"]
