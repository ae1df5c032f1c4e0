"""Templates are filled literally, leave out what an example does not have, and refuse roles that are none."""

import pytest

from llmctl.data.templates import fill_template, template_for
from llmctl.errors import UsageError


def test_the_usual_templates():
    asked = {"question": "谁?", "context": "a {question} b"}
    decoder, pair = template_for("qa", "decoder"), template_for("qa", "encoder_decoder")
    assert fill_template(decoder, asked) == "a {question} b\nQuestion: 谁?\nAnswer:", "what a text says is no role"
    assert fill_template(decoder, {"question": "谁?"}) == "Question: 谁?\nAnswer:"
    assert fill_template(pair, asked) == "question: 谁? context: a {question} b"
    assert fill_template(pair, {"question": "谁?"}) == "question: 谁?"
    assert fill_template(template_for("choice", "decoder"), {"context": "He runs"}) == "He runs"
    assert fill_template(template_for("translate", "encoder_decoder"), {"source": "x"}) == "x"


def test_a_chosen_template_is_literal_but_for_its_roles():
    chosen = template_for("translate", "decoder", "<{source}> {} {0}\\n{source}")
    assert fill_template(chosen, {"source": "a"}) == "<a> {} {0}\\na"


@pytest.mark.parametrize(
    ("template", "part"),
    [("{question}", "question"), ("{source} {target}", "target"), ("no role", "contains no field")],
)
def test_a_template_that_does_not_fit_the_task(template: str, part: str):
    with pytest.raises(UsageError, match=part) as caught:
        template_for("translate", "decoder", template)
    assert "{source}" in caught.value.hint
