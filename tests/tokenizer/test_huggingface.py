"""What a published tokenizer adds around a text, compared with the library itself."""

import json

import pytest

from llmctl.tokenizer.base import Frame
from llmctl.tokenizer.huggingface import HuggingFaceTokenizer, frame_of
from tests.support.bpe import byte_level

tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")

NAMES = [("<|end|>", 0), ("<s>", 1), ("</s>", 2)]


def template(single: str, pair: str) -> object:
    return tokenizers.processors.TemplateProcessing(single=single, pair=pair, special_tokens=NAMES)


def processors() -> dict[str, object]:
    kinds = tokenizers.processors
    return {
        "none": None,
        "byte level": kinds.ByteLevel(),
        "llama": template("<s> $A", "<s> $A <s> $B"),
        "t5": template("$A </s>", "$A </s> $B </s>"),
        "bart": template("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
        "bert": kinds.BertProcessing(("</s>", 2), ("<s>", 1)),
        "roberta": kinds.RobertaProcessing(("</s>", 2), ("<s>", 1)),
        "sequence": kinds.Sequence([kinds.ByteLevel(), template("<s> $A </s>", "<s> $A </s> $B </s>")]),
    }


@pytest.mark.parametrize("name", processors())
def test_the_frame_is_what_the_library_adds(name):
    content = json.loads(byte_level("smollm")["tokenizer.json"])
    content["post_processor"] = None
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    if (processor := processors()[name]) is not None:
        library.post_processor = processor
    ours = HuggingFaceTokenizer(library.to_str().encode(), {})
    before, between, after = ours.frame("encoder") if frame_of(ours._json["post_processor"]) else Frame()
    first, second = ours.encode("the cat"), ours.encode("a mat")
    assert library.encode("the cat").ids == [*before, *first, *after]
    assert library.encode("the cat", "a mat").ids == [*before, *first, *between, *second, *after]


def test_without_a_post_processor_a_decoder_gets_none_and_others_what_ours_get():
    content = json.loads(byte_level("smollm")["tokenizer.json"]) | {"post_processor": None}
    config = {"bos_token": "<|end|>", "eos_token": "<|end|>", "add_bos_token": True}  # transformers 5 does not read it
    ours = HuggingFaceTokenizer(json.dumps(content).encode(), {"tokenizer_config.json": json.dumps(config).encode()})
    assert ours.frame("decoder") == Frame()
    assert ours.frame("encoder") == Frame((0,), (0,), (0,))
    assert ours.frame("encoder_decoder") == Frame((), (0,), (0,))


@pytest.mark.parametrize("processor", [{"type": "TemplateProcessing"}, {"type": "BertProcessing", "cls": 3}, [1], "x"])
def test_unknown_forms_add_nothing(processor):
    assert frame_of(processor) is None
