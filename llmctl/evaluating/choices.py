"""Score given continuations: the most likely of several choices, or the last word of a text."""

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
from llmctl.inference.encoding import encode_prompt, encode_target, longest_row, require_tokenizer
from llmctl.inference.likelihood import Likelihood, ScoredRow, likelihoods, split_ids
from llmctl.metrics import scores


def evaluate_choice(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> Measured:
    """Measure how often the right choice is the most likely continuation of the question.

    `accuracy` compares summed log-likelihoods; `accuracy_norm` divides them by the length of the choice in characters,
    so that long choices are not penalized. Ties go to the first choice.
    Source: lm-evaluation-harness (`acc`, `acc_norm`), after Brown et al. 2020, arXiv:2005.14165, section 2.4.
    """
    template = template_for("choice", loaded.model.config.family, chosen_template(loaded, config))
    pairs = []
    for example in examples:
        prompt = fill_template(template, example.inputs)
        pairs += [(prompt, choice) for choice in example.choices]
    continued = continuations(loaded, pairs, config)
    best, best_norm, n_cut, at = [], [], 0, 0
    for example in examples:
        sums = np.array([-part.nats for part in continued.likelihoods[at : at + len(example.choices)]])
        n_cut += any(continued.cut[at : at + len(example.choices)])
        lengths = np.array([max(len(choice), 1) for choice in example.choices])
        best.append(int(sums.argmax()))
        best_norm.append(int((sums / lengths).argmax()))
        at += len(example.choices)
    targets = [example.target for example in examples]
    return Measured(
        {"accuracy": scores.accuracy(best, targets), "accuracy_norm": scores.accuracy(best_norm, targets)},
        n_rows=len(examples),
        n_tokens=continued.n_tokens,
        n_empty=_n_empty(examples),
        n_cut=n_cut,
    )


def evaluate_lastword(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> Measured:
    """Measure the prediction of the last word of a text: greedy accuracy, and perplexity per word.

    For a text without spaces it is the last character. Source: Paperno et al. 2016 (LAMBADA), arXiv:1606.06031.
    """
    continued = continuations(loaded, [without_last_word(example.inputs["text"]) for example in examples], config)
    loss = sum(part.nats for part in continued.likelihoods) / max(len(examples), 1)
    return Measured(
        {
            "accuracy": scores.mean([0 < part.count == part.n_correct for part in continued.likelihoods]),
            "perplexity": math.exp(min(loss, 700.0)),
            "loss": loss,
        },
        n_rows=len(examples),
        n_tokens=continued.n_tokens,
        n_empty=_n_empty(examples),
        n_cut=sum(continued.cut),
    )


def without_last_word(text: str) -> tuple[str, str]:
    """Split a text into everything before its last word, and that word."""
    text = text.rstrip()
    parts = text.rsplit(None, 1)
    if len(parts) == 2:
        return text[: -len(parts[1])].rstrip(), parts[1]
    return text[:-1], text[-1:]


@dataclass(frozen=True)
class Continued:
    """Likelihoods of continuations, which of them were truncated, and the number of processed tokens."""

    likelihoods: list[Likelihood]
    cut: list[bool]
    n_tokens: int


def continuations(loaded: Loaded, pairs: Sequence[tuple[str, str]], config: EvaluateConfig) -> Continued:
    """Score the second text of each pair after the first and a space; long pairs are truncated at the front.

    For an encoder-decoder the first text is the source and the second the target, without an end token.
    """
    limit = longest_row(loaded, config.seq_len)
    prepared = [_row(loaded, context, text, limit) for context, text in pairs]
    rows = [row for row, _ in prepared]
    n_tokens = sum(len(row.ids) + len(row.source) for row in rows)
    return Continued(likelihoods(loaded, rows, config.batch_size), [was_cut for _, was_cut in prepared], n_tokens)


def _row(loaded: Loaded, context: str, text: str, limit: int) -> tuple[ScoredRow, bool]:
    tokenizer = require_tokenizer(loaded)
    if loaded.model.config.family == "encoder_decoder":
        source, target = encode_prompt(loaded, context), encode_target(loaded, text)
        was_cut = len(source) > limit or len(target) > limit
        kept = source if len(source) <= limit else [*source[: limit - 1], source[-1]]
        return ScoredRow(target[:limit], 0, kept), was_cut
    before, after = split_ids(tokenizer, context, _spaced(context, text))
    head = list(loaded.frame.before)
    before = head + before
    if not before:  # a decoder cannot score the first token without a predecessor
        end = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        before = [end if end is not None else 0]
    ids = before + after
    # One token more than the context fits: the last one is only a label.
    excess = max(len(ids) - limit - 1, 0)
    first = max(len(before) - excess, 1)
    return ScoredRow(ids[excess:], first), excess > 0


def _spaced(context: str, text: str) -> str:
    """Return a continuation with a leading space, unless white space is there already, or it is Chinese or empty."""
    if not context or context[-1].isspace() or not text or text[0].isspace() or scores.IS_HAN.match(text):
        return text
    return f" {text}"


def _n_empty(examples: Sequence[Example]) -> int:
    return sum(not any(text.strip() for text in example.inputs.values()) for example in examples)
