"""Continuations that are given: which of several a model finds likeliest, and whether it knows the last word."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmctl.artifacts.load import Loaded
from llmctl.config import EvaluateConfig
from llmctl.data.examples import Example
from llmctl.data.templates import fill_template, template_for
from llmctl.evaluating.answers import chosen_template
from llmctl.evaluating.result import Measured
from llmctl.inference.encoding import encode_prompt, longest_row, require_tokenizer
from llmctl.inference.likelihood import Likelihood, ScoredRow, likelihoods, split_ids
from llmctl.metrics import scores


def evaluate_choice(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> Measured:
    """Measure how often the right choice is the likeliest continuation of the question.

    `accuracy` compares the summed log-likelihoods, `accuracy_norm` those divided by the length of the choice in
    characters, so that long ones have a chance; between equals the first wins.
    Source: lm-evaluation-harness (`acc`, `acc_norm`), after Brown et al. 2020, arXiv:2005.14165, section 2.4.
    """
    template = template_for("choice", loaded.model.config.family, chosen_template(loaded, config))
    asked = []
    for example in examples:
        prompt = fill_template(template, example.inputs)
        asked += [(prompt, choice) for choice in example.choices]
    continued = continuations(loaded, asked, config)
    found, found_norm, n_cut, at = [], [], 0, 0
    for example in examples:
        sums = np.array([-part.nats for part in continued.found[at : at + len(example.choices)]])
        n_cut += any(continued.cut[at : at + len(example.choices)])
        lengths = np.array([max(len(choice), 1) for choice in example.choices])
        found.append(int(sums.argmax()))
        found_norm.append(int((sums / lengths).argmax()))
        at += len(example.choices)
    wanted = [example.target for example in examples]
    return Measured(
        {"accuracy": scores.accuracy(found, wanted), "accuracy_norm": scores.accuracy(found_norm, wanted)},
        n_rows=len(examples),
        n_tokens=continued.n_tokens,
        n_empty=_n_empty(examples),
        n_cut=n_cut,
    )


def evaluate_lastword(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> Measured:
    """Measure whether a model knows the last word of a text: greedily (accuracy), and its perplexity per word.

    Source: Paperno et al. 2016 (LAMBADA), arXiv:1606.06031; of a text without spaces it is the last character.
    """
    continued = continuations(loaded, [without_last_word(example.inputs["text"]) for example in examples], config)
    loss = sum(part.nats for part in continued.found) / max(len(examples), 1)
    return Measured(
        {
            "accuracy": scores.mean([0 < part.count == part.n_correct for part in continued.found]),
            "perplexity": math.exp(min(loss, 700.0)),
            "loss": loss,
        },
        n_rows=len(examples),
        n_tokens=continued.n_tokens,
        n_empty=_n_empty(examples),
        n_cut=sum(continued.cut),
    )


def without_last_word(text: str) -> tuple[str, str]:
    """Return a text up to its last word, and that word."""
    text = text.rstrip()
    parts = text.rsplit(None, 1)
    if len(parts) == 2:
        return text[: -len(parts[1])].rstrip(), parts[1]
    return text[:-1], text[-1:]


@dataclass(frozen=True)
class Continued:
    """The likelihoods of continuations, which of them were cut, and how many tokens were read for them."""

    found: list[Likelihood]
    cut: list[bool]
    n_tokens: int


def continuations(loaded: Loaded, asked: Sequence[tuple[str, str]], config: EvaluateConfig) -> Continued:
    """Return the likelihoods of second texts after first ones, a space between; what is too long is cut at the front.

    Of an encoder-decoder the first is the source and the second the target, without its end token.
    """
    limit = longest_row(loaded, config.seq_len)
    made = [_row(loaded, context, text, limit) for context, text in asked]
    rows = [row for row, _ in made]
    n_tokens = sum(len(row.ids) + len(row.source) for row in rows)
    return Continued(likelihoods(loaded, rows, config.batch_size), [was_cut for _, was_cut in made], n_tokens)


def _row(loaded: Loaded, context: str, text: str, limit: int) -> tuple[ScoredRow, bool]:
    tokenizer = require_tokenizer(loaded)
    if loaded.model.config.family == "encoder_decoder":
        source, target = encode_prompt(loaded, context), tokenizer.encode(text)
        was_cut = len(source) > limit or len(target) > limit
        kept = source if len(source) <= limit else [*source[: limit - 1], source[-1]]
        return ScoredRow(target[:limit], 0, kept), was_cut
    before, after = split_ids(tokenizer, context, _spaced(context, text))
    head = [tokenizer.bos_id] if loaded.begins_with_bos and tokenizer.bos_id is not None else []
    before = head + before
    if not before:  # the first token needs something before it
        end = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        before = [end if end is not None else 0]
    ids = before + after
    # One more than the context fits: of the last token only the label is needed.
    excess = max(len(ids) - limit - 1, 0)
    first = max(len(before) - excess, 1)
    return ScoredRow(ids[excess:], first), excess > 0


def _spaced(context: str, text: str) -> str:
    """Return what follows a context: after a space, unless nothing or white space is before it, or no word is."""
    if not context or context[-1].isspace() or not text or text[0].isspace() or scores.IS_HAN.match(text):
        return text
    return f" {text}"


def _n_empty(examples: Sequence[Example]) -> int:
    return sum(not any(text.strip() for text in example.inputs.values()) for example in examples)
