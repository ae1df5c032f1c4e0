"""What `train.freeze` names is not trained, and what names nothing is refused."""

import pytest

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.model.transformer import LanguageModel
from llmctl.training.freezing import freeze


def model(**fields) -> LanguageModel:
    shape = {"vocab_size": 20, "d_model": 16, "n_layers": 3, "n_heads": 2, "max_positions": 16, "positions": "learned"}
    return LanguageModel(ModelConfig(**(shape | fields)))


def frozen(one: LanguageModel) -> set[str]:
    return {name for name, parameter in one.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize(
    ("pattern", "parts"),
    [
        ("embeddings", ("embed_tokens", "embed_positions")),
        ("layers.1", ("layers.1.",)),
        ("layers.0-1", ("layers.0.", "layers.1.")),
        ("*.self_attn.*", ("self_attn",)),
    ],
)
def test_patterns_name_parameters(pattern: str, parts: tuple[str, ...]):
    one = model()
    n_frozen = freeze(one, [pattern])
    names = {name for name, _ in one.named_parameters() if any(part in name for part in parts)}
    assert frozen(one) == names
    assert n_frozen == sum(p.numel() for name, p in one.named_parameters() if name in names)


def test_both_stacks_have_layers():
    one = model(family="encoder_decoder")
    freeze(one, ["layers.2"])
    assert {name.split(".")[1] for name in frozen(one)} == {"encoder", "decoder"}


def test_what_names_nothing_or_everything_is_refused():
    with pytest.raises(UsageError, match=r"layers\.9"):
        freeze(model(), ["layers.9"])
    with pytest.raises(UsageError, match="nothing to train"):
        freeze(model(), ["*"])
    assert freeze(model(), []) == 0
