"""Distillation end to end: students of every family are cut, learn, are reported on, and resume bit for bit."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.config import DistillConfig, FinetuneConfig
from llmctl.distilling.settings import settle
from llmctl.distilling.teacher import Teachers
from llmctl.distilling.teacher_data import prepare_taught
from llmctl.errors import ArtifactError, InterruptedRunError, UsageError
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.jobs import distill as module
from llmctl.jobs.begin import begin
from llmctl.jobs.distill import part_of
from llmctl.jobs.distill_cache import encode
from llmctl.jobs.finish import Trained
from llmctl.jobs.resume import resume
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.recipe import load
from llmctl.runs.folder import find_run
from llmctl.runs.history import History
from llmctl.runs.removal import not_written
from llmctl.tables.losses import ACROSS
from llmctl.training.finetune_settings import settle as settle_tuning
from llmctl.training.task_data import open_task_model
from tests.support.jobs import environment, running, weights
from tests.support.tuning import FAMILIES, SMALL
from tests.support.warm import WARM

TINY = [
    "train.batch_size=8",
    "train.steps=8",
    "train.eval_every=4",
    "train.seq_len=48",
    "train.dtype=float32",
    "train.device=cpu",
    "optim.lr=0.003",
    "student.calibration_rows=4",
    "data.split=blank",
    "loss.relation_heads=2",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(
        "\n\n".join(f"the good cat {i} sat on a bad mat. 猫坐在垫子上。" * 3 for i in range(60)), encoding="utf-8"
    )
    return tmp_path


def config_of(teacher: Path, *settings: str) -> DistillConfig:
    given = [*TINY, f"model={teacher}", "data.paths=[text.txt]", *settings]
    return settle(load(DistillConfig, settings=given, environment={}).config)


def run(teacher: Path, *settings: str, out: Path | None = None) -> Trained:
    trained = begin("distill", config_of(teacher, *settings), out=out, quiet=True)
    assert trained is not None
    return trained


def pairs(n: int = 60) -> str:
    path = Path("pairs.tsv")
    path.write_text("".join(f"the cat {i}\t猫 {i} good\n" for i in range(n)), encoding="utf-8")
    return f"data.paths=[{path}]"


def classes(n: int = 40) -> str:
    rows = [{"text": f"cat {i} is {word}", "label": word} for i in range(n) for word in ("good", "bad", "猫")]
    Path("classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "data.paths=[classes.jsonl]"


def with_labels(path: Path, problem: str = "single") -> Path:
    """Write a classifier on a model's shape and return its folder."""
    artifact = read_artifact(path)
    labels = ("bad", "good", "猫")
    config = replace(artifact.config, n_labels=3, labels=labels, problem=problem)
    model = LanguageModel(config)
    initialize(model, 2)
    return write_artifact(Path("classifier"), model.config, model.state_dict(), files=artifact.files, provenance={})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_every_family_comes_closer_to_its_teacher(teachers, family):
    settings = ["loss.name=none", "loss.match=hidden"] if family == "bert" else []
    settings.append("student.refit_tokens=0")  # what is solved for is so near already that few steps make it no nearer
    trained = run(teachers[family], "student.shape=layers=1", "train.steps=24", *settings)
    report = json.loads((trained.path / "report.json").read_text(encoding="utf-8"))
    assert trained.summary["report"] == report
    teacher, student = report["models"]["teacher"], report["models"]["student"]
    assert student["n_parameters"] < teacher["n_parameters"]
    before = report["student_before_training"]
    if family == "bert":  # no head of its own: only states are learned
        assert trained.summary["after"]["loss"] < before["loss"]
        return
    assert student["kl"] < before["kl"]
    assert teacher["kl"] == pytest.approx(0, abs=1e-6)
    assert teacher["agreement"] == 1
    assert 0 <= student["overlap"] <= 1
    assert report["flops"]["teachers"] > 0
    # The files are what was measured.
    found = load_model(trained.path, device="cpu", dtype="float32")
    assert found.model.config == LanguageModel(found.model.config).config
    assert sum(p.numel() for p in found.model.parameters()) == student["n_parameters"]


