"""Prompts for models that are asked in words: one template per task, filled with an example's texts.

A template is plain text with the names of roles in braces; everything else in it, other braces too, is literal.
"""

import re
from collections.abc import Mapping

from llmctl.config import Family
from llmctl.data.examples import TASKS
from llmctl.errors import UsageError

TEMPLATES: Mapping[str, str] = {
    "translate": "{source}\nTranslation:",
    "summarize": "{source}\nTL;DR:",  # Radford et al. 2019 (GPT-2), section 3.6
    "qa": "{context}\nQuestion: {question}\nAnswer:",
    "choice": "{context}\nQuestion: {question}\nAnswer:",
}
"""A decoder goes on from these; what it is to say follows after one space."""

SOURCE_TEMPLATES: Mapping[str, str] = {
    "translate": "{source}",
    "summarize": "{source}",
    "qa": "question: {question} context: {context}",  # Raffel et al. 2020 (T5), arXiv:1910.10683, appendix D
    "choice": "question: {question} context: {context}",
}
"""What an encoder-decoder reads as its source."""

FIELD = re.compile(r"\{([a-z]+)\}")


def template_for(task: str, family: Family, chosen: str = "") -> str:
    """Return the template of a task: the one chosen, else the usual one for the family.

    Raises: UsageError for a chosen one that holds none of the task's roles, or a word in braces that is none.
    """
    if not chosen:
        return (SOURCE_TEMPLATES if family == "encoder_decoder" else TEMPLATES)[task]
    roles = [name for name in TASKS[task] if name not in ("target", "answer")]
    fields = FIELD.findall(chosen)
    unknown = next((field for field in fields if field not in roles), "")
    if unknown or not fields:
        what = f"names `{{{unknown}}}`" if unknown else "holds no text of the example"
        raise UsageError(f"the template `{chosen[:80]}` {what}", f"it may name {', '.join(f'{{{r}}}' for r in roles)}")
    return chosen


def fill_template(template: str, inputs: Mapping[str, str]) -> str:
    """Return the template with an example's texts; a line whose every role is missing is left out.

    Of a choice that has no question, only a text to go on from (HellaSwag), the text itself is the prompt.
    """
    if set(inputs) == {"context"} and "{question}" in template:
        return inputs["context"]
    lines = []
    for line in template.split("\n"):
        fields = FIELD.findall(line)
        if not fields or any(field in inputs for field in fields):
            lines.append(line)
    text = "\n".join(lines)
    if "context" not in inputs:  # T5's questions stand on one line
        text = text.removesuffix(" context: {context}")
    return FIELD.sub(lambda match: inputs.get(match[1], ""), text)
