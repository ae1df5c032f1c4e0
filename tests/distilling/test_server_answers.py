"""Answers of a real server on this machine: kept, retried, counted, rejected and never asked twice."""

import json
import threading
from dataclasses import replace

import pytest

from llmctl.config import ServerConfig
from llmctl.data.conversations import Message
from llmctl.data.prompts import Asked
from llmctl.distilling import server as module
from llmctl.distilling.answer_log import NAME, AnswerLog
from llmctl.distilling.server import Server, checked_url
from llmctl.distilling.server_answers import collect
from llmctl.errors import StoppedError, UsageError
from tests.support.chat_server import serving, waited

QUICK = ServerConfig(
    model="teacher-1", backoff_seconds=0.001, timeout_seconds=5, retries=3, concurrency=4, temperature=0.0
)


@pytest.fixture
def served():
    with serving() as server:
        yield server


def asked(n: int, start: int = 0) -> list[Asked]:
    return [Asked(f"p.txt:{i}", (Message("user", f"word {i}"),)) for i in range(start, start + n)]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ask(served, folder, prompts, config=QUICK):
    server = Server(served.url, config)
    return collect(server, prompts, folder, config, lambda _: None)


def test_rows_are_in_the_order_of_the_prompts_and_asked_once(served, tmp_path):
    found = ask(served, tmp_path / "a", asked(20))
    answers = [row["messages"][-1]["content"] for row in rows(found.path)]
    assert answers == [f"WORD {i} 0" for i in range(20)]
    assert rows(found.path)[3]["provenance"]["model"] == "teacher-1-2026"
    assert served.most_running <= 4
    assert found.counts["requests"] == len(served.requests) == 20
    assert found.counts["completion_tokens"] == 60
    first = found.path.read_bytes()
    again = ask(served, tmp_path / "a", asked(25))
    assert again.counts["cached"] == 20
    assert len(served.requests) == 25
    assert again.path.read_bytes()[: len(first)] == first
    # Another run that shares the responses.
    shared = replace(QUICK, cache=str(tmp_path / "a"))
    assert ask(served, tmp_path / "b", asked(5), shared).counts["requests"] == 0


def test_equal_prompts_are_asked_once(served, tmp_path):
    found = ask(served, tmp_path, [Asked(f"p.txt:{i}", (Message("user", "猫"),)) for i in range(8)])
    assert (found.n_rows, found.counts["requests"], found.counts["cached"]) == (8, 1, 7)
    assert len(served.requests) == 1


@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "garbage", "list", "empty", "huge"])
def test_a_fault_that_passes_is_asked_again(served, tmp_path, fault):
    served.faults = [fault, fault]
    found = ask(served, tmp_path, asked(3))
    assert found.n_rows == 3
    assert len(served.requests) == 5
    assert found.counts["failed"] == 0


def test_an_answer_that_does_not_come_is_asked_again(served, tmp_path):
    served.faults = ["slow"]
    config = replace(QUICK, timeout_seconds=0.3)
    assert ask(served, tmp_path, asked(2), config).n_rows == 2
    assert len(served.requests) == 3


def test_many_failures_end_the_run_and_nothing_is_lost(served, tmp_path):
    config = replace(QUICK, retries=0, concurrency=1)
    served.faults = [None, None, 500, 500, 500, 500]
    with pytest.raises(StoppedError, match=r"4 requests failed, the first: p\.txt:2: status 500") as caught:
        ask(served, tmp_path, asked(8), config)
    assert "repeat the command" in caught.value.hint
    assert len(served.requests) == 6
    assert ask(served, tmp_path, asked(8), config).counts["cached"] == 2
    served.faults = [400]  # few failures are only told
    told = ask(served, tmp_path, asked(1, 20) + asked(8), config)
    assert (told.n_rows, told.counts["failed"]) == (8, 1)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_and_is_not_shown(served, tmp_path, monkeypatch, status):
    monkeypatch.setenv("LLMCTL_API_KEY", "sk-secret")
    served.faults = [status] * 4
    with pytest.raises(UsageError, match="the key was refused") as caught:
        ask(served, tmp_path, asked(4))
    assert set(served.keys) == {"Bearer sk-secret"}
    assert "secret" not in str(caught.value) + caught.value.hint
    served.faults = []
    ask(served, tmp_path, asked(4))
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.iterdir())


def test_an_unknown_model_names_those_of_the_server(served, tmp_path):
    with pytest.raises(UsageError, match="no model `other`") as caught:
        ask(served, tmp_path, asked(2), replace(QUICK, model="other"))
    assert "`teacher-1`, `teacher-2`" in caught.value.hint


def test_a_model_must_be_named(served, tmp_path):
    with pytest.raises(UsageError, match="no `--teacher-model`") as caught:
        ask(served, tmp_path, asked(2), replace(QUICK, model=""))
    assert "`teacher-1`" in caught.value.hint


def test_redirects_are_not_followed(served, tmp_path):
    served.faults = [302]
    with pytest.raises(UsageError, match="redirects elsewhere"):
        ask(served, tmp_path, asked(1))