@pytest.mark.parametrize("name", ["fkl", "rkl", "jsd", "skl", "srkl", "akl", "taid", "tvd"])
def test_every_divergence_trains(teachers, name):
    trained = run(teachers["decoder"], "student.shape=layers=1", f"loss.name={name}", "loss.weight=0.5")
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]


def test_a_classifier_teaches_its_labels(teachers):
    teacher = with_labels(teachers["decoder"])
    trained = run(teacher, classes(), "student.shape=layers=1", "train.steps=16", "loss.weight=0.5")
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]
    assert load_model(trained.path).model.config.labels == ("bad", "good", "猫")


@pytest.mark.parametrize(("task", "metric"), [("text", "loss"), ("classify", "accuracy")])
def test_a_student_that_training_makes_worse_is_kept_as_it_was_cut(models, task, metric, here, capfd):
    learning = [*SMALL, "train.steps=40", f"model={models['decoder']}", f"task={task}", "train.eval_every=40"]
    data = "data.paths=[text.txt]" if task == "text" else classes()
    begin(
        "finetune",
        settle_tuning(load(FinetuneConfig, settings=[*learning, data], environment={}).config),
        out=here / "t",
    )
    short = [data, "student.shape=layers=1", "optim.name=adamw"]
    harm = ["train.steps=4", "train.eval_every=2", "train.keep_checkpoints=1", "optim.lr=30", "optim.schedule=constant"]
    trained = begin("distill", config_of(here / "t", *short, *harm), out=here / "worse")
    assert trained is not None
    assert not_written(trained.path) == []
    assert trained.summary["kept_step"] == 0
    assert trained.summary["after"][metric] == pytest.approx(trained.summary["before"][metric], rel=1e-4)
    assert f"training made the model worse: {metric}" in capfd.readouterr().err
    # The files are the cut.
    begin("distill", config_of(here / "t", *short, "train.steps=1", "optim.lr=1e-12"), out=here / "cut", quiet=True)
    kept, cut = (load_model(here / name, device="cpu", dtype="float32").model.state_dict() for name in ("worse", "cut"))
    for name in cut:
        torch.testing.assert_close(kept[name], cut[name])


@pytest.mark.parametrize(("problem", "label"), [("multi", "good"), ("regression", 0.5)])
def test_labels_of_other_kinds(teachers, problem, label):
    teacher = with_labels(teachers["encoder"], problem)
    artifact = read_artifact(teacher)
    if problem == "regression":
        model = LanguageModel(replace(artifact.config, n_labels=1, labels=()))
        initialize(model, 2)
        teacher = write_artifact(Path("one"), model.config, model.state_dict(), files=artifact.files, provenance={})
    rows = [{"text": f"cat {i}", "label": [label] if problem == "multi" else i / 10} for i in range(30)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trained = run(teacher, "data.paths=[rows.jsonl]", "student.shape=layers=1", f"problem={problem}")
    assert trained.summary["steps"] == 8


def test_pairs_are_distilled(teachers):
    trained = run(
        teachers["encoder_decoder"],
        pairs(),
        "task=translate",
        "student.shape=decoder_layers=1",
        "student.refit_tokens=0",
        "train.steps=24",
    )
    after, before = trained.summary["after"], trained.summary["before"]
    assert after["kl"] < before["kl"]
    config = load_model(trained.path).model.config
    assert (config.n_layers, config.n_decoder_layers) == (2, 1)


def test_the_teacher_does_not_change(teachers, monkeypatch):
    before = weights(teachers["decoder"])
    config = config_of(teachers["decoder"], "student.shape=layers=1")
    plans = []

    def keeping(session, plan, student, cache):
        plans.append(plan)
        return part_of(session, plan, student, cache)

    monkeypatch.setattr(module, "part_of", keeping)
    begin("distill", config, quiet=True)
    (used,) = plans[0].teachers.computing
    assert weights(teachers["decoder"]) == before
    state = load_model(teachers["decoder"], device="cpu", dtype="float32").model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in used.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in used.model.parameters())


