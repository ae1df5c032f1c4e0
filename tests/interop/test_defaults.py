"""A key that a config.json lacks means what it means in transformers: the default of the model's class."""

import json
from dataclasses import replace
from typing import Any

import pytest

from llmctl.config import ModelConfig
from llmctl.errors import ArtifactError
from llmctl.families.table import READ
from tests.support.architectures import VARIANTS, Variant, config_class

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
pytestmark = pytest.mark.interop

READ_VARIANTS = [name for name, variant in VARIANTS.items() if variant.architecture in READ]
IDENTITY = ("architectures", "model_type", "transformers_version", "dtype")
TOKENS = ("bos_id", "eos_id", "pad_id", "mask_id", "decoder_start_id")
NOT_RUN = {("qwen2-window", "use_sliding_window"), ("granite-4", "layer_types")}
"""transformers then has windowed layers without a window, and stops when it computes them; or layers with a state, which
are refused by their tensors.
"""


def written_out(config: Any, variant: Variant) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_dict(), default=str)) | {"architectures": [variant.architecture]}


def read(variant: Variant, values: dict[str, Any]) -> ModelConfig | ArtifactError:
    try:
        config = READ[variant.architecture].read_config(values)
    except ArtifactError as error:
        return error
    # A token beyond the small vocabulary is none here.
    return replace(config, **{key: -1 for key in TOKENS if getattr(config, key) >= config.vocab_size})


@pytest.mark.parametrize("name", READ_VARIANTS)
def test_a_missing_key_has_the_default_of_its_class(name):
    variant = VARIANTS[name]
    kind = getattr(transformers, config_class(variant))
    whole = written_out(kind(**variant.settings), variant)
    n_compared = 0
    for key in whole:
        if key in IDENTITY or (name, key) in NOT_RUN:
            continue
        values = {other: value for other, value in whole.items() if other != key}
        try:
            theirs = written_out(kind.from_dict(dict(values)), variant)
        except Exception:  # noqa: BLE001 - whatever their class raises where it needs the key
            continue
        ours, expected = read(variant, values), read(variant, theirs)
        if isinstance(ours, ArtifactError):
            continue  # a size that a file must have here
        assert ours == expected, key
        n_compared += 1
    assert n_compared > 8
