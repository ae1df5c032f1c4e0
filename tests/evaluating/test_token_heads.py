"""Entities of tagged words and extracted answers are measured on what was predicted, row by row."""

import json
from dataclasses import replace

import pytest

from llmctl.config import ColumnsConfig, EvaluateConfig
from llmctl.data.examples import read_examples
from llmctl.errors import UsageError
from llmctl.evaluating.token_heads import evaluate_entities, evaluate_spans
from llmctl.inference.entities import label_words
from llmctl.inference.spans import find_answers

NAMES = ("O", "B-A", "I-A")


def examples(path, task, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return list(read_examples([str(path)], task, ColumnsConfig()))


@pytest.fixture
def tagger(make_loaded):
    return make_loaded("learned", family="encoder", n_labels=3, head="tokens", labels=NAMES)


def test_a_word_has_the_label_of_its_first_token(tagger):
    rows = [["a", "list", "中文，诗"], [], ["猫"], ["strings"] * 90]
    labels = label_words(tagger, rows, 48, 2)
    assert [len(row) for row in labels] == [3, 0, 1, 90]
    text = " ".join(rows[0])
    ids, spans = tagger.tokenizer.encode_with_spans([text])[0]
    import torch

    row = torch.tensor([[tagger.tokenizer.bos_id, *ids, tagger.tokenizer.eos_id]])
    found = tagger.model.label_tokens(row)[0, 1:-1].argmax(dim=1).tolist()
    firsts = [next(n for n, (_, end) in enumerate(spans) if end > text.index(word)) for word in rows[0]]
    assert labels[0] == [NAMES[found[first]] for first in firsts]


def test_entities_are_compared_with_the_tags_of_the_rows(tagger, tmp_path):
    words = [["a", "list", "of"], ["诗", "strings"]]
    own = label_words(tagger, words, 48, 2)
    rows = [{"tokens": row, "tags": tags} for row, tags in zip(words, own, strict=True)]
    data = examples(tmp_path / "d.jsonl", "tokens", *rows)
    measured = evaluate_entities(tagger, data, EvaluateConfig(task="tokens"))
    assert any(tag != "O" for tags in own for tag in tags)
    assert (measured.figures["f1"], measured.figures["accuracy"], measured.n_rows) == (1.0, 1.0, 2)
    numbered = [
        {"tokens": row, "ner_tags": [NAMES.index(tag) for tag in tags]} for row, tags in zip(words, own, strict=True)
    ]
    data = examples(tmp_path / "n.jsonl", "tokens", *numbered)
    assert evaluate_entities(tagger, data, EvaluateConfig(task="tokens")).figures == measured.figures
    wrong = [replace(each, target=["B-A" if tag == "O" else "O" for tag in each.target]) for each in data[:1]]
    wrong[0] = replace(wrong[0], target=["O" if tag != "O" else "B-A" for tag in own[0]])
    assert evaluate_entities(tagger, wrong, EvaluateConfig(task="tokens")).figures["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "1 tokens and 2 tags"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "not a list of tokens"),
        ({"tokens": ["a"], "tags": "O"}, "not a list of tags"),
        ({"tokens": ["a"], "tags": [7]}, "the tag 7"),
        ({"tokens": ["a"], "tags": ["B-X"]}, "none of the tags"),
    ],
)
def test_rows_that_are_not_tagged_words_are_refused(tagger, tmp_path, row, part):
    with pytest.raises(UsageError, match=part):
        evaluate_entities(tagger, examples(tmp_path / "d.jsonl", "tokens", row), EvaluateConfig(task="tokens"))


def test_answers_are_compared_with_those_of_the_rows(make_loaded, tmp_path):
    loaded = make_loaded("learned", family="encoder", n_labels=2, head="span")
    context = "strings 中文，诗。 of a list"
    own = find_answers(loaded, [("a list", context), ("of", "a list")])
    rows = [
        {"question": "a list", "context": context, "answers": {"text": ["no", own[0].text], "answer_start": [0, 1]}},
        {
            "question": "of",
            "context": "a list",
            "answers": {"text": [own[1].text] if own[1].text else [], "answer_start": []},
        },
    ]
    measured = evaluate_spans(loaded, examples(tmp_path / "d.jsonl", "qa", *rows), EvaluateConfig(task="qa"))
    assert measured.figures == {"exact_match": 1.0, "token_f1": 1.0}
    rows[0]["answers"]["text"] = ["nothing like it"]
    measured = evaluate_spans(loaded, examples(tmp_path / "e.jsonl", "qa", *rows), EvaluateConfig(task="qa"))
    assert measured.figures["exact_match"] == 0.5
    without = examples(tmp_path / "f.jsonl", "qa", {"question": "a", "answer": "b"})
    with pytest.raises(UsageError, match="has no context"):
        evaluate_spans(loaded, without, EvaluateConfig(task="qa"))
