"""The model card: Markdown with YAML front matter that says how a model was made, what it scored and how to load it.

Formats the facts it is passed; reads nothing.
"""

from collections.abc import Mapping
from typing import Any

from llmctl.metrics.figures import FIGURES, shown
from llmctl.tables.heads import HEADS

PIPELINES = {"decoder": "text-generation", "encoder": "fill-mask", "encoder_decoder": "text2text-generation"}
LOADERS = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "encoder_decoder": "AutoModelForSeq2SeqLM",
}
USE = {
    "decoder": 'llmctl generate -m {path} "The function returns"',
    "encoder": 'llmctl fill -m {path} "a <mask> of strings"',
    "encoder_decoder": 'llmctl generate -m {path} "your source text"',
}


HEAD_USE = "llmctl classify -m {path} "


def readable(value: Any) -> str:
    """Return a value of the provenance as Markdown; hashes are shortened."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {readable(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(readable, value)) or "none"
    text = str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return f"`{text[:12]}`" if is_hash else f"`{text}`" if isinstance(value, str) else text


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the card.

    facts: name, family, architecture, objective, n_parameters, n_labels, head, steps, tokens, data, before, after, note and
    command.
    """
    family = facts["family"]
    before, after = facts["before"], facts["after"]
    rows = "\n".join(
        f"| {metric.label} | {shown(before[key], metric.form)} | {shown(after[key], metric.form)} |"
        for key, metric in FIGURES.items()
        if before.get(key) is not None and after.get(key) is not None
    )
    data = "\n".join(f"- {key}: {readable(value)}" for key, value in facts["data"].items() if key != "findings")
    head = HEADS[facts.get("head", "text")] if facts.get("n_labels") else None
    loader = head.loader if head else LOADERS[family]
    load = ""
    if facts["architecture"].startswith("Llmctl"):
        load = "This architecture is read by llmctl only.\n"
    else:
        load = (
            f"```python\nfrom transformers import AutoTokenizer, {loader}\n"
            f'model = {loader}.from_pretrained("PATH")\ntokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n'
        )
    return f"""---
library_name: transformers
pipeline_tag: {head.pipeline if head else PIPELINES[family]}
tags: [llmctl, {facts["objective"]}]
---

# {facts["name"]}

A {facts["architecture"]} with {facts["n_parameters"]:,} parameters, trained with `llmctl` on the objective
`{facts["objective"]}` for {facts["steps"]:,} steps ({facts["tokens"]:,} tokens).

![loss](loss.svg)

| on held-out text | before | after |
|---|--:|--:|
{rows}

{facts["note"]}

## Data
{data}

## Made with
```
{facts["command"]}
```
The resolved recipe is in `recipe.yaml`, the course of the training in `metrics.jsonl`.

## Use
```
{(HEAD_USE + head.given if head else USE[family]).format(path="PATH")}
```
{load}
## Limits
A small model trained on little text: it imitates the style of its data and knows nothing beyond it. Its output is
not checked for truth or harm.
"""
