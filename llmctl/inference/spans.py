"""Answer questions with a part of a text: a head tells where an answer starts and where it ends.

The score of an answer is the probability of its start times that of its end, among the tokens of the text and the first
token of the row, which stands for no answer. Source: Devlin et al. 2019, arXiv:1810.04805, sections 4.2 and 4.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded
from llmctl.inference.encoding import longest_row
from llmctl.inference.entities import trimmed
from llmctl.inference.rows import token_outputs
from llmctl.inference.sampling import require_finite
from llmctl.inference.windows import Window, windows

MOST_TOKENS = 30
"""The longest answer."""


@dataclass(frozen=True)
class Answer:
    """A part of a context, by the characters from `start` to before `end`; an empty one if it holds no answer.

    is_cut: the question was truncated.
    """

    text: str
    start: int
    end: int
    score: float
    is_cut: bool = False


def find_answers(
    loaded: Loaded, questions: Sequence[tuple[str, str]], *, seq_len: int = 0, batch_size: int = 32
) -> list[Answer]:
    """Return the answers to questions, each with its context; a long context is read in windows that overlap."""
    contexts = [context for _, context in questions]
    rows, cut = windows(loaded, contexts, longest_row(loaded, seq_len), [question for question, _ in questions])
    found = [list[Answer]() for _ in questions]
    nulls: list[list[float]] = [[] for _ in questions]
    for window, outputs_TL in zip(rows, token_outputs(loaded, [each.row for each in rows], batch_size), strict=True):
        require_finite(outputs_TL.amax(dim=1))
        answer, null = best_span(contexts[window.text], window, outputs_TL, has_null=bool(loaded.frame.before))
        found[window.text] += [answer] if answer else []
        nulls[window.text].append(null)
    return [
        # Windows without the answer say so: the text has none only if no window has a better one.
        max([*each, Answer("", 0, 0, min(null))], key=lambda answer: answer.score)
        if number not in cut
        else cut_answer(max([*each, Answer("", 0, 0, min(null))], key=lambda answer: answer.score))
        for number, (each, null) in enumerate(zip(found, nulls, strict=True))
    ]


def cut_answer(answer: Answer) -> Answer:
    """Return an answer to a question that was truncated."""
    return Answer(answer.text, answer.start, answer.end, answer.score, is_cut=True)


def best_span(context: str, window: Window, outputs_T2: Tensor, *, has_null: bool) -> tuple[Answer | None, float]:
    """Return the most likely answer in a window, None in an empty one, and the probability that there is none."""
    inside = slice(window.first, window.first + len(window.spans))
    null_12 = outputs_T2[:1] if has_null else outputs_T2[:0]
    p_T2 = torch.cat([null_12, outputs_T2[inside]]).softmax(dim=0)
    null = float(p_T2[0, 0] * p_T2[0, 1]) if has_null else 0.0
    starts_T, ends_T = p_T2[int(has_null) :].unbind(dim=1)
    if not window.spans:
        return None, null
    scores_TT = (starts_T[:, None] * ends_T[None, :]).triu().tril(MOST_TOKENS - 1)
    first, last = divmod(int(scores_TT.argmax()), len(window.spans))
    start, end = trimmed(context, window.spans[first][0], window.spans[last][1])
    return Answer(context[start:end], start, end, float(scores_TT[first, last])), null
