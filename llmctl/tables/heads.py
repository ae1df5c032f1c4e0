"""Classification heads: what a model with one is called, here and by other programs, and the task that measures it."""

from typing import NamedTuple


class Head(NamedTuple):
    """A kind of head: the model in a sentence, transformers' class, the Hub's name of the task, and `evaluate`'s.

    given: what `classify` is given.
    """

    model: str
    loader: str
    pipeline: str
    task: str
    given: str = '"a text"'


HEADS: dict[str, Head] = {
    "text": Head("a classifier", "AutoModelForSequenceClassification", "text-classification", "classify"),
    "tokens": Head("a token classifier", "AutoModelForTokenClassification", "token-classification", "tokens"),
    "span": Head(
        "a question-answering model",
        "AutoModelForQuestionAnswering",
        "question-answering",
        "qa",
        '"a question" "a text"',
    ),
}
"""By `model.head`."""
