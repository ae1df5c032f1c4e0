"""Score generated texts (translations, summaries, answers) against references."""

import math
from collections.abc import Sequence

from llmctl.artifacts.load import Loaded
from llmctl.config import EvaluateConfig, GenerateConfig
from llmctl.data.examples import Example
from llmctl.data.templates import fill_template, template_for
from llmctl.errors import UsageError
from llmctl.evaluating.result import Measured
from llmctl.inference.encoding import encode_prompt, encode_target, longest_row, require_tokenizer
from llmctl.inference.generate import Prompt, generate
from llmctl.inference.likelihood import ScoredRow, likelihoods
from llmctl.metrics import scores
from llmctl.metrics.scores import References
from llmctl.tables.tasks import TASKS


def evaluate_answers(loaded: Loaded, examples: Sequence[Example], config: EvaluateConfig) -> Measured:
    """Score generated texts (greedy or beam search); for an encoder-decoder also the loss on the targets.

    The filled template is the source of an encoder-decoder or the prompt of a decoder. A source longer than the context
    is truncated at its end, a prompt at its beginning.
    """
    task = TASKS[config.task]
    if "chrf" in task.generated:
        scores.load_sacrebleu("chrF")  # fail before minutes of generation
    family = loaded.model.config.family
    template = template_for(config.task, family, chosen_template(loaded, config))
    prompts, n_cut = _prompts(loaded, [fill_template(template, example.inputs) for example in examples], config)
    settings = GenerateConfig(
        max_tokens=config.max_tokens,
        temperature=0.0,
        beams=config.beams,
        batch_size=config.batch_size,
        stop=task.stops if family == "decoder" else (),
    )
    done = list(generate(loaded, prompts, settings))
    generated = [completion.text.strip() for completion in done]
    references = [_references(example.target) for example in examples]
    figures = {name: scores.TEXT_SCORES[name](generated, references) for name in task.generated}
    if family == "encoder_decoder":
        figures |= _target_loss(loaded, prompts, references, config)
    return Measured(
        figures,
        n_rows=len(examples),
        n_tokens=sum(len(completion.ids) + 1 for completion in done),
        n_empty=sum(not any(text.strip() for text in example.inputs.values()) for example in examples),
        n_cut=n_cut,
        example={"prompt": prompts[0].text, "found": generated[0], "wanted": references[0][0]},
    )


def chosen_template(loaded: Loaded, config: EvaluateConfig) -> str:
    """Return the template from the config, else the one the model was trained with, else an empty string."""
    own = loaded.artifact.provenance.get("template", "")
    return config.template or (own if isinstance(own, str) else "")


def _references(target: str | list[str]) -> list[str]:
    return (
        [target] if isinstance(target, str) else target or [""]
    )  # an unanswerable question: the right answer is empty


def _prompts(loaded: Loaded, texts: Sequence[str], config: EvaluateConfig) -> tuple[list[Prompt], int]:
    limit = longest_row(loaded, config.seq_len)
    is_decoder = loaded.model.config.family == "decoder"
    room = limit - config.max_tokens if is_decoder else limit
    if room < 1:
        raise UsageError(
            f"`--max-tokens {config.max_tokens}` leaves no room for a prompt in a context of {limit} tokens",
            f"use `--max-tokens {max(limit // 2, 1)}` or less",
        )
    prompts, n_cut = [], 0
    for number, text in enumerate(texts):
        ids = encode_prompt(loaded, text)
        if len(ids) > room:
            n_cut += 1
            has_bos = is_decoder and ids[0] == require_tokenizer(loaded).bos_id and room > 1
            keep = room - has_bos
            # The first token stays if it begins the text; a source keeps its end token.
            ids = [*ids[:has_bos], *ids[-keep:]] if is_decoder else [*ids[: room - 1], ids[-1]]
        prompts.append(Prompt(number, ids, text))
    return prompts, n_cut


def _target_loss(
    loaded: Loaded, prompts: Sequence[Prompt], references: References, config: EvaluateConfig
) -> dict[str, float]:
    """Return loss and perplexity on the first reference of each source, including its end token."""
    tokenizer, limit = require_tokenizer(loaded).for_target, loaded.model.config.max_positions
    targets = [encode_target(loaded, others[0])[: limit - 1] for others in references]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    rows = [ScoredRow([*ids, *end], 0, prompt.ids) for ids, prompt in zip(targets, prompts, strict=True)]
    scored = likelihoods(loaded, [row for row in rows if row.ids], config.batch_size)
    loss = sum(row.nats for row in scored) / max(sum(row.count for row in scored), 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