def test_relations_of_an_encoder_are_matched_beside_its_predictions(teachers):
    config = config_of(teachers["encoder"], "student.shape=layers=1")
    assert (config.loss.match, config.loss.match_layer, config.loss.temperature) == ("relation", 2, 2.0)
    matched = run(teachers["encoder"], "student.shape=layers=1")
    plain = run(teachers["encoder"], "student.shape=layers=1", "loss.match=none")
    assert weights(matched.path) != weights(plain.path)


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_solved_for_bring_a_student_of_every_family_closer_before_any_training(teachers, family):
    figure = "kl"
    settings = ["student.shape=layers=1", "train.steps=1"]
    if family == "bert":
        settings, figure = [*settings, "loss.name=none", "loss.match=hidden"], "loss"
    plain, fitted = (
        run(teachers[family], *settings, f"student.refit_tokens={n}").summary["report"]["student_before_training"]
        for n in (0, 4096)
    )
    assert fitted[figure] < 0.9 * plain[figure]


@pytest.mark.parametrize(("dtype", "kl"), [("bf16", 3e-3), ("int8", 3e-3)])
def test_a_teacher_in_fewer_bits_says_nearly_the_same(teachers, dtype, kl):
    full = run(teachers["decoder"], "student.shape=layers=1")
    narrow = run(teachers["decoder"], "student.shape=layers=1", f"teacher.dtype={dtype}")
    assert weights(full.path) != weights(narrow.path)
    assert narrow.summary["after"]["loss"] == pytest.approx(full.summary["after"]["loss"], abs=0.02)
    assert abs(narrow.summary["after"]["kl"] - full.summary["after"]["kl"]) < kl
    sizes = {found.summary["report"]["models"]["teacher"]["n_parameters"] for found in (full, narrow)}
    assert len(sizes) == 1


def test_teachers_are_averaged(teachers, here):
    artifact = read_artifact(teachers["decoder"])
    other = LanguageModel(artifact.config)
    initialize(other, 7)
    write_artifact(here / "other", other.config, other.state_dict(), files=artifact.files, provenance={})
    trained = run(teachers["decoder"], "student.shape=layers=1", "teacher.more=[other]")
    alone = run(teachers["decoder"], "student.shape=layers=1")
    assert weights(trained.path) != weights(alone.path)


def test_batches_that_the_student_writes(teachers):
    trained = run(teachers["decoder"], "student.shape=layers=1", "loss.on_policy=1", "loss.name=rkl")
    again = run(teachers["decoder"], "student.shape=layers=1", "loss.on_policy=1", "loss.name=rkl")
    assert weights(trained.path) == weights(again.path)


def test_answers_that_the_student_writes(teachers):
    settings = ["student.shape=layers=1", "task=chat", conversations(), "loss.on_policy=0.5", "loss.name=rkl"]
    trained = run(teachers["decoder"], *settings)
    again = run(teachers["decoder"], *settings)
    assert weights(trained.path) == weights(again.path)
    assert weights(trained.path) != weights(run(teachers["decoder"], *settings, "loss.on_policy=0").path)


def test_baselines_and_stages_and_the_gap(teachers):
    settings = ["student.shape=layers=1", "stages=2", "baseline.enabled=true", "baseline.lr_factors=[1,3]"]
    trained = run(teachers["decoder"], *settings)
    baseline = trained.summary["report"]["baseline"]
    assert set(baseline["losses"]) == {"scratch-lr-1", "scratch-lr-3"}
    assert baseline["best"] == min(baseline["losses"], key=baseline["losses"].get)
    assert baseline["equal_compute_steps_ratio"] > 1
    loss = {name: side["loss"] for name, side in trained.summary["report"]["models"].items()}
    scratch = baseline["equal_tokens"]["loss"]
    if scratch > loss["teacher"]:
        expected = (scratch - loss["student"]) / (scratch - loss["teacher"])
        assert baseline["gap_recovered"] == pytest.approx(expected, rel=1e-4)
    lines = (trained.path / "parts" / "scratch-lr-1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert not (trained.path / "parts" / "stage-1" / "checkpoints").exists()
    # Both stages of the student together have as many steps as a baseline.
    assert max(json.loads(line)["step"] for line in lines) == 16
    assert trained.summary["report"]["steps"] == 16


def test_a_given_student_goes_on_from_its_weights(teachers, here):
    artifact = read_artifact(teachers["decoder"])
    other = LanguageModel(replace(artifact.config, n_layers=1))
    initialize(other, 5)
    write_artifact(here / "small", other.config, other.state_dict(), files=artifact.files, provenance={})
    trained = run(teachers["decoder"], "student.shape=small", "train.steps=1", "optim.lr=1e-12")
    found = load_model(trained.path, device="cpu", dtype="float32").model.state_dict()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in other.state_dict().items())


