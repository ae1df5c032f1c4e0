"""Texts that a model writes: translations, summaries and answers against the wanted ones."""

import math
from collections.abc import Callable, Mapping, Sequence

from llmctl.artifacts.load import Loaded
from llmctl.config import EvaluateConfig, GenerateConfig
from llmctl.data.examples import Example
from llmctl.data.templates import fill_template, template_for
from llmctl.errors import UsageError
from llmctl.evaluating.result import Measured
from llmctl.inference.encoding import encode_prompt, longest_row, require_tokenizer
from llmctl.inference.generate import Prompt, generate
from llmctl.inference.likelihood import ScoredRow, likelihoods
from llmctl.metrics import scores
from llmctl.metrics.scores import References

FIGURES: Mapping[str, Mapping[str, Callable[[Sequence[str], References], float]]] = {
    "translate": {"bleu": scores.bleu, "chrf": scores.chrf},
    "summarize": {"rouge_l": scores.rouge_l, "chrf": scores.chrf},
    "qa": {"exact_match": scores.exact_match, "token_f1": scores.token_f1},
}
STOPS = {"translate": ("\n",), "summarize": ("\n\n",), "qa": ("\n",)}
"""Where an answer of a decoder ends, besides its end token: one that was not trained on the task goes on."""


def evaluate_answers(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig, task: str) -> Measured:
    """Measure the texts that a model writes greedily, or with beams; of an encoder-decoder also the targets' loss.

    An encoder-decoder reads the filled template as its source, a decoder goes on from it. What is longer than the
    context is cut: of a source the end, of a prompt the beginning.
    """
    if "chrf" in FIGURES[task]:
        scores.load_sacrebleu("chrF")  # said before the model writes for minutes
    family = loaded.model.config.family
    template = template_for(task, family, chosen_template(loaded, config))
    prompts, n_cut = _prompts(loaded, [fill_template(template, example.inputs) for example in examples], config)
    settings = GenerateConfig(
        max_tokens=config.max_tokens,
        temperature=0.0,
        beams=config.beams,
        batch_size=config.batch_size,
        stop=STOPS[task] if family == "decoder" else (),
    )
    done = list(generate(loaded, prompts, settings))
    found = [completion.text.strip() for completion in done]
    wanted = [_references(example.target) for example in examples]
    figures = {name: score(found, wanted) for name, score in FIGURES[task].items()}
    if family == "encoder_decoder":
        figures |= _target_loss(loaded, prompts, wanted, config)
    return Measured(
        figures,
        n_rows=len(examples),
        n_tokens=sum(len(completion.ids) + 1 for completion in done),
        n_empty=sum(not any(text.strip() for text in example.inputs.values()) for example in examples),
        n_cut=n_cut,
        example={"prompt": prompts[0].text, "found": found[0], "wanted": wanted[0][0]},
    )


def chosen_template(loaded: Loaded, config: EvaluateConfig) -> str:
    """Return the template that was asked for, or the one that the model was trained with; empty for neither."""
    own = loaded.artifact.provenance.get("template", "")
    return config.template or (own if isinstance(own, str) else "")


def _references(target: str | list[str]) -> list[str]:
    return [target] if isinstance(target, str) else target or [""]  # no answer is right where there is none


def _prompts(loaded: Loaded, texts: Sequence[str], config: EvaluateConfig) -> tuple[list[Prompt], int]:
    limit = longest_row(loaded, config.seq_len)
    is_decoder = loaded.model.config.family == "decoder"
    room = limit - config.max_tokens if is_decoder else limit
    if room < 1:
        raise UsageError(
            f"--max-tokens {config.max_tokens} leaves no room for a prompt in a context of {limit} tokens",
            "a smaller --max-tokens",
        )
    prompts, n_cut = [], 0
    for number, text in enumerate(texts):
        ids = encode_prompt(loaded, text)
        if len(ids) > room:
            n_cut += 1
            has_bos = is_decoder and ids[0] == require_tokenizer(loaded).bos_id and room > 1
            keep = room - has_bos
            ids = [*ids[:has_bos], *ids[-keep:]] if is_decoder else [*ids[: room - 1], ids[-1]]
        prompts.append(Prompt(number, ids, text))
    return prompts, n_cut


def _target_loss(
    loaded: Loaded, prompts: Sequence[Prompt], wanted: References, config: EvaluateConfig
) -> dict[str, float]:
    """Return loss and perplexity of the first reference of each source, its end token counted."""
    tokenizer, limit = require_tokenizer(loaded), loaded.model.config.max_positions
    targets = [ids[: limit - 1] for ids in tokenizer.encode_batch([others[0] for others in wanted])]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rows = [ScoredRow([*ids, *end], 0, prompt.ids) for ids, prompt in zip(targets, prompts, strict=True)]
    found = likelihoods(loaded, [row for row in rows if row.ids], config.batch_size)
    loss = sum(one.nats for one in found) / max(sum(one.count for one in found), 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
