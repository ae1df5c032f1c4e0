"""Answers that a model in training generates for held-out examples: a few to look at, and scores of many."""

from collections.abc import Callable, Sequence

import torch

from llmctl.artifacts.load import Loaded
from llmctl.config import GenerateConfig
from llmctl.distributed.runtime import Runtime
from llmctl.inference.generate import Prompt, generate
from llmctl.metrics.scores import TEXT_SCORES
from llmctl.preparing.corpus import Corpus
from llmctl.training.samples import SAMPLE_TOKENS, Sampler

Score = Callable[[int | None], dict[str, float]]
"""From the held-out tokens to score at most (None is all) to metrics by name."""

N_SAMPLES = 2
EXTRA_TOKENS = 16
"""Tokens by which a generated answer may be longer than the longest reference."""


def prompts_of(loaded: Loaded, corpus: Corpus, numbers: Sequence[int]) -> tuple[list[Prompt], list[str], int]:
    """Return the prompts of examples, their reference answers, and how many tokens the longest answer has."""
    tokenizer = corpus.tokenizer
    assert corpus.targets is not None
    prompts, answers, longest = [], [], 0
    for index, number in enumerate(numbers):
        ids, target = corpus.documents.document(number).tolist(), corpus.targets.document(number).tolist()
        if loaded.model.config.family == "encoder_decoder":
            ids = [*ids, *loaded.frame.after]
        else:  # `target` marks the tokens of `ids` that are trained
            begins = target.index(1)
            prompt, target = ids[:begins], [token for token, is_trained in zip(ids, target, strict=True) if is_trained]
            # Of a conversation with several turns, only the first answer is asked for.
            end = next((number for number, token in enumerate(target) if token == tokenizer.eos_id), len(target))
            ids, target = prompt, target[: end + 1]
        prompts.append(Prompt(index, ids, tokenizer.decode(ids)))
        answers.append(tokenizer.for_output(loaded.model.config.family).decode(target).strip())
        longest = max(longest, len(target))
    return prompts, answers, longest


def answer(loaded: Loaded, prompts: Sequence[Prompt], n_tokens: int) -> list[str]:
    """Return the model's greedy answers, and leave it in training mode."""
    settings = GenerateConfig(max_tokens=n_tokens, temperature=0.0)
    loaded.model.eval()
    try:
        with torch.inference_mode():
            return [completion.text.strip() for completion in generate(loaded, prompts, settings)]
    finally:
        loaded.model.train()


def make_sampler(loaded: Loaded, corpus: Corpus) -> Sampler | None:
    """Return what answers the first held-out examples; None if the corpus has no answers."""
    if corpus.targets is None:
        return None
    prompts, _, _ = prompts_of(loaded, corpus, corpus.held_out[:N_SAMPLES].tolist())

    def sample() -> list[dict[str, str]]:
        texts = answer(loaded, prompts, SAMPLE_TOKENS)
        return [{"prompt": prompt.text, "text": text} for prompt, text in zip(prompts, texts, strict=True)]

    return sample


def make_score(loaded: Loaded, corpus: Corpus, metric: str, seq_len: int, runtime: Runtime) -> Score | None:
    """Return what scores generated answers to held-out examples, split over all processes; None for other metrics."""
    if metric not in TEXT_SCORES or corpus.targets is None:
        return None

    def score(max_tokens: int | None) -> dict[str, float]:
        held_out = corpus.held_out
        wanted = len(held_out)
        if max_tokens is not None:
            wanted = min(wanted, max(1, max_tokens // seq_len))
        chosen = [int(held_out[index * len(held_out) // wanted]) for index in range(wanted)]
        prompts, answers, longest = prompts_of(loaded, corpus, chosen[runtime.rank :: runtime.world_size])
        texts = answer(loaded, prompts, longest + EXTRA_TOKENS) if prompts else []
        gathered = runtime.gather([texts, answers])
        outputs = [text for own, _ in gathered for text in own]
        references = [[text] for _, own in gathered for text in own]
        return {metric: TEXT_SCORES[metric](outputs, references)}

    return score
