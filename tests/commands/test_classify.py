"""`llmctl classify` in a shell: labels, lines, records, numbers, and models that have no head."""

import json
from pathlib import Path

import pytest

from llmctl.artifacts.heads import with_head
from llmctl.artifacts.load import load_model
from llmctl.data.labels import Labels
from llmctl.formats.artifact_write import write_artifact
from llmctl.inference.classify import classify


@pytest.fixture
def call(shell):
    """Return a caller of the command line: (exit code, stdout, stderr)."""
    return shell


@pytest.fixture
def make(models, tmp_path, monkeypatch):
    """Return a maker of classifiers with heads of random weights."""
    monkeypatch.chdir(tmp_path)

    def make_it(problem: str, *names: str, family: str = "bert") -> str:
        base = load_model(models[family], device="cpu", dtype="float32")
        model = with_head(base, Labels(problem, names), len(names) or 1, pooling="auto", seed=0)
        model.classifier.weight.data.mul_(50)
        out = tmp_path / problem
        write_artifact(out, model.config, model.state_dict(), files=base.artifact.files, provenance={})
        return str(out)

    return make_it


def test_one_text_has_a_line_per_label_and_a_pipe_a_line_per_text(call, make):
    model = make("single", "no", "yes", "猫")
    status, out, err = call("classify", "-m", model, "the cat 猫")
    assert status == 0
    assert "model: " in err
    rows = [line.split("\t") for line in out.splitlines()]
    assert {label for _, label in rows} == {"no", "yes", "猫"}
    assert [float(share) for share, _ in rows] == sorted((float(share) for share, _ in rows), reverse=True)
    status, out, err = call("classify", "-q", "-m", model, "-", stdin="the cat 猫\n\nbad\n".encode())
    assert (status, err) == (0, "")
    loaded = load_model(Path(model), device="cpu", dtype="float32")
    assert out.splitlines() == [one.chosen[0] for one in classify(loaded, [("the cat 猫",), ("",), ("bad",)])]
    # A text's result does not depend on its neighbors.
    assert out.splitlines()[0] == rows[0][1]
    status, out, _ = call("classify", "-q", "--json", "-m", model, "a", "b")
    record = json.loads(out)
    assert (record["text"], record["pair"], record["labels"]) == ("a", "b", [max(record["p"], key=record["p"].get)])


def test_several_labels_and_numbers(call, make):
    several, number = make("multi", "a", "b"), make("regression")
    status, out, _ = call("classify", "-q", "-m", several, "-", stdin=b"x\ny\n")
    assert status == 0
    assert len(out.splitlines()) == 2
    assert all(set(line.split("|")) <= {"a", "b", ""} for line in out.splitlines())
    status, out, _ = call("classify", "-q", "-m", number, "--pairs", "-", stdin=b"x\ty\n")
    float(out)
    status, second, _ = call("classify", "-q", "-m", number, "x", "y")
    assert (status, second) == (0, out)


def test_a_text_longer_than_the_context_is_said(call, make):
    status, out, err = call("classify", "-m", make("single", "no", "yes"), "cat " * 200)
    assert status == 0
    assert len(out.splitlines()) == 2
    assert "1 texts were longer" in err


def test_a_model_without_a_head_is_refused(call, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = call("classify", "-m", str(models["decoder"]), "x")
    assert (status, out) == (2, "")
    assert "is a decoder model without a classification head" in err
    status, _, err = call("classify", "x")
    assert status == 3
    assert "finetune" in err


def test_a_token_classifier_prints_entities_with_their_place_in_the_text(call, headed):
    model = headed("tokens", labels=("O", "B-PER"))
    text = "the good cat 猫坐在垫子上。"
    status, out, err = call("classify", "-q", "-m", model, text)
    assert (status, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    assert rows
    assert all((label, text[int(start) : int(end)]) == ("PER", part) for _, label, start, end, part in rows)
    status, out, _ = call("classify", "-q", "--json", "-m", model, "-", stdin=f"{text}\n\n".encode())
    first, second = map(json.loads, out.splitlines())
    assert (first["text"], second) == (text, {"text": "", "entities": []})
    assert [
        [f"{each['score']:.3f}", each["label"], str(each["start"]), str(each["end"]), each["text"]]
        for each in first["entities"]
    ] == rows
    status, out, _ = call("classify", "-q", "-m", model, "-", stdin=f"{text}\nthe\n".encode())
    assert out.split("\n\n")[0].splitlines() == ["\t".join(row) for row in rows]
    status, out, err = call("classify", "-q", "-m", model, "a", "b")
    assert (status, out) == (2, "")
    assert "is a token classifier" in err


def test_a_question_answering_model_reads_questions_with_contexts(call, headed):
    model = headed("span")
    context = "the good cat sat. 猫坐在垫子上。"
    status, out, err = call("classify", "-q", "-m", model, "what cat", context)
    assert (status, err) == (0, "")
    _, start, end, answer = out.rstrip("\n").split("\t")
    assert answer == context[int(start) : int(end)]
    row = json.dumps({"question": "what cat", "context": context, "id": 7})
    lines = f"what cat\t{context}\n{row}\n".encode()
    status, piped, _ = call("classify", "-q", "-m", model, "-", stdin=lines)
    assert piped == out * 2
    assert call("classify", "-q", "-m", model, "--pairs", "-", stdin=lines.splitlines(keepends=True)[0])[1] == out
    status, found, _ = call("classify", "-q", "--json", "-m", model, "what cat", context)
    record = json.loads(found)
    assert (record["question"], record["answer"], record["start"]) == ("what cat", answer, int(start))
    spaced = json.dumps({"question": "what cat", "context": context}, indent="\t").replace("\n", "")
    assert call("classify", "-q", "-m", model, spaced)[1] == out
    for wrong in ("a text", '{"question": "a"}', '{"question":\t5}'):
        status, out, err = call("classify", "-q", "-m", model, "-", stdin=f"what\tthe cat\n{wrong}\n".encode())
        assert (status, out) == (2, "")
        assert "is a question-answering model" in err
        assert f"`{wrong}` alone".replace("\t", "\\t") in err
        assert "QUESTION" in err
    status, _, err = call("classify", "-m", model, "what " * 99, context)
    assert "1 texts were longer" in err
