"""Prompt templates for generative tasks: one per task, filled with an example's texts.

A template is plain text with role names in braces; everything else, including other braces, is literal.
"""

import re
from collections.abc import Mapping

from llmctl.config import Family
from llmctl.errors import UsageError
from llmctl.tables.tasks import TASKS

FIELD = re.compile(r"\{([a-z]+)\}")


def template_for(task: str, family: Family, chosen: str = "") -> str:
    """Return the template of a task: the chosen one, else the default of the model family.

    Raises: UsageError if the chosen one contains none of the task's roles, or an unknown one.
    """
    if not chosen:
        row = TASKS[task]
        return row.source_template if family == "encoder_decoder" else row.template
    roles = [name for name in TASKS[task].roles if name not in ("target", "answer")]
    fields = FIELD.findall(chosen)
    unknown = next((field for field in fields if field not in roles), "")
    if unknown or not fields:
        problem = f"contains the unknown field `{{{unknown}}}`" if unknown else "contains no field"
        raise UsageError(
            f"the template `{chosen[:80]}` {problem}", f"use any of {', '.join(f'{{{r}}}' for r in roles)}"
        )
    return chosen


def fill_template(template: str, inputs: Mapping[str, str]) -> str:
    """Fill a template with an example's texts, dropping lines whose roles are all missing.

    An example with a context but no question (HellaSwag) is a text to continue: its context is the whole prompt.
    """
    if set(inputs) == {"context"} and "{question}" in template:
        return inputs["context"]
    lines = []
    for line in template.split("\n"):
        fields = FIELD.findall(line)
        if not fields or any(field in inputs for field in fields):
            lines.append(line)
    text = "\n".join(lines)
    if "context" not in inputs:  # T5's template has question and context on one line
        text = text.removesuffix(" context: {context}")
    return FIELD.sub(lambda match: inputs.get(match[1], ""), text)
