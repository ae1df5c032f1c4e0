"""Models that do not say what they are for learn what their data is an example of."""

import json
from pathlib import Path

import pytest

from llmctl.config import DistillConfig, QuantizeConfig, TokenizerConfig
from llmctl.distilling.settings import settle as settle_distill
from llmctl.errors import UsageError
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.quantizing.settings import settle as settle_quantize
from llmctl.recipe import load
from llmctl.tokenizer.train import train_tokenizer
from llmctl.training.task_choice import seen_task
from llmctl.training.task_data import open_task_model


@pytest.mark.parametrize(
    ("name", "content", "task"),
    [
        ("a.tsv", "one\teins\n", "translate"),
        ("a.txt", "one\teins\n", "translate"),
        ("a.txt", "plain text\n", ""),
        ("a.csv", "source,target\na,b\n", "translate"),
        ("a.jsonl", json.dumps({"article": "a", "summary": "b"}), "summarize"),
        ("a.jsonl", json.dumps({"question": "a", "context": "b", "answers": ["c"]}), "qa"),
        ("a.jsonl", json.dumps({"translation": {"en": "a", "de": "b"}}), "translate"),
        ("a.jsonl", json.dumps(["a", "b"]), "translate"),
        ("a.jsonl", json.dumps({"text": "a"}), ""),
        ("a.txt", "", ""),
    ],
)
def test_the_task_is_that_of_the_first_row(tmp_path, name: str, content: str, task: str):
    (tmp_path / name).write_text(content)
    assert seen_task([str(tmp_path / name)]) == task
    assert seen_task([f"{tmp_path}/a.en:{tmp_path}/a.de", "b"]) == "translate"
    assert seen_task([]) == seen_task(["-"]) == ""


@pytest.fixture
def imported(models, tmp_path) -> Path:
    """Return an encoder-decoder as another program wrote it: without an objective, and without <extra_id_0>."""
    artifact = read_artifact(models["encoder_decoder"])
    tokenizer = train_tokenizer(["one two three eins zwei drei"] * 20, TokenizerConfig(vocab_size=300))
    return write_artifact(
        tmp_path / "imported", artifact.config, artifact.state(), files=tokenizer.files(), provenance={}
    )


@pytest.mark.parametrize(("kind", "settle"), [(DistillConfig, settle_distill), (QuantizeConfig, settle_quantize)])
def test_an_imported_encoder_decoder_needs_pairs_and_finds_them(imported, tmp_path, kind, settle):
    (tmp_path / "pairs.tsv").write_text("one\teins\n" * 9)
    (tmp_path / "text.txt").write_text("one two\n" * 9)

    def config(*data: str):
        return settle(load(kind, settings=[f"model={imported}", *data], environment={}).config)

    given = config(f"data.paths=[{tmp_path / 'pairs.tsv'}]")
    assert given.task == "translate"
    open_task_model(given, imported)
    for other in ([], [f"data.paths=[{tmp_path / 'text.txt'}]"]):
        with pytest.raises(UsageError, match="no <extra_id_0>") as caught:
            open_task_model(config(*other), imported)
        assert "`--task` translate, summarize or qa" in caught.value.hint
    assert config("task=qa").task == "qa"