def with_tokenizer(path: Path, out: Path) -> Path:
    """Write a smaller model with another tokenizer and fresh weights, and return its folder."""
    from llmctl.config import TokenizerConfig
    from llmctl.tokenizer.train import train_tokenizer

    artifact = read_artifact(path)
    texts = ["the good cat 1 sat on a bad mat. 猫坐在垫子上。", "another text of dogs and hills 狗"] * 50
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=320))
    model = LanguageModel(replace(artifact.config, n_layers=1, vocab_size=tokenizer.vocab_size))
    initialize(model, 3)
    return write_artifact(out, model.config, model.state_dict(), files=tokenizer.files(), provenance={})


@pytest.mark.parametrize("across", ACROSS)
def test_a_student_learns_from_a_teacher_with_another_tokenizer(teachers, here, across):
    with_tokenizer(teachers["decoder"], here / "other")
    trained = run(
        teachers["decoder"], "student.shape=other", f"loss.across={across}", "train.steps=24", "loss.weight=0.5"
    )
    before, after = trained.summary["before"], trained.summary["after"]
    assert after["loss"] < before["loss"]
    assert across != "project" or after["kl"] < before["kl"]
    found = load_model(trained.path, device="cpu", dtype="float32")
    assert found.tokenizer.sha256 == load_model(here / "other", device="cpu", dtype="float32").tokenizer.sha256


@pytest.mark.parametrize("init", ["prune", "random"])
def test_a_new_student_gets_another_tokenizer(teachers, here, init):
    with_tokenizer(teachers["decoder"], here / "other")
    shape = ["student.shape=layers=1", f"student.init={init}", "student.tokenizer=other"]
    trained = run(teachers["decoder"], *shape, "train.steps=8", "student.refit_tokens=200")
    found = load_model(trained.path, device="cpu", dtype="float32")
    other = load_model(here / "other", device="cpu", dtype="float32")
    assert found.tokenizer.sha256 == other.tokenizer.sha256
    assert found.model.config.vocab_size == other.model.config.vocab_size
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]


def conversations(n: int = 60) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"cat {i}"}, {"role": "assistant", "content": f"a good mat {i} 猫"}]}
        for i in range(n)
    ]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "data.paths=[chat.jsonl]"


@pytest.mark.parametrize("on_policy", [0, 0.5])
def test_conversations_are_read_in_the_template_of_each(teachers, here, on_policy):
    with_tokenizer(teachers["decoder"], here / "other")
    settings = ["student.shape=other", "task=chat", conversations(), f"loss.on_policy={on_policy}", "train.steps=24"]
    trained = run(teachers["decoder"], *settings)
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]
    config = config_of(teachers["decoder"], *settings)
    base = open_task_model(config, here / "other")
    corpus = prepare_taught(config, base, Teachers(config), here / "data", lambda _: None)
    tokens, answers = (corpus.others[name].document(3) for name in ("other_documents", "other_targets"))
    teacher = load_model(teachers["decoder"], device="cpu", dtype="float32").tokenizer
    assert teacher.decode(tokens[answers.astype(bool)].tolist()).strip() == "a good mat 3 猫"


def test_an_encoder_decoder_learns_from_one_with_another_tokenizer(teachers, here):
    with_tokenizer(teachers["encoder_decoder"], here / "other")
    trained = run(
        teachers["encoder_decoder"], "student.shape=other", "task=translate", pairs(), "train.steps=16", "stages=1"
    )
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]


