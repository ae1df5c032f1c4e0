"""A teacher behind a server in a shell: answers, a trained student, and what is refused."""

import json
from pathlib import Path

import pytest

from llmctl.artifacts.load import load_model
from tests.commands.conftest import Shell
from tests.support.chat_server import serving

QUICK = [
    part
    for setting in (
        "server.backoff_seconds=0.001",
        "train.batch_size=8",
        "train.seq_len=96",
        "train.eval_every=4",
        "train.dtype=float32",
        "train.device=cpu",
        "optim.lr=0.01",
    )
    for part in ("--set", setting)
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("".join(f"the cat {i}\n" for i in range(40)), encoding="utf-8")
    return tmp_path


@pytest.fixture
def served():
    with serving() as server:
        yield server


def named(server):
    return (server.url, "--teacher-model", "teacher-1")


def test_answers_are_rows_that_train_a_student(shell: Shell, served, models):
    status, out, err = shell(
        "distill", "cache", *named(served), "-d", "prompts.txt", "-o", "answers", *QUICK[:2], "--json"
    )
    assert status == 0
    record = json.loads(out)
    assert (record["rows"], record["requests"], record["cached"]) == (40, 40, 0)
    assert "40 answers to 40 prompts" in err
    row = json.loads(Path("answers/answers.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["messages"] == [
        {"role": "user", "content": "the cat 0"},
        {"role": "assistant", "content": "THE CAT 0 0"},
    ]
    status, out, _ = shell(
        "finetune", models["decoder"], "answers/answers.jsonl", "--steps", 2, "-o", "student", *QUICK[2:]
    )
    assert (status, out) == (0, "student\n")


@pytest.mark.parametrize("logprobs", [0, 2])
def test_a_student_is_trained_in_one_go(shell: Shell, served, models, logprobs):
    command = ["distill", *named(served), "--student", models["decoder"], "-d", "prompts.txt", "--steps", 8, *QUICK]
    command += ["--set", f"server.top_logprobs={logprobs}", "-o", "student"]
    status, out, _ = shell(*command, "--json")
    assert status == 0
    record = json.loads(out)
    assert record["after"]["loss"] < record["before"]["loss"]
    assert load_model(Path("student"), device="cpu", dtype="float32").model.config.family == "decoder"
    asked = len(served.requests)
    assert asked == 40
    # Repeated, nothing is asked again; with probabilities the weights are others.
    status, out, _ = shell(*command, "--force", "--json", "--set", "data.logprobs=false")
    assert len(served.requests) == asked
    assert (json.loads(out)["after"]["loss"] == record["after"]["loss"]) == (logprobs == 0)


def test_the_teachers_best_and_worst_answers_are_preferences(shell: Shell, served, models):
    command = ["distill", *named(served), "--student", models["decoder"], "-d", "prompts.txt", "--steps", 2, *QUICK]
    command += ["--set", "server.keep=pairs", "--set", "server.answers=3", "--set", "server.top_logprobs=1"]
    status, out, _ = shell(*command, "--json")
    assert status == 0
    assert {"accuracy", "margin"} <= json.loads(out)["after"].keys()


def test_prompts_come_from_a_pipe_and_print_config_asks_nothing(shell: Shell, served, models):
    command = ["distill", *named(served), "--student", models["decoder"], "-d", "-", "--steps", 2, *QUICK]
    status, out, _ = shell(*command, "--print-config")
    assert status == 0
    assert "model: teacher-1" in out
    assert not served.requests
    rows = "".join(json.dumps({"prompt": f"一只猫 {i}"}, ensure_ascii=False) + "\n" for i in range(30))
    status, out, _ = shell(*command, stdin=rows.encode())
    assert (status, out) == (0, "runs/0001-finetune-chat-decoder\n")
    assert len(served.requests) == 30


def test_texts_are_completed_and_trained_as_text(shell: Shell, served, models):
    rows = [{"text": f"once upon {i}"} for i in range(30)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["distill", *named(served), "--student", models["decoder"], "-d", "texts.jsonl", "--steps", 2, *QUICK]
    status, out, _ = shell(*command)
    assert (status, out) == (0, "runs/0001-finetune-text-decoder\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--student", "50%"], 2, "cannot be pruned"),
        (["--student", "nowhere"], 3, "nowhere"),
        (["--student", "MODEL", "--teacher-model", "other"], 2, "no model `other`"),
        (["--student", "MODEL", "-d", "missing.txt"], 3, "missing.txt"),
        (["--student", "MODEL", "--set", "server.answers=0"], 2, "server.answers"),
    ],
)
def test_what_is_refused(shell: Shell, served, models, arguments, code, message):
    words = [str(models["decoder"]) if word == "MODEL" else word for word in arguments]
    given = ["-d", "prompts.txt"] if "-d" not in words else []
    name = [] if "--teacher-model" in words else ["--teacher-model", "teacher-1"]
    status, out, err = shell("distill", served.url, *name, *given, *words, *QUICK)
    assert (status, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_the_key_is_nowhere(shell: Shell, served, models, monkeypatch, here):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    command = ["distill", *named(served), "--student", models["decoder"], "-d", "prompts.txt", "--steps", 1, *QUICK]
    status, out, err = shell(*command, "-v")
    assert status == 0
    assert set(served.keys) == {"Bearer sk-secret"}
    assert "secret" not in out + err
    assert not any(b"secret" in path.read_bytes() for path in here.rglob("*") if path.is_file())
