import pytest

from llmctl.config import ModelChoice, PretrainConfig
from llmctl.errors import UsageError
from llmctl.tokenizer.load import find_tokenizer
from llmctl.training.build_model import build_model
from tests.support.spm import folder_files


def test_a_mixture_of_experts_from_random_weights_is_refused(text_tokenizer):
    config = PretrainConfig(model=ModelChoice("tiny", {"n_experts": 4}))
    with pytest.raises(UsageError, match="balances its experts"):
        build_model(config, text_tokenizer)


@pytest.mark.parametrize("objective", ["seq2seq", "clm"])
def test_a_tokenizer_of_two_vocabularies_gives_an_encoder_decoder_two_tables(objective):
    tokenizer = find_tokenizer(folder_files("Marian", separate_vocabs=True))
    model = build_model(PretrainConfig(objective=objective, model=ModelChoice("tiny", {})), tokenizer)
    sizes = (tokenizer.vocab_size, tokenizer.for_target.vocab_size)
    assert sizes[0] != sizes[1]
    is_pair = model.config.family == "encoder_decoder"
    assert (model.config.source_vocab_size, model.config.vocab_size) == (sizes if is_pair else (0, sizes[0]))
