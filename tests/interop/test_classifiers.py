"""Classifiers against transformers: the head is trained here and read there, and the other way."""

from dataclasses import fields

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.families.classifiers import CLASSIFIERS
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.model.transformer import LanguageModel
from tests.families.test_table import CONFIGS
from tests.support.architectures import VARIANTS

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
pytestmark = pytest.mark.interop

SHAPE = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_positions": 32, "pad_id": 0, "eos_id": 2}
CASES = [(row.architecture, settings) for row in CLASSIFIERS for settings in CONFIGS.get(row.architecture, ())]
for classifier in CLASSIFIERS:
    if classifier.architecture not in CONFIGS:
        body = classifier.architecture.partition("For")[0].removesuffix("Text")
        variant = next(row for row in VARIANTS.values() if row.architecture.startswith((body + "For", body + "LM")))
        config = classifier.read_config(variant.settings | {"id2label": dict.fromkeys("012", "")})
        named = {field.name: getattr(config, field.name) for field in fields(config)}
        # The rows of the batch end in padding, which fairseq's encoders also find by the offset of their positions.
        pad = config.position_offset - 1 if config.family == "encoder" and config.position_offset else 0
        named |= {"labels": ("a", "b", "c"), "pad_id": pad, "architecture": classifier.architecture}
        CASES.append((classifier.architecture, named))


def random_classifier(settings: dict) -> LanguageModel:
    model = LanguageModel(ModelConfig(**(SHAPE | settings))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


@pytest.mark.parametrize(("architecture", "settings"), CASES)
def test_a_classifier_gives_the_same_outputs_there_and_comes_back(architecture, settings, tmp_path):
    model = random_classifier(settings)
    out = write_artifact(tmp_path / "m", model.config, model.state_dict(), files={}, provenance={})
    loaded, report = getattr(transformers, architecture).from_pretrained(out, output_loading_info=True)
    assert {key: list(value) for key, value in report.items() if value} == {}
    ids = torch.randint(4, 40, (3, 9), generator=torch.Generator().manual_seed(7))
    lengths = (9, 6, 4)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        ids[row, length - 1] = 2
        ids[row, length:] = 0
    with torch.no_grad():
        wanted = loaded.eval()(input_ids=ids, attention_mask=mask).logits
        ours = model.classify(ids, documents_BT=mask)
    assert wanted.std(dim=0).min() > 0.005, "outputs that do not depend on the input prove nothing"
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-5)
    names = model.config.labels or [f"LABEL_{number}" for number in range(model.config.n_labels)]
    assert [loaded.config.id2label[number] for number in range(len(names))] == list(names)

    loaded.save_pretrained(tmp_path / "theirs")
    artifact = read_artifact(tmp_path / "theirs")
    back = LanguageModel(artifact.config).eval()
    back.load_state_dict(artifact.state())
    with torch.no_grad():
        torch.testing.assert_close(back.classify(ids, documents_BT=mask), ours, atol=2e-5, rtol=1e-5)
    assert artifact.config.labels == model.config.labels
    assert artifact.config.problem == model.config.problem