def test_no_server_is_a_failure_that_is_told(tmp_path):
    server = Server("http://127.0.0.1:9/v1", replace(QUICK, retries=1))
    with pytest.raises(StoppedError, match="no answer"):
        collect(server, asked(1), tmp_path, replace(QUICK, retries=1), lambda _: None)


def test_a_stop_ends_what_waits(served, tmp_path):
    served.faults = ["slow"] * 4
    server = Server(served.url, replace(QUICK, timeout_seconds=60))
    failed: list[BaseException] = []

    def run() -> None:
        try:
            collect(server, asked(4), tmp_path, server.config, lambda _: None)
        except BaseException as error:  # noqa: BLE001 - what ends the thread is compared
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert waited(lambda: served.running == 4)
    server.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(failed[0], StoppedError)


def test_the_limit_of_tokens(served, tmp_path):
    config = replace(QUICK, max_tokens_total=12, concurrency=1)
    found = ask(served, tmp_path, asked(9), config)
    assert found.is_cut
    assert found.n_rows == 3  # of 5 tokens each
    assert found.record()["reached_max_tokens_total"]


def test_what_is_kept(served, tmp_path):
    prompts = [Asked("a", (Message("user", text),)) for text in ("short", "a long one", "has 7 in it")]
    found = ask(served, tmp_path / "a", prompts, replace(QUICK, pattern=r"\d in|SHORT"))
    assert [row["messages"][0]["content"] for row in rows(found.path)] == ["short"]
    assert found.rejected == {"truncated": 1, "without the pattern": 1}
    several = replace(QUICK, answers=3, keep="best", top_logprobs=2)
    found = ask(served, tmp_path / "b", prompts[:1], several)
    # The first one has the highest mean logprob here.
    assert [row["messages"][-1]["content"] for row in rows(found.path)] == ["SHORT 0"]
    assert found.rejected == {"not the best": 2}
    pairs = ask(served, tmp_path / "b", prompts[:1], replace(several, keep="pairs"))
    (row,) = rows(pairs.path)
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("SHORT 0", "SHORT 2")
    assert row["prompt"] == [{"role": "user", "content": "short"}]
    found = ask(served, tmp_path / "b", prompts[:1], several)
    top = rows(found.path)[0]["logprobs"][1]["top"]
    assert top == [[list(b" 0"), -0.5], [list(b" cat"), -2.0]]
    with pytest.raises(UsageError, match="no answer was kept"):
        ask(served, tmp_path / "c", prompts, replace(QUICK, min_chars=1000))


def test_thinking(served, tmp_path):
    served.think = True
    assert rows(ask(served, tmp_path / "a", asked(1)).path)[0]["messages"][-1]["content"] == "WORD 0 0"
    kept = ask(served, tmp_path / "b", asked(1), replace(QUICK, keep_thinking=True))
    assert rows(kept.path)[0]["messages"][-1]["content"] == "<think>so word 0</think>\nWORD 0 0"


def test_texts_are_completed(served, tmp_path):
    found = ask(served, tmp_path, [Asked("t", (), "once upon")])
    assert rows(found.path)[0]["text"] == "once upon ONCE UPON 0"
    assert served.requests[0]["prompt"] == "once upon"


def test_a_cut_or_changed_line_is_asked_again(served, tmp_path):
    ask(served, tmp_path, asked(3))
    path = tmp_path / NAME
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"WORD", b"WORM") + lines[2][:-20])
    found = ask(served, tmp_path, asked(3))
    assert found.counts["cached"] == 1
    assert [row["messages"][-1]["content"] for row in rows(found.path)] == [f"WORD {i} 0" for i in range(3)]
    log = AnswerLog(tmp_path)
    assert log.get("unknown") is None
    log.close()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:word@host/v1", "holds a password"),
        ("http://host/v1?key=1", "holds a password or parameters"),
        ("http:///v1", "no host"),
        ("http://host:port/v1", "not an address"),
    ],
)
def test_addresses_that_are_refused(url, message):
    with pytest.raises(UsageError, match=message) as caught:
        checked_url(url)
    assert "word@" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"concurrency": 0}, {"answers": 0}, {"top_p": 0.0}, {"pattern": "("}, {"top_logprobs": 30}, {"keep": "pairs"}],
)
def test_settings_out_of_range(tmp_path, change):
    config = replace(QUICK, **change)
    with pytest.raises(UsageError, match=r"server\."):
        collect(Server("http://host/v1", config), asked(1), tmp_path, config, lambda _: None)


def test_the_rate_limit_spreads_requests(served, tmp_path, monkeypatch):
    waits: list[float] = []
    server = Server(served.url, replace(QUICK, requests_per_minute=600))
    monkeypatch.setattr(server._stopped, "wait", waits.append)
    now = module.time.monotonic()
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    collect(server, asked(4), tmp_path, server.config, lambda _: None)
    assert sorted(round(one, 3) for one in waits) == [0.1, 0.2, 0.3]