def test_teachers_and_encoders_with_another_tokenizer_are_refused(teachers, here):
    with_tokenizer(teachers["decoder"], here / "other")
    with pytest.raises(UsageError, match="different tokenizers"):
        run(teachers["decoder"], "student.shape=layers=1", "teacher.more=[other]")
    with pytest.raises(UsageError, match="needs the same tokens") as caught:
        run(teachers["decoder"], "student.shape=other", "loss.match=hidden")
    assert "different tokenizers" in str(caught.value)
    assert "seq" in caught.value.hint
    with_tokenizer(teachers["encoder"], here / "words")
    with pytest.raises(UsageError, match="masks and states"):
        run(teachers["encoder"], "student.shape=words")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("decoder", ["loss.weight=2"], "loss.weight"),
        ("decoder", ["loss.temperature=-1"], "loss.temperature"),
        ("decoder", ["loss.beta=1"], "loss.beta"),
        ("decoder", ["stages=-1"], "stages"),
        ("decoder", ["student.shape=layers=9"], "layers"),
        ("decoder", ["student.shape=0%"], "0%"),
        ("decoder", ["max_drop=lots"], "lots"),
        ("decoder", ["task=translate", "data.paths=[]"], "needs data"),
        ("decoder", ["loss.match_layer=7"], "match_layer"),
        ("encoder", ["loss.relation_heads=7"], "relation_heads"),
        ("encoder", ["loss.on_policy=0.5"], "on_policy"),
        ("encoder", ["loss.name=seq"], "seq"),
        ("encoder", ["task=translate"], "encoder"),
        ("decoder", ["baseline.enabled=true", "train.steps=0", "train.minutes=1"], "baseline"),
        ("decoder", ["loss.name=none", "loss.match=none"], "both none"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(teachers, here, family, settings, message):
    with pytest.raises(UsageError, match=message):
        run(teachers[family], *settings)
    assert not any((here / "runs").glob("*/model.safetensors")) if (here / "runs").exists() else True


@pytest.mark.parametrize(
    ("teacher", "student"), [("encoder", "decoder"), ("decoder", "encoder"), ("encoder_decoder", "decoder")]
)
def test_a_teacher_of_another_family_is_refused(teachers, teacher: str, student: str):
    with pytest.raises(UsageError, match="their outputs cannot be compared"):
        run(teachers[teacher], f"student.shape={teachers[student]}")


def test_a_gate_is_missed_and_the_student_is_there(teachers):
    missed = run(teachers["decoder"], "student.shape=layers=1", "max_drop=0%", "train.steps=1", "optim.lr=1e-9")
    report = missed.summary["report"]["models"]
    worse = report["student"]["loss"] > report["teacher"]["loss"]
    assert bool(missed.missed) == worse
    assert (missed.path / "model.safetensors").exists()
    assert run(teachers["decoder"], "student.shape=layers=1", "max_drop=1000%").missed == ""


def test_an_interrupted_run_goes_on_to_the_same_student(teachers, monkeypatch):
    settings = [
        "student.shape=layers=1",
        "stages=2",
        "train.save_every=1",
        "baseline.enabled=true",
        "baseline.lr_factors=[1]",
    ]
    whole = run(teachers["decoder"], *settings)

    def stopping_in(name):
        def stopping(session, plan, student, cache):
            part = part_of(session, plan, student, cache)
            if student.name != name:
                return part

            def make():
                objective = part.objective()
                forward = objective.forward

                def stop(batch):
                    if objective.training and objective.progress >= 0.5:
                        os.kill(os.getpid(), signal.SIGINT)
                    return forward(batch)

                objective.forward = stop
                return objective

            return replace(part, objective=make)

        return stopping

    for number, name in enumerate(("scratch-lr-1", "stage-1", "")):
        out = Path(f"run-{number}")
        with monkeypatch.context() as patch:
            patch.setattr(module, "part_of", stopping_in(name))
            with pytest.raises(InterruptedRunError):
                begin("distill", config_of(teachers["decoder"], *settings), out=out, quiet=True)
        done = resume("distill", str(find_run(str(out))), quiet=True)
        assert done is not None
        assert weights(done.path) == weights(whole.path)
        assert done.summary["report"]["baseline"]["losses"] == whole.summary["report"]["baseline"]["losses"]


def test_a_run_that_was_interrupted_before_its_first_step_says_so_and_goes_on(teachers, monkeypatch):
    def stopping(session, plan, student, cache):
        os.kill(os.getpid(), signal.SIGINT)
        return part_of(session, plan, student, cache)

    whole = run(teachers["decoder"], "student.shape=layers=1")
    config = config_of(teachers["decoder"], "student.shape=layers=1")
    with monkeypatch.context() as patch:
        patch.setattr(module, "part_of", stopping)
        with pytest.raises(KeyboardInterrupt):
            begin("distill", config, out=Path("early"), quiet=True)
    found = find_run("early")
    assert History(found).status == "interrupted"
    done = resume("distill", str(found), quiet=True)
    assert done is not None
    assert weights(done.path) == weights(whole.path)


def test_a_run_that_was_killed_goes_on_to_the_same_student(teachers, here):
    settings = [*TINY, "train.save_every=1", "student.shape=layers=1", "train.steps=12"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command = [*WARM, "distill", str(teachers["decoder"]), "-d", "text.txt", *flags, "-v"]
    with running([*command, "-o", "whole"], [*command, "-o", "killed"], env=environment()) as (whole, killed):
        killed.wait_for("step 6/12")
        killed.kill()
        killed.end()
        assert whole.end() == 0, whole.err
    with running([*WARM, "distill", "--resume", "killed"], env=environment()) as (resumed,):
        assert resumed.end() == 0, resumed.err
    assert weights(here / "killed") == weights(here / "whole")


def test_another_teacher_under_the_same_name_is_told(teachers, here):
    artifact = read_artifact(teachers["decoder"])
    teacher = here / "teacher"
    write_artifact(teacher, artifact.config, artifact.state(), files=artifact.files, provenance={})
    trained = run(teacher, "student.shape=layers=1", out=here / "run")
    record = json.loads((trained.path / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    config = config_of(teacher, "student.shape=layers=1")
    encode(config, Teachers(config), here / "data", print)
    other = LanguageModel(artifact.config)
    initialize(other, 3)
    write_artifact(teacher, other.config, other.state_dict(), files=artifact.files, provenance={}, force=True)
    with pytest.raises(ArtifactError, match="not the teacher"):
        encode(config, Teachers(config), here / "data", print)


def test_the_texts_of_a_teacher_are_learned(teachers, here):
    settings = ["loss.name=seq", "task=translate", "teacher.beams=2", "teacher.max_tokens=12", "train.seq_len=32"]
    trained = run(teachers["encoder_decoder"], pairs(), *settings, "student.shape=decoder_layers=1")
    again = run(teachers["encoder_decoder"], pairs(), *settings, "student.shape=decoder_layers=1")
    assert weights(trained.path) == weights(again.path)
    assert trained.summary["report"]["flops"]["teachers"] == 0


def test_texts_teach_a_student_of_another_tokenizer(teachers, here):
    from llmctl.config import TokenizerConfig
    from llmctl.tokenizer.train import train_tokenizer

    artifact = read_artifact(teachers["decoder"])
    tokenizer = train_tokenizer(
        ["the good cat sat on a bad mat 猫坐在垫子上 dogs hills 狗"] * 50, TokenizerConfig(vocab_size=300)
    )
    shape = replace(artifact.config, n_layers=1, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, pad_id=-1)
    model = LanguageModel(replace(shape, bos_id=tokenizer.bos_id, mask_id=-1))
    initialize(model, 4)
    write_artifact(here / "other", model.config, model.state_dict(), files=tokenizer.files(), provenance={})
    settings = ["loss.name=seq", "student.shape=other", "teacher.max_tokens=12", "train.steps=24"]
    trained = run(teachers["decoder"], *settings)
    assert trained.summary["after"]["loss"] < trained.summary["before"]["loss"]
    assert (trained.path / "tokenizer.model").read_bytes() == tokenizer.files()["tokenizer.model"]
    assert "kl" not in trained.summary["report"]["models"]["student"]
