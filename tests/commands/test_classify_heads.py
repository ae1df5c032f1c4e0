"""Every verb with a token classifier and with a question-answering model: it does its work, or refuses the head by name."""

import json
from pathlib import Path

import pytest

from llmctl.artifacts.load import load_model
from llmctl.inference.entities import find_entities
from llmctl.inference.spans import find_answers

SMALL = ("--set", "train.seq_len=32", "--set", "train.batch_size=4", "-q")
BITS = ("--bits", "4", "--calib", "text.txt", *SMALL)
NAMES = {"tokens": "a token classifier", "span": "a question-answering model"}
GIVEN = {"tokens": ("the cat 猫",), "span": ("what", "the cat 猫")}
ROWS = {
    "tokens": {"tokens": ["the", "cat"], "tags": ["B-PER", "O"]},
    "span": {"question": "what", "context": "the cat", "answers": ["cat"]},
}
DONE = {
    "quantize target": ("quantize", "M", "--target-bpw", "5", "--calib", "text.txt", "-o", "out", *SMALL),
    "inspect": ("inspect", "M"),
    "classify": ("classify", "-m", "M", "GIVEN"),
    "evaluate": ("evaluate", "M", "-d", "rows.jsonl"),
    "evaluate alone": ("evaluate", "M", "-d", "rows.jsonl", "--task", "TASK", "--seq-len", "32"),
    "export hf": ("export", "M", "--to", "hf", "-o", "out"),
    "export single": ("export", "M", "--to", "single", "-o", "out.safetensors"),
    "import": ("import", "M", "-o", "out"),
    "use": ("use", "M"),
    "quantize 8": ("quantize", "M", "--bits", "8", "--calib", "text.txt", "-o", "out", *SMALL),
    "quantize w8a8": ("quantize", "M", "--set", "weights.scheme=w8a8", "--calib", "text.txt", "-o", "out", *SMALL),
    "learned": ("quantize", "M", "--method", "learned", "--steps", "2", "-o", "out", *BITS),
    **{name: ("quantize", "M", "--method", name, "-o", "out", *BITS) for name in ("nearest", "clip", "gptq", "guided")},
    **{name: ("quantize", "M", "--method", name, "-o", "out", *BITS) for name in ("awq", "awq-gptq")},
}
REFUSED = {
    "generate": ("generate", "-m", "M", "the cat"),
    "chat": ("chat", "-m", "M", "--script", "-"),
    "fill": ("fill", "-m", "M", "a <mask>"),
    "bench": ("bench", "M"),
    "finetune": ("finetune", "M", "rows.tsv", "--task", "classify", "--steps", "2", "-o", "out", *SMALL),
    "finetune text": ("finetune", "M", "text.txt", "--task", "text", "--steps", "2", "-o", "out", *SMALL),
    "lora": ("finetune", "M", "text.txt", "--task", "text", "--method", "lora", "-o", "out", *SMALL),
    "finetune dry": ("finetune", "M", "rows.tsv", "--task", "classify", "--dry-run"),
    "distill": ("distill", "M", "-d", "text.txt", "--steps", "2", "-o", "out", *SMALL),
    "distill to": ("distill", "BERT", "-d", "text.txt", "--student", "M", "--steps", "2", "-o", "out", *SMALL),
    "distill more": ("distill", "BERT", "-d", "text.txt", "--set", "teacher.more=[M]", "-o", "out", *SMALL),
    "distill cache": ("distill", "cache", "M", "-d", "text.txt", "-o", "out"),
    "pretrain": ("pretrain", "text.txt", "--model", "M", "--objective", "mlm", "--steps", "2", "-o", "out", *SMALL),
    "evaluate mask": ("evaluate", "M", "-d", "text.txt", "--task", "mask"),
    "evaluate classify": ("evaluate", "M", "-d", "rows.tsv", "--task", "classify"),
    "evaluate similarity": ("evaluate", "M", "-d", "rows.tsv", "--task", "similarity"),
    "evaluate tasks": ("evaluate", "M", "--tasks", "arc_easy"),
    "quantize classify": (
        "quantize",
        "M",
        "--task",
        "classify",
        "--bits",
        "4",
        "--calib",
        "rows.tsv",
        "-o",
        "out",
        *SMALL,
    ),
    "quantize loss": ("quantize", "M", "--set", "loss.name=fkl", "-o", "out", *BITS),
    "gguf": ("export", "M", "--to", "gguf", "-o", "out.gguf"),
}


