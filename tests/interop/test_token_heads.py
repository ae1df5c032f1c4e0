"""Named entities and answers against transformers: the same spans of the text, with the same scores."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.artifacts.load import Loaded, load_model
from llmctl.inference.entities import find_entities
from llmctl.inference.spans import MOST_TOKENS, find_answers
from tests.support.architectures import BERT, DISTILBERT, ROBERTA, Variant, build

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.interop

SENTENCE = "Anna lives in Berlin and Paul O'Neil met the café owner 李明 in 北京 on 5 May , not in New York"
WORDS = SENTENCE.split()
TEXTS = [
    "Anna lives in Berlin , and Paul met the café owner",
    "  李明 met  Anna in 北京。上海 was not far",
    "naïve 🙂 Łódź\tNew York.",
    "",
    "unknownword",
]
LIMIT = 64
LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def corpus() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=8)) for _ in range(200)] + ["李明在北京见了安娜。上海很远"] * 20


def word_pieces():
    own = tokenizers.BertWordPieceTokenizer(lowercase=True)
    own.train_from_iterator(corpus(), vocab_size=280, show_progress=False)
    return transformers.BertTokenizerFast(tokenizer_object=own._tokenizer)


def byte_level():
    own = tokenizers.ByteLevelBPETokenizer(trim_offsets=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    own.train_from_iterator(corpus(), vocab_size=330, special_tokens=special, show_progress=False)
    own._tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own._tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def metaspace():
    own = tokenizers.SentencePieceUnigramTokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    own.train_from_iterator(corpus(), vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    own._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=["<s>", "$A", "</s>"],
        pair=["<s>", "$A", "</s>", "</s>", "$B", "</s>"],
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own._tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        sep_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


MODELS: dict[str, tuple[str, dict, Callable]] = {
    "bert": ("Bert", BERT, word_pieces),
    "distilbert": ("DistilBert", DISTILBERT, word_pieces),
    "roberta": ("Roberta", ROBERTA | {"bos_token_id": 0, "eos_token_id": 2}, byte_level),
    "xlm-roberta": ("XLMRoberta", ROBERTA | {"bos_token_id": 0, "eos_token_id": 2}, metaspace),
}


def made(name: str, ending: str, folder: Path, **settings) -> Loaded:
    """Write a model of random weights with a tokenizer, and open it with llmctl."""
    kind, shape, make = MODELS[name]
    tokenizer = make()
    tokenizer.model_max_length = LIMIT
    own = {"max_position_embeddings": LIMIT + (2 if "roberta" in name else 0)}
    model = build(Variant(kind + ending, shape | own | settings, ""), folder)
    head = model.qa_outputs if ending == "ForQuestionAnswering" else model.classifier
    head.weight.data.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("stride", [None, (LIMIT - 2) // 2])
@pytest.mark.parametrize("name", MODELS)
def test_entities_are_those_of_the_pipeline(name, stride, tmp_path):
    loaded = made(name, "ForTokenClassification", tmp_path, id2label=dict(enumerate(LABELS)))
    texts = TEXTS if stride is None else [" ".join(corpus()[:20])]
    if stride is not None:  # windows overlap by half of what fits beside the two tokens around them
        assert len(loaded.tokenizer.encode(texts[0])) > 2 * LIMIT
    options = {} if stride is None else {"stride": stride}
    pipeline = transformers.pipeline(
        "ner", model=str(tmp_path), aggregation_strategy="simple", device="cpu", dtype=torch.float32, **options
    )
    found = find_entities(loaded, texts)
    # The trainer of WordPiece is not deterministic: about ten.
    assert sum(map(len, found)) >= 4, "a model that finds nothing proves nothing"
    for text, entities in zip(texts, found, strict=True):
        wanted = pipeline(text) if text else []
        # Theirs have the space that a token begins with, or is.
        inner = [(each, text[each["start"] : each["end"]]) for each in wanted]
        wanted = [
            each | {"start": each["end"] - len(part.lstrip()), "end": each["start"] + len(part.rstrip())}
            for each, part in inner
            if part.strip()
        ]
        ours = [(each.label, each.start, each.end) for each in entities]
        assert ours == [(each["entity_group"], each["start"], each["end"]) for each in wanted]
        assert [each.score for each in entities] == pytest.approx([each["score"] for each in wanted], abs=1e-5)
        assert [each.text for each in entities] == [text[each.start : each.end] for each in entities]


QUESTIONS = [
    ("who met the owner", "Anna lives in Berlin , and Paul met the café owner"),
    ("谁在北京", "李明在北京见了安娜。上海很远"),
    ("where", " ".join(corpus()[:20])),
    ("Paul " * 3, "  New  York"),
]


def reference(folder: Path, question: str, context: str) -> tuple[str, int, int, float]:
    """Return the answer by the rules of the pipeline of transformers 4, from its own model and tokenizer.

    With `handle_impossible_answer`, `align_to_words=False` and its default stride; transformers 5 has no such pipeline.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder, dtype=torch.float32).eval()
    room = (
        LIMIT
        - tokenizer.num_special_tokens_to_add(pair=True)
        - len(tokenizer(question, add_special_tokens=False).input_ids)
    )
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=LIMIT,
        stride=min(LIMIT // 2, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    least, best = 1e6, ("", 0, 0, -1.0)
    for window in range(len(encoded["input_ids"])):
        inputs = {
            key: torch.tensor([encoded[key][window]]) for key in ("input_ids", "token_type_ids") if key in encoded
        }
        if getattr(model.config, "type_vocab_size", 1) < 2:
            inputs.pop("token_type_ids", None)
        with torch.no_grad():
            out = model(**inputs)
        allowed = np.array([each == 1 for each in encoded.sequence_ids(window)])
        allowed[0] = True
        shares = []
        for logits in (out.start_logits[0], out.end_logits[0]):
            masked = np.where(allowed, logits.double().numpy(), -1e9)
            shares.append(np.exp(masked - masked.max()) / np.exp(masked - masked.max()).sum())
        start, end = shares
        least = min(least, start[0] * end[0])
        start[0] = end[0] = 0.0
        table = np.tril(np.triu(np.outer(start, end)), MOST_TOKENS - 1)
        first, last = np.unravel_index(table.argmax(), table.shape)
        offsets = encoded["offset_mapping"][window]
        if table[first, last] > best[3]:
            begin, stop = offsets[first][0], offsets[last][1]
            best = (context[begin:stop], begin, stop, float(table[first, last]))
    return best if best[3] >= least else ("", 0, 0, float(least))


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_reference(name, tmp_path):
    loaded = made(name, "ForQuestionAnswering", tmp_path)
    assert len(loaded.tokenizer.encode(QUESTIONS[2][1])) > 2 * LIMIT, "windows are to be joined"
    for question, answer in zip(QUESTIONS, find_answers(loaded, QUESTIONS), strict=True):
        wanted = reference(tmp_path, *question)
        text, start, end, _ = wanted
        start = end - len(text.lstrip())  # a token may have the space before it
        assert (answer.text, answer.start, answer.end) == (text.strip(), start, end - len(text) + len(text.rstrip()))
        assert answer.score == pytest.approx(wanted[3], abs=1e-6)


def test_the_first_token_means_no_answer(tmp_path):
    loaded = made("bert", "ForQuestionAnswering", tmp_path)
    found = {answer.text == "" for answer in find_answers(loaded, [(word, text) for word in WORDS for text in TEXTS])}
    assert found == {True, False}


def test_the_names_of_the_labels_come_back(tmp_path):
    loaded = made("bert", "ForTokenClassification", tmp_path, id2label=dict(enumerate(LABELS)))
    assert loaded.model.config.labels == LABELS
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["id2label"]["1"] == "B-PER"
