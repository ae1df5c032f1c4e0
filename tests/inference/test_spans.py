"""The best span of a context: within it, in order, not too long, or none."""

import torch

from llmctl.inference.encoding import Row
from llmctl.inference.spans import MOST_TOKENS, best_span, find_answers
from llmctl.inference.windows import Window

CONTEXT = "x" * 60
SPANS = [(number, number + 1) for number in range(40)]
WINDOW = Window(0, Row([1] * 44), 3, SPANS)


def logits(start: int, end: int, *, null: float = 0.0) -> torch.Tensor:
    out = torch.zeros(44, 2)
    out[1:3] = 99.0  # the question
    out[0] = null
    out[3 + start, 0] = out[3 + end, 1] = 9.0
    return out


def test_an_answer_lies_in_the_context_and_is_of_bounded_length():
    answer, null = best_span(CONTEXT, WINDOW, logits(4, 6), has_null=True)
    assert (answer.start, answer.end) == (4, 7)
    assert answer.score > 0.9 > 0.1 > null
    answer, _ = best_span(CONTEXT, WINDOW, logits(6, 4), has_null=True)
    assert answer.start <= 6
    assert answer.end > answer.start
    answer, _ = best_span(CONTEXT, WINDOW, logits(0, MOST_TOKENS - 1), has_null=True)
    assert (answer.start, answer.end) == (0, MOST_TOKENS)
    answer, _ = best_span(CONTEXT, WINDOW, logits(0, MOST_TOKENS), has_null=True)
    assert answer.end - answer.start <= MOST_TOKENS


def test_the_first_token_says_that_there_is_no_answer():
    answer, null = best_span(CONTEXT, WINDOW, logits(4, 6, null=20.0), has_null=True)
    assert null > answer.score
    _, null = best_span(CONTEXT, WINDOW, logits(4, 6, null=20.0), has_null=False)
    assert null == 0.0


def test_answers_are_parts_of_their_contexts(make_loaded):
    loaded = make_loaded("learned", family="encoder", n_labels=2, head="span")
    rows = [("a list", "strings 中文，诗。 " * number) for number in (0, 1, 2, 30)] + [("of " * 90, "a list 猫")]
    answers = find_answers(loaded, rows)
    for (_, context), answer in zip(rows, answers, strict=True):
        assert answer.text == context[answer.start : answer.end]
    assert [answer.is_cut for answer in answers] == [False] * 4 + [True]
    assert (answers[0].text, answers[0].start, answers[0].end) == ("", 0, 0)
    alone = [find_answers(loaded, [row])[0] for row in rows]
    assert [(each.start, each.end) for each in alone] == [(each.start, each.end) for each in answers]
