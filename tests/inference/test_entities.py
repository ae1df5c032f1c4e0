"""Tokens become entities: prefixes, scores, spaces and windows."""

import torch

from llmctl.inference.entities import Entity, find_entities, grouped, merged

NAMES = ("O", "B-PER", "I-PER", "I-LOC", "MISC")
TEXT = "Anna 李明 x"
SPANS = [(0, 2), (2, 4), (4, 6), (6, 7), (7, 9)]


def outputs(*labels: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), len(NAMES)).float() * 9


def found(*labels: int) -> list[tuple[str, int, int]]:
    return [(each.label, each.start, each.end) for each in grouped(TEXT, SPANS, outputs(*labels), NAMES)]


def test_neighbors_of_one_label_are_an_entity_and_b_begins_one():
    assert found(1, 2, 0, 2, 2) == [("PER", 0, 4), ("PER", 6, 9)]
    assert found(1, 1, 2, 3, 2) == [("PER", 0, 2), ("PER", 2, 6), ("LOC", 6, 7), ("PER", 7, 9)]
    assert found(0, 0, 0, 0, 0) == []
    assert found(4, 4, 3, 0, 4) == [("MISC", 0, 4), ("LOC", 4, 6), ("MISC", 7, 9)]


def test_the_score_is_the_mean_of_the_tokens():
    scores = torch.tensor([[0.0, 2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
    (entity,) = grouped(TEXT, SPANS[:2], scores, NAMES)
    assert entity.score == scores.softmax(dim=1).amax(dim=1).mean().item()


def test_of_entities_that_overlap_in_two_windows_the_longest_stays():
    parts = [
        [Entity("PER", "", 0, 4, 0.9), Entity("LOC", "", 6, 9, 0.5)],
        [Entity("LOC", "", 6, 9, 0.6), Entity("X", "", 8, 12, 0.1)],
    ]
    assert [(each.label, each.start, each.score) for each in merged(parts)] == [("PER", 0, 0.9), ("X", 8, 0.1)]
    assert merged(parts[:1]) == parts[0]


def test_characters_are_those_of_chinese_text_without_the_spaces_around(make_loaded):
    loaded = make_loaded("learned", family="encoder", n_labels=3, head="tokens", labels=("O", "B-A", "I-A"))
    texts = ["a list 中文，诗。 strings ", "猫🙂 of", "", "a list of strings 中文 " * 20]
    results = find_entities(loaded, texts)
    assert all(results[number] for number in (0, 1, 3)), "random weights find something everywhere"
    for text, entities in zip(texts, results, strict=True):
        assert [each.text for each in entities] == [text[each.start : each.end] for each in entities]
        assert all(each.text == each.text.strip() != "" for each in entities)
    assert results[3][-1].end > 200, "windows reach the end"
