"""Fine-tuning end to end: every task, family and method learns, repeats, resumes, and is used as it was trained."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llmctl.artifacts.load import Loaded, load_model
from llmctl.config import FinetuneConfig
from llmctl.errors import ArtifactError, InterruptedRunError, UsageError
from llmctl.formats.artifact_write import write_artifact
from llmctl.inference.classify import classify
from llmctl.jobs.begin import begin
from llmctl.jobs.finish import Trained
from llmctl.jobs.resume import resume
from llmctl.losses.base import IGNORE
from llmctl.preparing.examples import chat_of, prepare_examples
from llmctl.recipe import load
from llmctl.runs.folder import find_run
from llmctl.runs.progress import Silent
from llmctl.runs.removal import not_written
from llmctl.tables.preferences import PREFERENCES
from llmctl.training.batch import to_device
from llmctl.training.finetune_settings import settle
from llmctl.training.objectives import LabelPrediction
from llmctl.training.task_data import TaskData
from tests.support.jobs import finish, finish_two_ranks
from tests.support.tuning import FAMILIES, SMALL
from tests.support.warm import WARM

WORDS = ("good", "bad", "猫")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(name: str, rows: list[dict]) -> Path:
    path = Path(name)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def classes(n: int = 40) -> Path:
    return write_rows("classes.jsonl", [{"text": f"cat {i} is {w}", "label": w} for i in range(n) for w in WORDS])


def questions(n: int = 60) -> Path:
    rows = [{"question": f"what is {i}?", "context": f"the number {i}.", "answer": f"number {i}"} for i in range(n)]
    return write_rows("questions.jsonl", rows)


def chats(n: int = 60) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i}?"},
                {"role": "assistant", "content": f"number {i}"},
                {"role": "user", "content": "猫?"},
                {"role": "assistant", "content": "good 猫"},
            ]
        }
        for i in range(n)
    ]
    return write_rows("chats.jsonl", rows)


def preferences(n: int = 60, *, single: bool = False) -> Path:
    pairs = [{"prompt": f"what is {i}?", "chosen": f"number {i}", "rejected": f"bad 猫 {i % 7}"} for i in range(n)]
    answers = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row in pairs
        for kind in ("chosen", "rejected")
    ]
    return write_rows("preferences.jsonl", answers if single else pairs)


def config_of(model: Path, data: Path, task: str, *settings: str) -> FinetuneConfig:
    given = [*SMALL, f"model={model}", f"data.paths=[{data}]", f"task={task}", *settings]
    return settle(load(FinetuneConfig, settings=given, environment={}).config)


def run(model: Path, data: Path, task: str, *settings: str, out: Path | None = None) -> Trained:
    trained = begin("finetune", config_of(model, data, task, *settings), out=out, quiet=True)
    assert trained is not None
    return trained


def outputs(path: Path, texts: list[tuple[str, ...]]) -> torch.Tensor:
    loaded = load_model(path, device="cpu", dtype="float32")
    found = classify(loaded, texts)
    names = loaded.model.config.labels
    return torch.tensor([[one.probabilities[name] for name in names] or list(one.values) for one in found])


@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "full") for family in FAMILIES), ("decoder", "lora"), ("bert", "lora"), ("encoder_decoder", "dora")],
)
def test_labels_are_learned_and_the_head_survives(models, family, method):
    steps = 40 if method == "full" else 10
    trained = run(models[family], classes(), "classify", f"method={method}", f"train.steps={steps}")
    before, after = trained.summary["before"], trained.summary["after"]
    assert after["loss"] < before["loss"]
    if method == "full":  # beside random weights an adapter has little to hold on to
        assert after["loss"] < 0.8 * before["loss"]
        assert after["accuracy"] > 0.6 > before["accuracy"]
    assert trained.summary["metric"] == "accuracy"
    # What was written gives what was measured: the figures of the run are those of the files.
    loaded = load_model(trained.path, device="cpu", dtype="float32")
    assert loaded.model.config.labels == ("bad", "good", "猫")
    found = classify(loaded, [(f"cat {i} is {w}",) for i in range(40) for w in WORDS])
    right = [one.chosen[0] == WORDS[place % 3] for place, one in enumerate(found)]
    assert np.mean(right) == pytest.approx(after["accuracy"], abs=0.25)
    if method != "full":
        assert trained.summary["n_trained"] < 0.5 * trained.summary["n_parameters"]
        assert not (trained.path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("loss", "method"),
    [("dpo", "full"), ("dpo", "qlora"), ("ipo", "lora"), ("orpo", "full"), ("simpo", "lora"), ("kto", "full")],
)
def test_preferences_are_learned(models, loss, method):
    trained = run(models["decoder"], preferences(), "prefer", f"preference.loss={loss}", f"method={method}")
    before, after = trained.summary["before"], trained.summary["after"]
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 0.9
    if PREFERENCES[loss].needs_reference:  # equal to the reference, and nobody's favorite
        assert (before["margin"], before["accuracy"]) == (0.0, 0.0)
        assert before["loss"] == pytest.approx({"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}[loss])
    assert after["margin"] > before["margin"]


def test_single_answers_are_learned_and_need_a_loss_for_them(models):
    with pytest.raises(UsageError, match=r"line 1 has one answer, but `preference.loss` is dpo"):
        run(models["decoder"], preferences(single=True), "prefer")
    trained = run(models["decoder"], preferences(single=True), "prefer", "preference.loss=kto", "method=lora")
    before, after = trained.summary["before"], trained.summary["after"]
    assert "accuracy" not in after
    assert (before["loss"], before["margin"]) == (0.5, 0.0)
    assert after["loss"] < 0.5
    assert after["margin"] > 0


def test_a_measured_reference_is_that_of_an_adapter_switched_off(models):
    settings = ("optim.lr=0", "train.steps=1", "optim.name=adamw", "optim.weight_decay=0")
    figures = [
        run(models["decoder"], preferences(), "prefer", "preference.loss=kto", f"method={method}", *settings).summary[
            "before"
        ]
        for method in ("full", "lora")
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(("family", "method"), [("decoder", "dora"), ("bert", "lora"), ("encoder_decoder", "lora")])
def test_an_adapter_and_the_merged_model_are_the_same(models, family, method):
    texts = [("cat 3 is good",), ("猫",)]
    short = (f"method={method}", "train.steps=4")
    adapter = run(models[family], classes(), "classify", *short, out=Path("adapter"))
    merged = run(models[family], classes(), "classify", *short, "merge=true", out=Path("merged"))
    assert (merged.path / "model.safetensors").exists()
    torch.testing.assert_close(outputs(adapter.path, texts), outputs(merged.path, texts), atol=1e-6, rtol=1e-5)


def test_several_labels_and_numbers_are_learned(models):
    several = write_rows(
        "several.jsonl",
        [
            {"text": f"cat {i} {' '.join(c)}", "labels": list(c)}
            for i in range(12)
            for c in ("a", "ab", "b", "abc", "c")
        ],
    )
    trained = run(models["encoder"], several, "classify", "train.steps=20")
    assert trained.summary["metric"] == "f1"
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]
    rows = [{"sentence1": f"{WORDS[i % 3]} {i}", "sentence2": "mat", "score": i % 3 + 0.5} for i in range(70)]
    numbers = write_rows("numbers.jsonl", rows)
    trained = run(models["encoder"], numbers, "classify", "train.steps=30", "data.val_frac=0.3")
    assert trained.summary["metric"] == "spearman"
    assert trained.summary["after"]["spearman"] > 0.6
    assert len(outputs(trained.path, [("cat", "mat")])[0]) == 1


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        ("decoder", "chat", "lora"),
        ("decoder", "qa", "full"),
        ("encoder_decoder", "qa", "full"),
    ],
)
def test_texts_are_learned(models, family, task, method):
    data = chats() if task == "chat" else questions()
    trained = run(models[family], data, task, f"method={method}", "train.metric=exact_match")
    assert trained.summary["after"]["loss"] < 0.97 * trained.summary["before"]["loss"]
    assert 0 <= trained.summary["after"]["exact_match"] <= 1
    loaded = load_model(trained.path, device="cpu", dtype="float32")
    assert loaded.tokenizer is not None
    if task == "chat":
        assert "chat_template.jinja" in loaded.artifact.files
    elif method == "full":
        assert "{question}" in loaded.artifact.provenance["template"]


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_text_goes_on_with_the_pretraining(models, family):
    path = Path("text.txt")
    path.write_text(
        "\n".join(f"the good cat {i} sat on a bad mat. 猫坐在垫子上。" for i in range(200)), encoding="utf-8"
    )
    trained = run(models[family], path, "text", "data.split=line", "method=lora")
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]


def test_a_run_repeats_byte_for_byte(models):
    paths = [run(models["decoder"], chats(), "chat", "method=lora", out=Path(name)).path for name in ("a", "b")]
    files = [(path / "adapter_model.safetensors").read_bytes() for path in paths]
    assert files[0] == files[1]


def interrupt(monkeypatch, *job) -> None:
    """Begin a run and stop it at its eighth step."""
    import llmctl.jobs.begin as engine

    class Stopping(Silent):
        def step(self, record, total_steps, eta_seconds) -> None:  # noqa: ARG002
            if record["step"] == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "make_progress", lambda **_: Stopping())
        with pytest.raises(InterruptedRunError) as caught:
            run(*job)
    assert "llmctl finetune --resume" in caught.value.hint


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [
        ("bert", "classify", "lora"),
        ("decoder", "chat", "full"),
        ("decoder", "prefer", "full"),
        ("encoder_decoder", "qa", "dora"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(models, family, task, method, monkeypatch):
    data = {"classify": classes, "chat": chats, "prefer": preferences, "qa": questions}[task]()
    whole = run(models[family], data, task, f"method={method}", out=Path("whole"))
    interrupt(monkeypatch, models[family], data, task, f"method={method}")
    again = resume("finetune", str(find_run("latest")), quiet=True)
    assert again is not None
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert tensors(again.path / name) == tensors(whole.path / name)
    assert again.summary["after"] == whole.summary["after"]


def tensors(path: Path) -> dict[str, bytes]:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118 - no mapping


def test_a_run_does_not_go_on_with_another_base(models, tmp_path, monkeypatch):
    import shutil

    import llmctl.jobs.begin as engine

    base = tmp_path / "base"
    shutil.copytree(models["decoder"], base)

    class Stopping(Silent):
        def step(self, record, total_steps, eta_seconds) -> None:  # noqa: ARG002
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "make_progress", lambda **_: Stopping())
        with pytest.raises(InterruptedRunError):
            run(base, chats(), "chat", "method=lora")
    model = load_model(base, device="cpu", dtype="float32")
    with torch.no_grad():
        model.model.lm_head.weight.add_(1.0)
    write_artifact(
        base, model.model.config, model.model.state_dict(), files=model.artifact.files, provenance={}, force=True
    )
    with pytest.raises(ArtifactError, match="started with"):
        resume("finetune", str(find_run("latest")), quiet=True)
    with pytest.raises(UsageError, match="llmctl finetune"):
        resume("pretrain", str(find_run("latest")), quiet=True)


def prepared(model: Path, data: Path, task: str, *settings: str):
    config = config_of(model, data, task, *settings)
    base = load_model(model, device="cpu", dtype="float32")
    corpus, findings, first = prepare_examples(config, Path("prepared"), base)
    return config, base, corpus, findings, first


def total(base: Loaded, config: FinetuneConfig, corpus) -> tuple[float, float]:
    objective = LabelPrediction(base.model, torch.zeros(base.model.config.vocab_size, dtype=torch.int32), 64).eval()
    batches = TaskData(config, base, corpus, "loss").batches(base.model.config, shuffle=False)
    with torch.inference_mode():
        losses = [objective(to_device(batches.batch([row]), torch.device("cpu"))) for row in range(batches.n_rows)]
    return sum(float(loss.sum) for loss in losses), sum(float(loss.count) for loss in losses)


@pytest.mark.parametrize(("task", "data"), [("chat", chats), ("qa", questions)])
def test_examples_that_share_a_row_do_not_see_each_other(models, task, data):
    config, base, corpus, _, _ = prepared(models["decoder"], data(), task, "data.val_frac=0.5", "train.seq_len=96")
    packed, alone = (replace(config, data=replace(config.data, pack=pack)) for pack in ("always", "never"))
    n_rows = [
        TaskData(one, base, corpus, "loss").batches(base.model.config, shuffle=False).n_rows for one in (packed, alone)
    ]
    assert n_rows[0] < n_rows[1]
    (nats, count), (nats_alone, count_alone) = total(base, packed, corpus), total(base, alone, corpus)
    assert count == count_alone
    assert nats == pytest.approx(nats_alone, rel=1e-5)


def test_only_answers_are_trained_up_to_their_end(models):
    config, base, corpus, _, _ = prepared(models["decoder"], chats(4), "chat", "data.pack=never")
    assert base.tokenizer is not None
    batch = TaskData(config, base, corpus, "loss").batches(base.model.config, shuffle=False).batch([0])
    labels = batch["labels"][0]
    trained = labels[labels != IGNORE].tolist()
    eos = base.tokenizer.eos_id
    turns = [base.tokenizer.decode(part) for part in np.split(trained, np.flatnonzero(np.array(trained) == eos) + 1)]
    number = int(corpus.held_out[0])
    assert [turn.strip() for turn in turns if turn] == [f"number {number}", "good 猫"]
    # What comes before the first answer is what generating begins from.
    from llmctl.data.conversations import Message
    from llmctl.inference.chat_ids import encode_prompt_chat

    prompt = encode_prompt_chat(chat_of(base), [Message("user", f"what is {number}?")])
    first = int(np.flatnonzero(labels != IGNORE)[0])
    assert batch["input_ids_BT"][0][: first + 1].tolist() == prompt


def test_findings_are_counted_with_their_places(models):
    rows = [{"text": f"cat {i}", "label": "good"} for i in range(20)] + [
        {"text": f"mat {i}", "label": "bad"} for i in range(20)
    ]
    rows += [
        {"text": "cat 1", "label": "good"},
        {"text": "cat 2", "label": "bad"},
        {"text": " ", "label": "bad"},
        {"text": "cat " * 200, "label": "bad"},
        {"text": "rare", "label": "猫"},
    ]
    config, _, corpus, findings, first = prepared(models["encoder"], write_rows("odd.jsonl", rows), "classify")
    found = findings.to_dict()
    assert {kind: found[kind] for kind in ("duplicated", "contradicted", "empty", "cut", "dropped", "leaked")} == {
        "duplicated": 1,
        "contradicted": 1,
        "empty": 1,
        "cut": 1,
        "dropped": 0,
        "leaked": 0,
    }
    assert found["rows"] == len(corpus.train) + len(corpus.held_out) == 44
    text = "\n".join(findings.lines())
    for part in ("`odd.jsonl` line 41", "`odd.jsonl` line 42", "`odd.jsonl` line 43", "`odd.jsonl` line 44", "`猫` 1"):
        assert part in text
    assert first.where == "`odd.jsonl` line 1"
    with pytest.raises(UsageError, match="more than once"):
        run(models["encoder"], Path("odd.jsonl"), "classify", "data.strict=true")
    with pytest.raises(UsageError, match="line 44 has"):
        prepared(models["encoder"], Path("odd.jsonl"), "classify", "data.too_long=refuse")
    dropped = prepared(models["encoder"], Path("odd.jsonl"), "classify", "data.too_long=drop")[3].to_dict()
    assert (dropped["dropped"], dropped["cut"], dropped["rows"]) == (1, 0, 43)
    del config


def test_what_of_a_conversation_is_not_trained_is_found(models):
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    good, bad = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad", "weight": 0}
    asked = {"role": "user", "content": "猫?"}
    rows = [
        {"messages": [asked, good]},
        {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}, asked, good], "tools": [call]},
        {"messages": [asked, bad, {**asked, "mood": 1}, good]},
        {"messages": [asked, bad]},
    ]
    data = write_rows("odd.jsonl", rows)
    _, base, corpus, findings, _ = prepared(models["decoder"], data, "chat")
    found = findings.to_dict()
    assert {kind: found[kind] for kind in ("silent", "unread", "unseen", "untrained", "empty", "rows")} == {
        "silent": 1,
        "unread": 3,
        "unseen": 0,
        "untrained": 1,
        "empty": 0,
        "rows": 3,
    }
    assert "(first: `odd.jsonl` line 2, `tools`)" in "\n".join(findings.lines())
    assert base.tokenizer is not None
    flags = [corpus.targets.document(row).astype(bool) for row in range(3)]
    ids = [corpus.documents.document(row)[mask] for row, mask in enumerate(flags)]
    assert {base.tokenizer.decode(part.tolist()).strip() for part in ids} == {"good"}
    with pytest.raises(UsageError, match="empty answer"):
        run(models["decoder"], data, "chat", "data.strict=true")


def test_the_last_answer_alone_is_trained_where_that_is_asked_for(models):
    _, base, corpus, _, _ = prepared(models["decoder"], chats(4), "chat", "answers=last")
    assert base.tokenizer is not None
    for row in range(4):
        trained = corpus.documents.document(row)[corpus.targets.document(row).astype(bool)]
        assert base.tokenizer.decode(trained.tolist()).strip() == "good 猫"


def test_held_out_rows_that_are_also_trained_on_are_said(models):
    train, val = (
        classes(4),
        write_rows("val.jsonl", [{"text": "cat 1 is good", "label": "good"}, {"text": "x", "label": "bad"}]),
    )
    _, _, corpus, findings, _ = prepared(models["encoder"], train, "classify", f"data.val_paths=[{val}]")
    assert len(corpus.held_out) == 2
    assert findings.to_dict()["leaked"] == 1


def test_equal_texts_stay_on_one_side(models):
    rows = [{"text": f"cat {i % 5}", "label": "good" if i % 2 else "bad"} for i in range(50)]
    _, _, _, findings, _ = prepared(models["encoder"], write_rows("same.jsonl", rows), "classify", "data.val_frac=0.4")
    assert findings.to_dict()["leaked"] == 0


def test_pairs_are_learned_where_there_is_one_token_type(models):
    """RoBERTa and XLM-R have one row for both texts."""
    base = load_model(models["bert"], device="cpu", dtype="float32")
    config = replace(base.model.config, n_token_types=1)
    name = "model.embed_token_types.weight"
    state = base.model.state_dict()
    write_artifact(Path("one"), config, state | {name: state[name][:1]}, files=base.artifact.files, provenance={})
    rows = [{"text": f"cat {i}", "pair": f"is {word}", "label": word} for i in range(20) for word in WORDS]
    trained = run(Path("one"), write_rows("pairs.jsonl", rows), "classify", "train.steps=3")
    assert np.isfinite(trained.summary["after"]["loss"])


def test_what_cannot_be_is_refused(models):
    for family, data, task, match in (
        ("encoder", chats(), "chat", "encoder"),
        ("encoder", questions(), "qa", "encoder"),
        ("encoder_decoder", chats(), "chat", "cannot be trained"),
    ):
        with pytest.raises(UsageError, match=match):
            run(models[family], data, task)
    with pytest.raises(UsageError, match="no parameter"):
        run(models["encoder"], classes(), "classify", "train.freeze=layers.7")
    trained = run(models["encoder"], classes(), "classify", "train.steps=2", out=Path("three"))
    two = write_rows("two.jsonl", [{"text": f"cat {i}", "label": w} for i in range(9) for w in ("yes", "no")])
    with pytest.raises(UsageError, match=r"line 1: column `label` is `yes`, not one of the labels `bad`"):
        run(trained.path, two, "classify")
    with pytest.raises(ArtifactError, match="3 outputs"):
        run(trained.path, two, "classify", "labels=no,yes")
    again = run(trained.path, classes(), "classify", "train.steps=2")
    assert again.summary["before"]["accuracy"] == pytest.approx(trained.summary["after"]["accuracy"])
    with pytest.raises(UsageError, match="classification head"):
        run(trained.path, Path("two.jsonl"), "text")


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_run_leaves_only_what_its_removal_knows(models, method):
    trained = run(models["decoder"], chats(4), "chat", f"method={method}", "train.steps=2")
    assert not_written(trained.path) == []


def test_strict_refuses_problems_of_plain_text_too(models):
    data = write_rows("same.jsonl", [{"text": f"the good cat {n % 9} sat on a bad mat"} for n in range(60)])
    with pytest.raises(UsageError, match="51 of 60 documents are copies"):
        run(models["decoder"], data, "text", "data.strict=true")
    assert run(models["decoder"], data, "text", "train.steps=1").summary["steps"] == 1


def test_frozen_parts_and_lower_layers_stay_closer_to_what_they_were(models):
    trained = run(models["encoder"], classes(), "classify", "train.freeze=embeddings,layers.0", "train.steps=4")
    old, new = tensors(models["encoder"] / "model.safetensors"), tensors(trained.path / "model.safetensors")
    same = {name for name in old if name in new and old[name] == new[name]}
    assert "model.embed_tokens.weight" in same
    assert any(".layers.0." in name for name in same)
    assert not any(".layers.1." in name and "proj" in name for name in same)


def test_a_metric_of_texts_chooses_the_best_step(models):
    trained = run(models["encoder_decoder"], questions(), "qa", "train.steps=6", "train.eval_every=2")
    assert trained.summary["metric"] == "token_f1"
    lines = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert all("token_f1" in line for line in lines if line["kind"] == "eval")


@pytest.mark.parametrize(
    ("family", "task", "method"),
    [("bert", "classify", "lora"), ("encoder_decoder", "qa", "qlora"), ("decoder", "prefer", "lora")],
)
def test_two_processes_give_the_adapter_of_one(models, here, family, task, method):
    data = {"classify": classes, "qa": questions, "prefer": preferences}[task]()
    flags = [part for setting in (*SMALL, f"method={method}", "train.threads=1") for part in ("--set", setting)]
    command = ["finetune", str(models[family]), str(data), "--task", task, "--deterministic", *flags]
    one = finish([*WARM, *command, "-o", "one", "--json"])
    two = finish_two_ranks([*command, "-o", "two", "--json"])
    assert tensors(here / "one" / "adapter_model.safetensors") == tensors(here / "two" / "adapter_model.safetensors")
    assert json.loads(one.out)["after"] == json.loads(two.out)["after"]


def test_divergence_is_said_with_short_numbers(models, tmp_path, capfd):
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 200)
    settings = ["optim.lr=100", "train.steps=10", "train.eval_every=5"]
    begin("finetune", config_of(models["decoder"], tmp_path / "a.txt", "text", *settings), out=tmp_path / "out")
    err = capfd.readouterr().err
    assert "training diverged: training made the model worse: loss " in err
    assert "\nhint: lower the learning rate (--lr, optim.lr)\n" in err
    assert "e+304" in err
    assert max(map(len, err.splitlines())) < 200
    assert max(map(len, (tmp_path / "out" / "README.md").read_text().splitlines())) < 500
