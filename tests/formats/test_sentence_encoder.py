"""What sentence-transformers' files say of a model, and that they stay with it."""

import json
from pathlib import Path

import pytest

from llmctl.artifacts.load import load_model
from llmctl.config import EvaluateConfig
from llmctl.converting.convert import export_model, import_model
from llmctl.data.examples import Example
from llmctl.errors import ArtifactError
from llmctl.evaluating.labels import evaluate_similarity
from llmctl.formats.sentence_encoder import SentenceEncoder, sentence_encoder

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def files(**contents: object) -> dict[str, bytes]:
    names = {
        "modules": "modules.json",
        "pooling": "1_Pooling/config.json",
        "prompts": "config_sentence_transformers.json",
    }
    return {names[key]: json.dumps(value).encode() for key, value in contents.items()}


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, SentenceEncoder()),
        ({"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}}, SentenceEncoder("first")),
        ({"pooling": {"pooling_mode_mean_tokens": True}, "modules": MODULES}, SentenceEncoder("mean")),
        ({"pooling": {"pooling_mode": "lasttoken"}}, SentenceEncoder("last")),
        (
            {"prompts": {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}},
            SentenceEncoder("", "query: "),
        ),
        ({"prompts": {"prompts": {"query": "query: "}, "default_prompt_name": None}}, SentenceEncoder()),
    ],
)
def test_pooling_and_prompt(contents, expected):
    assert sentence_encoder(files(**contents)) == expected


@pytest.mark.parametrize(
    ("contents", "part"),
    [
        ({"pooling": {"pooling_mode_max_tokens": True}}, "max"),
        ({"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, "cls and mean"),
        ({"pooling": {}}, "none"),
        ({"modules": [{"type": "sentence_transformers.models.Dense"}]}, "Dense"),
        ({"pooling": [1]}, "is a list"),
    ],
)
def test_what_is_not_supported_is_named(contents, part):
    with pytest.raises(ArtifactError, match=part):
        sentence_encoder(files(**contents))


def test_prompts_without_a_default_are_said(caplog):
    sentence_encoder(files(prompts={"prompts": {"query": "query: "}}))
    assert "prompts for `query`" in caplog.text


def test_the_files_stay_with_the_model_and_are_used(models, tmp_path: Path):
    source = import_model(models["bert"], tmp_path / "source")
    settings = files(modules=MODULES, pooling={"pooling_mode_cls_token": True})
    loaded = load_model(source, device="cpu")
    from llmctl.formats.artifact_write import write_artifact

    folder = write_artifact(
        tmp_path / "folder",
        loaded.artifact.config,
        loaded.artifact.state(),
        files=loaded.artifact.files | settings,
        provenance={},
    )
    single = export_model(folder, tmp_path / "one.safetensors", to="single")
    back = export_model(single, tmp_path / "back", to="hf")
    assert json.loads((back / "1_Pooling" / "config.json").read_text()) == {"pooling_mode_cls_token": True}
    pairs = [("the cat", "a mat", 0.5), ("the number", "猫", 0.1), ("good", "bad", 0.9), ("a", "the good cat", 0.3)]
    examples = [Example(str(n), {"text": a, "pair": b}, score) for n, (a, b, score) in enumerate(pairs)]

    def figures(path: Path, pooling: str) -> dict[str, float]:
        return evaluate_similarity(load_model(path, device="cpu"), examples, EvaluateConfig(pooling=pooling)).figures

    assert figures(back, "auto") == figures(source, "first") != figures(source, "mean") == figures(source, "auto")
