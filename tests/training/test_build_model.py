import pytest

from llmctl.config import ModelChoice, PretrainConfig
from llmctl.errors import UsageError
from llmctl.training.build_model import build_model


def test_a_mixture_of_experts_from_random_weights_is_refused(text_tokenizer):
    config = PretrainConfig(model=ModelChoice("tiny", {"n_experts": 4}))
    with pytest.raises(UsageError, match="balances its experts"):
        build_model(config, text_tokenizer)