@pytest.fixture
def model(request, headed, models, monkeypatch, tmp_path) -> tuple[str, str, dict[str, str]]:
    """Return the head, the model, and what stands for the names in the commands."""
    head = request.param
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))  # where `use` notes its model
    path = headed(head, **({"labels": ("O", "B-PER")} if head == "tokens" else {}))
    Path("text.txt").write_text(
        "\n\n".join(f"the good cat {i}. 猫坐在垫子上。" * 3 for i in range(30)), encoding="utf-8"
    )
    Path("rows.tsv").write_text("text\tpair\tlabel\n" + "".join(f"the {i}\ta\t{i % 2}\n" for i in range(40)))
    Path("rows.jsonl").write_text(json.dumps(ROWS[head]) + "\n")
    task = {"tokens": "tokens", "span": "qa"}[head]
    return (
        head,
        path,
        {"M": path, "BERT": str(models["bert"]), "TASK": task, "teacher.more=[M]": f"teacher.more=[{path}]"},
    )


def filled(command: tuple[str, ...], head: str, names: dict[str, str]) -> list[str]:
    return [part for word in command for part in (GIVEN[head] if word == "GIVEN" else (names.get(word, word),))]


@pytest.mark.parametrize("model", NAMES, indirect=True)
@pytest.mark.parametrize("verb", DONE)
def test_a_verb_that_knows_the_head_does_its_work(verb, model, shell):
    head, path, names = model
    status, out, err = shell(*filled(DONE[verb], head, names))
    assert (status, out != "") == (0, True), err
    if (made := next((name for name in ("out", "out.safetensors") if Path(name).exists()), None)) is not None:
        before, after = load_model(Path(path), device="cpu"), load_model(Path(made), device="cpu", packed=True)
        own, other = before.model.config, after.model.config
        assert (own.head, own.n_labels, own.labels) == (other.head, other.n_labels, other.labels)
        wide = verb in ("quantize 8", "quantize w8a8") or not verb.startswith(("quantize", *BITS_METHODS))
        if head == "tokens" and wide:
            parts = [
                [(each.label, each.start, each.end) for each in find_entities(one, ["the cat 猫"])[0]]
                for one in (before, after)
            ]
            assert parts[0] == parts[1]
        if head == "span" and wide:
            parts = [find_answers(one, [GIVEN["span"]])[0].text for one in (before, after)]
            assert parts[0] == parts[1]


BITS_METHODS = ("learned", "nearest", "clip", "gptq", "guided", "awq")


@pytest.mark.parametrize("model", NAMES, indirect=True)
@pytest.mark.parametrize("verb", REFUSED)
def test_any_other_refuses_the_head_by_its_name_before_it_begins(verb, model, shell):
    head, _, names = model
    status, out, err = shell(*filled(REFUSED[verb], head, names), stdin=b"hello\n")
    assert status == (4 if verb == "gguf" else 2), err
    assert out == ""
    assert f"is {NAMES[head]}" in err
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize("model", NAMES, indirect=True)
def test_inspect_shows_the_head_and_its_labels(model, shell):
    head, path, _ = model
    _, out, _ = shell("inspect", path)
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (rows["head"], rows["labels"]) == (head, {"tokens": "O, B-PER", "span": "start, end"}[head])
    record = json.loads(shell("inspect", path, "--json")[1])
    assert record["labels"] == rows["labels"].split(", ")


@pytest.mark.parametrize("model", ["tokens"], indirect=True)
def test_an_adapter_for_tokens_is_refused_by_its_task(model, shell):
    """PEFT's TOKEN_CLS has a head of its own in the adapter."""
    _, path, _ = model
    Path("adapter").mkdir()
    values = {"peft_type": "LORA", "task_type": "TOKEN_CLS", "r": 2, "base_model_name_or_path": path}
    Path("adapter/adapter_config.json").write_text(json.dumps(values))
    Path("adapter/adapter_model.safetensors").write_bytes((Path(path) / "model.safetensors").read_bytes())
    status, _, err = shell("classify", "-m", "adapter", "the cat")
    assert status == 4
    assert "TOKEN_CLS" in err
