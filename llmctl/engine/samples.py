"""Samples during training: fixed prompts that the model continues at every evaluation, so that one sees it learn."""

from collections.abc import Callable

from llmctl.config import GenerateConfig, PretrainConfig
from llmctl.engine.corpus import Corpus
from llmctl.model.transformer import LanguageModel

SAMPLE_TOKENS = 32


def make_sampler(config: PretrainConfig, corpus: Corpus, model: LanguageModel) -> Callable[[], list[dict[str, str]]]:
    """Return a function that writes samples with the model as it is when called."""
    raise AssertionError
