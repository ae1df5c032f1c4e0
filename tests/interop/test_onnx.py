"""Encoders as ONNX files against transformers: the same outputs for batches with padding, by the same names."""

import numpy as np
import pytest
import torch

from llmctl.converting.export_onnx import export_onnx
from llmctl.families.table import READ
from llmctl.formats.artifact import read_artifact
from tests.support.architectures import VARIANTS, build

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install '.[onnx]'")
transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
pytestmark = pytest.mark.interop

ENCODERS = [
    name
    for name, variant in VARIANTS.items()
    if variant.architecture in READ and READ[variant.architecture].read_config(variant.settings).family == "encoder"
]
LENGTHS = (40, 23, 9, 1)
OTHER_NAMES = {"bert-pretraining": {"logits": "prediction_logits"}}
BODIES = {"electra": "electra"}
"""A class whose head is not read."""


def batch_of(config, *, left: bool):
    ids = torch.randint(10, 380, (len(LENGTHS), LENGTHS[0]), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        tokens = slice(LENGTHS[0] - length, None) if left else slice(0, length)
        mask[row, tokens] = 1
    return ids.masked_fill(mask == 0, max(config.pad_id, 0)), mask


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_are_those_of_transformers(name, tmp_path):
    model = build(VARIANTS[name], tmp_path / "m")
    model = getattr(model, BODIES[name]) if name in BODIES else model
    record = export_onnx(tmp_path / "m", tmp_path / "out")
    session = onnxruntime.InferenceSession(record["file"], providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    config = read_artifact(tmp_path / "m").config
    for left in (False, True) if config.positions == "learned" else (False,):
        ids, mask = batch_of(config, left=left)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in names:
            inputs["token_type_ids"] = (torch.arange(LENGTHS[0]) > 4).long().expand_as(ids)
        with torch.no_grad():
            expected = model(**inputs)
        found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        for key, output in zip(record["outputs"], found, strict=True):
            wanted = expected[OTHER_NAMES.get(name, {}).get(key, key)].numpy()
            tokens = mask.numpy().astype(bool) if wanted.shape[:2] == tuple(mask.shape) else slice(None)
            assert output.shape == wanted.shape
            assert wanted[tokens].std() > 1e-3
            np.testing.assert_allclose(output[tokens], wanted[tokens], atol=1e-4 * max(1.0, wanted[tokens].std()))
