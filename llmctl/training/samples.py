"""Samples at every evaluation: continuations of fixed prompts that show the model learning."""

from collections.abc import Callable

import torch

from llmctl.artifacts.load import Loaded
from llmctl.config import GenerateConfig, PretrainConfig
from llmctl.inference.encoding import encode_prompt
from llmctl.inference.fill import fill
from llmctl.inference.generate import Prompt, generate
from llmctl.preparing.corpus import Corpus
from llmctl.tables.objectives import OBJECTIVES

SAMPLE_TOKENS = 40
Sampler = Callable[[], list[dict[str, str]]]


def make_sampler(config: PretrainConfig, corpus: Corpus, loaded: Loaded) -> Sampler:
    """Return a function that generates samples with the model as it is when called, and leaves it in training mode."""
    prompts = config.train.sample_prompts or own_prompts(config, corpus)
    model = loaded.model

    def write() -> list[dict[str, str]]:
        model.eval()
        try:
            with torch.inference_mode():
                return [
                    {"prompt": prompt, "text": text}
                    for prompt, text in zip(prompts, answers(loaded, config, prompts), strict=True)
                ]
        finally:
            model.train()

    return write


def own_prompts(config: PretrainConfig, corpus: Corpus) -> tuple[str, ...]:
    """Return the prompt for the built-in corpus, or the beginning of a held-out document of the user's data."""
    if not config.data.paths:
        return (OBJECTIVES[config.objective].prompt,)
    index = int(corpus.held_out[0])
    ids = [int(i) for i in corpus.documents.document(index)[:12] if corpus.tokenizer.token_bytes()[int(i)]]
    text = corpus.tokenizer.decode(ids)
    if OBJECTIVES[config.objective].is_masked:
        return (corpus.tokenizer.decode(ids[:4]) + "<mask>" + corpus.tokenizer.decode(ids[5:]),)
    return (text,)


def answers(loaded: Loaded, config: PretrainConfig, prompts: tuple[str, ...]) -> list[str]:
    """Return the model's answers: continuations, filled masks, spans or targets."""
    if OBJECTIVES[config.objective].is_masked:
        return [
            filled.filled for filled in fill(loaded, [p if "<mask>" in p else p + "<mask>" for p in prompts], top_k=1)
        ]
    settings = GenerateConfig(max_tokens=SAMPLE_TOKENS, temperature=0.0)
    limit = loaded.model.config.max_positions - 1
    encoded = [Prompt(n, encode_prompt(loaded, text)[:limit], text) for n, text in enumerate(prompts)]
    return [completion.text for completion in generate(loaded, encoded, settings)]
